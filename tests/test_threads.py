"""Right results, no abort and no hang with threads and processes, under either threading layer."""

import ctypes
import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numba
import numpy as np
import pytest
import threads_script
from cases import same_bits

import normkit as nk
from normkit.backends.numba import kernels, threads

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


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("shape", [(40_000, 40), (2100, 1024), (512, 130, 7, 4)], ids=str)
@pytest.mark.parametrize("clip", [None, (1.25, 0.5), (1.0, 0.5), (1.25, 0.0)], ids=str)
def test_one_thread_gives_the_bits_of_all(
    clip: tuple[float, float] | None, shape: tuple[int, ...], dtype: str
) -> None:
    """Whether a unit's parts are shared by threads or not, and however far its mean is away."""
    rng = np.random.default_rng(5)
    channels = shape[1]
    x, dy = (rng.standard_normal(shape, "float32").astype(dtype) for _ in range(2))
    x[:, ::3] += 2000 if dtype == "float16" else 5000  # about which sums are taken anew
    x[:, 1::4] *= x.dtype.type(3)
    gamma, beta = (rng.standard_normal(channels, "float32") for _ in range(2))
    beta[::2] = 0  # beside which the last bits of a mean are to be seen

    def run(out: Any) -> list[Any]:
        running = np.full(channels, 0.75), np.full(channels, 1.5)  # both clips act, on some
        norm, options = nk.batch_norm, {"running_mean": running[0], "running_var": running[1]}
        if clip is not None:
            norm, options = nk.batch_renorm, {"running_mean": running[0], "running_std": running[1]}
            options |= {"r_max": clip[0], "d_max": clip[1]}
        y, pullback = nk.vjp(norm, x, gamma, beta, **options)
        again = {"out": x.copy()} if out else {}
        y_again = norm(again.get("out", x), gamma, beta, **options, **again)
        return [y, *pullback(dy), *running, y_again]

    every, found = numba.get_num_threads(), []
    try:
        for count, out in ((every, False), (1, False), (every, True)):
            numba.set_num_threads(count)
            found.append(run(out))
    finally:
        numba.set_num_threads(every)
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert same_bits(a, b)
    with nk.use_backend("reference"):
        exact = run(False)
    close = {"float16": 4e-3, "float32": 2e-3, "float64": 1e-9}[dtype]  # as x has it, at 5000
    np.testing.assert_allclose(found[0][0].astype("f8"), exact[0].astype("f8"), close, close)
    for a, b in zip(found[0][4:6], exact[4:6], strict=True):
        np.testing.assert_allclose(a, b, 1e-5)


class Recorder:
    """A kernel that records whether it ran on one thread or on several."""

    address = 0

    def __init__(self) -> None:
        self.ran: list[str] = []

    def run(self, *_: Any) -> None:
        self.ran.append("alone")

    def share(self, *_: Any) -> None:
        self.ran.append("shared")


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """``recorded(gap, *elements)``: how calls on so much work ran, with `gap` seconds between."""
    now = itertools.count(1 << 20)
    monkeypatch.setattr(numba.config, "NUMBA_NUM_THREADS", 2)
    monkeypatch.setattr(threads, "start_threads", lambda: "omp")
    monkeypatch.setattr(threads, "_WAKES", 1 << 19)

    def record(gap: float, *elements: int) -> list[str]:
        monkeypatch.setattr(threads, "perf_counter", lambda: next(now) * gap)
        pool, kernel = threads.Pool(), Recorder()
        for count in elements:
            pool.run(kernel, (), 2, count)
        return kernel.ran

    return record


def test_sleeping_threads_are_woken_for_much_work_only(recorded: Callable[..., list[str]]) -> None:
    few, many = 1 << 15, 1 << 19
    assert recorded(1e-3, *[few] * 20, many, few) == ["alone"] * 20 + ["shared", "alone"]


def test_calls_that_follow_each_other_are_shared(recorded: Callable[..., list[str]]) -> None:
    few = 1 << 15
    assert recorded(1e-6, *[few] * 10, few - 1) == ["alone"] * 8 + ["shared"] * 2 + ["alone"]


@pytest.mark.parametrize("chosen", [{}, {"GOMP_SPINCOUNT": "5"}, {"OMP_WAIT_POLICY": "passive"}])
def test_the_environment_stays_as_it_was(
    chosen: dict[str, str], python: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What OpenMP reads from it is nobody else's business, and a user's choice comes first."""
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    code = """if 1:
        import os, numba, numpy as np, normkit as nk
        seen, ask = [], numba.get_num_threads
        numba.get_num_threads = lambda: seen.append(os.environ.get("GOMP_SPINCOUNT")) or ask()
        before = dict(os.environ)
        nk.layer_norm(np.ones((1024, 1024), "float32"))
        assert dict(os.environ) == before
        print(seen[0])"""
    run = python("-c", code, NUMBA_NUM_THREADS="2", **chosen)
    expected = chosen.get("GOMP_SPINCOUNT", "None") if chosen else threads._SPINS
    assert run.stdout.split() == [expected], run.stderr


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError], ids=lambda error: error.__name__)
def test_a_kernel_that_another_needs(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is compiled once; what is raised where no kernel may raise, by a signal or an error, is
    raised after, but does not stay.
    """
    ran, compiled = [], []
    kind = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
    kernel = kind(lambda call, first, last: ran.append((first, last)))

    def compile_kernel(*_: Any) -> Any:
        compiled.append(error)
        if len(compiled) == 1:
            raise error
        return SimpleNamespace(address=ctypes.cast(kernel, ctypes.c_void_p).value)

    def run(*_: Any) -> None:
        address = ctypes.c_void_p.from_address(links.address).value
        kind(address)(None, 0, 3)  # type: ignore[arg-type]

    monkeypatch.setattr(kernels, "compiled", compile_kernel)
    links, pool = kernels.Links(("kernel",)), threads.Pool()
    with pytest.raises(error):
        pool.run(SimpleNamespace(run=run, address=0), (), 1, 1)
    for _ in range(2):
        pool.run(SimpleNamespace(run=run, address=0), (), 1, 1)
    assert ran == [(0, 3)] * 3  # what interrupts comes after the work
    assert len(compiled) == 2
