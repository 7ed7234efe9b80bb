"""Fixtures that every test file shares."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import KERNELS

import normkit as nk


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
    with nk.use_backend(request.param):
        yield request.param


@pytest.fixture
def xp(backend: str, request: pytest.FixtureRequest) -> Any:
    """The array library of `backend`: make arrays with ``xp.asarray``."""
    return request.getfixturevalue("cupy") if backend == "cuda" else np


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
