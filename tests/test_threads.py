"""Right results, no abort and no hang with threads and processes, under either threading layer."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import threads_script

import normkit as nk

LAYERS = [
    pytest.param(
        "omp", marks=pytest.mark.skipif(sys.platform == "darwin", reason="needs an OpenMP runtime")
    ),
    "workqueue",
]


@pytest.fixture(scope="module", params=LAYERS)
def said(request: pytest.FixtureRequest, python: Callable[..., Any]) -> dict[str, str]:
    """What the script says under a threading layer: check -> result."""
    environment = {"NUMBA_THREADING_LAYER": request.param, "NUMBA_NUM_THREADS": "4"}
    try:
        run = python(threads_script.__file__, timeout=400, **environment)
        output, errors = run.stdout, f"exit status {run.returncode}\n{run.stderr}"
    except subprocess.TimeoutExpired as late:
        output, errors = (late.stdout or b"").decode(), "timed out"
    lines = dict(line.split(": ", 1) for line in output.splitlines() if ": " in line)
    return lines | {"errors": errors}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("check", [check.__name__ for check in threads_script.CHECKS])
def test_concurrency(check: str, said: dict[str, str]) -> None:
    assert said.get(check) == "right", said["errors"]


def test_the_chosen_backend_is_the_threads_own() -> None:
    """use_backend in one thread leaves another's calls alone."""
    x, chosen = np.linspace(0, 1, 8, dtype="float32")[None], []

    def elsewhere() -> None:
        with nk.use_backend("reference") as backend:
            inside.set()
            leave.wait(60)
            chosen.append(backend.name)

    inside, leave = threading.Event(), threading.Event()
    other = threading.Thread(target=elsewhere)
    with nk.use_backend("numba"):
        here = nk.dispatch.backend_for(np.ndarray)
        other.start()
        inside.wait(60)
        assert nk.dispatch.backend_for(np.ndarray) is here
        nk.layer_norm(x)
        leave.set()
        other.join()
    assert chosen == ["reference"]
