"""Correctness, then speed, on a GPU: ``python -m benchmarks.gpu [--out PREFIX]``.

First the tests that need a GPU, and compute-sanitizer on a few small calls where that tool is
there; then the table of `benchmarks.cases`, twice: the second time beside torch.compile as well,
which takes seconds a row, for as long as time is left. Everything is written as it comes, so that a
late failure loses nothing. ``--plan`` needs no GPU: it prints how every case would be launched.

Times are those of CUDA events, with the L2 cache flushed before every sample by writes that take
the GPU longer than Python takes for a call: so they are the GPU's own.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import harness
from benchmarks.cases import BATCH, Case, cases, function, inputs, select
from benchmarks.peers import PEERS
from benchmarks.timing import Run
from normkit.axes import Axes
from normkit.backends.cuda import planner

MINUTES = 8  #: after which no row is begun
TEST_MINUTES, SANITIZER_MINUTES = 3, 1
ROUNDS = 20
FLUSH = 1 << 30  #: bytes, at least four times any L2 cache
SLOW = "torch.compile"


class Gpu:
    """CuPy's current device and stream, which PyTorch's default one is too."""

    name = "gpu"

    def __init__(self) -> None:
        import cupy

        self.xp = cupy
        self.flush = cupy.empty(FLUSH, cupy.uint8)

    def microseconds(self, run: Run) -> float:
        cuda = self.xp.cuda
        start, end = cuda.Event(), cuda.Event()
        self.flush.fill(0)
        start.record()
        result = run()
        end.record()
        end.synchronize()
        del result
        return float(1e3 * cuda.get_elapsed_time(start, end))

    def copies(self, size: int) -> dict[str, Run]:
        source = self.xp.zeros(size // 2, "uint8")
        target = self.xp.empty_like(source)
        return {"copy": lambda: self.xp.copyto(target, source)}

    def release(self) -> None:
        self.xp.get_default_memory_pool().free_all_blocks()
        if torch := sys.modules.get("torch"):
            torch.cuda.empty_cache()

    def machine(self) -> dict[str, Any]:
        runtime = self.xp.cuda.runtime
        properties = runtime.getDeviceProperties(self.xp.cuda.Device().id)
        return {
            "hardware": properties["name"].decode(),
            "allocator": "CuPy's and PyTorch's own pools",
            "cupy": self.xp.__version__,
            "cuda": runtime.runtimeGetVersion(),
            "driver": runtime.driverGetVersion(),
        }


def plan(case: Case) -> str:
    """How the forward pass of a case would be launched."""
    axes = axes_of(case)
    tile = planner.tile(axes, np.dtype(case.dtype).itemsize, True)
    lanes, slots = tile.geometry.lanes, tile.geometry.slots
    team = f"block of {tile.threads}" if tile.wide else f"{lanes} lanes"
    read = "one read" if tile.parts == 1 else f"{tile.parts} parts, two reads"
    return f"{case.problem:50} {tuple(axes)!s:38} {tile.walk:8} {team:12} {slots:3} vectors  {read}"


def axes_of(case: Case) -> Axes:
    """How the kernels see the case."""
    import normkit as nk

    memory = (case.shape[0], *case.shape[2:], case.channels)
    x = np.empty(case.shape if case.layout != "NHWC" else memory, case.dtype)  # never touched
    x = np.moveaxis(x, -1, 1) if case.layout == "NHWC" else x
    norm = nk.batch_norm if case.norm in BATCH else getattr(nk, case.norm)
    with nk.use_backend("reference"):
        axes: Axes = norm.declare(x, **case.options).plan.layout.axes
    return axes


def check(what: str, command: list[str], minutes: float) -> str:
    """What a command came to, in a line."""
    began = time.monotonic()
    try:
        status = subprocess.run(command, check=False, timeout=60 * minutes).returncode
    except subprocess.TimeoutExpired:
        return f"{what}: not done after {minutes} minutes"
    verdict = "passed" if status == 0 else f"FAILED, status {status}"
    return f"{what}: {verdict} in {time.monotonic() - began:.0f} s"


def checks() -> list[str]:
    """The gpu-marked tests, then compute-sanitizer's tools on `smoke`."""
    tests = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests"]
    found = [check("tests", tests, TEST_MINUTES)]
    places = [*os.get_exec_path(), "/usr/local/cuda/bin"]
    sanitizer = shutil.which("compute-sanitizer", path=os.pathsep.join(places))
    if sanitizer is None:
        return [*found, "compute-sanitizer: skipped, it is not installed"]
    smoke = [sys.executable, "-m", "benchmarks.gpu", "--smoke"]
    for tool in ("memcheck", "racecheck"):
        command = [sanitizer, "--tool", tool, "--error-exitcode", "1", *smoke]
        found.append(check(f"compute-sanitizer {tool}", command, SANITIZER_MINUTES))
    return found


def smoke() -> None:
    """Every norm, layout and direction once, on small arrays with memory of their own each."""
    import cupy

    cupy.cuda.set_allocator(None)  # else one pool's memory is all that memcheck can tell apart
    for case in select(cases("cpu"), "small"):
        if case.dtype in ("float32", "bfloat16"):
            function(case, inputs(case, cupy))()
    cupy.cuda.Device().synchronize()


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--filter", default="", help="words of a row's name or place; alternatives after a comma"
    )
    parser.add_argument("--plan", action="store_true", help="print the launches; needs no GPU")
    parser.add_argument("--smoke", action="store_true", help="what compute-sanitizer watches")
    parser.add_argument("--skip-checks", action="store_true", help="speed only")
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), metavar="PREFIX")
    options = parser.parse_args()
    began = time.monotonic()
    table = select(cases("gpu"), options.filter)
    if options.plan:
        print(*(plan(case) for case in table if case.direction == "forward"), sep="\n")
        return 0
    if options.smoke:
        smoke()
        return 0

    found = ["checks: skipped, as asked"] if options.skip_checks else checks()
    print(*found, sep="\n", flush=True)
    makers, versions, absent = harness.peers("gpu", [peer.name for peer in PEERS])
    absent.append("JAX: its streams are out of reach of CUDA events")
    device = Gpu()
    results = harness.begin(device, versions, absent) | {"checks": found}
    quick = {who: make for who, make in makers.items() if who != SLOW}
    for who in (quick, makers) if SLOW in makers else (quick,):
        harness.run(
            table, device, who, ROUNDS, results, options.out,
            time_is_up=lambda: time.monotonic() - began > 60 * MINUTES,
        )  # fmt: skip
    status = harness.conclude(results, options.out)
    return status or int(any("FAILED" in line for line in found))


if __name__ == "__main__":
    raise SystemExit(main())
