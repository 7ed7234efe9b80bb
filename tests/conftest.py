"""Fixtures that every test file shares."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cases import KERNELS
from cuda_host import HostDevice

import normkit as nk
from normkit import dispatch
from normkit.backends.cuda import Cuda
from normkit.backends.cuda.planner import Limits
from normkit.backends.numba import threads
from normkit.dispatch import load


@pytest.fixture(scope="session", autouse=True)
def eager_threads() -> Iterator[None]:
    """Wake threads for as little work as they share when they are awake."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threads, "_WAKES", 0)
        yield


@pytest.fixture(scope="session")
def cupy() -> Any:
    """CuPy, or a skip that says what is missing."""
    found = pytest.importorskip("cupy", reason="no CuPy: nothing was tested on a GPU")
    try:
        found.cuda.runtime.getDeviceCount()
    except found.cuda.runtime.CUDARuntimeError as error:
        pytest.skip(f"no usable GPU ({error}): nothing was tested on one")
    return found


@pytest.fixture(params=["reference", *KERNELS])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of the backend that serves the test's calls."""
    if request.param == "cuda":
        request.getfixturevalue("cupy")
    if request.param == "emulation":
        request.getfixturevalue("monkeypatch").setattr(dispatch, "load", _load)
    with nk.use_backend(request.param):
        yield request.param


@pytest.fixture
def xp(backend: str, request: pytest.FixtureRequest) -> Any:
    """The array library of `backend`: make arrays with ``xp.asarray``."""
    if backend == "emulation":
        return SimpleNamespace(**vars(np))  # not NumPy itself: arrays have no layouts of the host's
    return request.getfixturevalue("cupy") if backend == "cuda" else np


class Emulated(Cuda):
    """The CUDA backend on NumPy arrays."""

    name = "emulation"
    arrays = ("numpy",)


@cache
def _emulated() -> Emulated:
    return Emulated(HostDevice(limits=Limits(sms=2)))


def _load(name: str) -> Any:
    return _emulated() if name == "emulation" else load(name)


@pytest.fixture(scope="session")
def python() -> Callable[..., Any]:
    """Run the interpreter in another process, which imports the same normkit."""

    def run(*arguments: str, timeout: float = 60, **environment: str) -> Any:
        home = str(Path(nk.__file__).parents[1])
        environment = os.environ | {"PYTHONPATH": home} | environment
        command = [sys.executable, *arguments]
        return subprocess.run(
            command, env=environment, timeout=timeout, capture_output=True, text=True, check=False
        )

    return run
