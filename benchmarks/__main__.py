"""Time normkit beside PyTorch eager on the CPU: ``python -m benchmarks [--quick] [--filter WORD]``.

All contestants run in one process, in interleaved rounds, on 2 threads, and under allocator
settings that keep glibc from giving every large result fresh pages (page faults would otherwise be
most of what is timed). A copy of the same bytes by NumPy stands beside them.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

THREADS = 2
TUNABLES = "glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=8589934592"
#: seconds until the threads of the contestant before have stopped spinning for more work, each
#: OpenMP runtime in the process having threads of its own
SETTLE = 0.03
#: seconds to run untimed, until its own threads are awake and spread over the processors
WAKE = 0.02
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 8e-2}


def main() -> int:
    """Run the table and print it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--filter", default="", help="words of a row's name and size")
    parser.add_argument("--quick", action="store_true", help="small tensors, few rounds")
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds (9)")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--list", action="store_true", help="list the rows and stop")
    options = parser.parse_args()

    from benchmarks.cases import cases

    words = options.filter.split()
    rows = [
        case
        for case in cases()
        if all(word in f"{case.name} {case.size}" for word in words)
        and not (options.quick and case.size == "large")
    ]
    if options.list:
        print(*(case.name for case in rows), sep="\n")
        return 0

    from rich.progress import track

    results = [
        _time(case, 3 if options.quick else options.rounds)
        for case in track(rows, description="timing", transient=True)
    ]
    _print(results)
    if options.json:
        record = {"machine": _machine(), "threads": THREADS, "rows": results}
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


def _contestants() -> dict[str, Any]:
    from benchmarks import peers

    found = {"normkit": peers.normkit}
    try:
        import torch
    except ImportError:
        return found
    torch.set_num_threads(THREADS)
    return found | {"torch": peers.torch}


def _time(case: Any, rounds: int) -> dict[str, Any]:
    """Median microseconds of each contestant, whose results are compared first."""
    import numpy as np

    from benchmarks import peers

    arrays = peers.inputs(case)
    runs = {name: make(case, arrays) for name, make in _contestants().items()}
    first = {name: peers.outputs(run()) for name, run in runs.items()}
    for name, result in first.items():
        for ours, theirs in zip(first["normkit"], result, strict=True):
            error = np.abs(ours - theirs).max() / max(1.0, np.abs(theirs).max())
            if not error < TOLERANCE[case.dtype]:
                raise AssertionError(f"{case.name}: {name} and normkit differ by {error:.2g}")
    source = np.zeros(case.bytes() // 2, np.uint8)
    target = np.empty_like(source)
    runs["copy"] = lambda: np.copyto(target, source)

    times: dict[str, list[float]] = {name: [] for name in runs}
    begin = time.perf_counter()
    runs["normkit"]()
    loops = max(1, int(0.004 / (time.perf_counter() - begin)))
    for _ in range(rounds):
        for name, run in runs.items():
            time.sleep(SETTLE)
            awake = time.perf_counter() + WAKE
            while time.perf_counter() < awake:
                run()
            begin = time.perf_counter()
            for _ in range(loops):
                run()
            times[name].append((time.perf_counter() - begin) / loops * 1e6)
    medians = {name: round(statistics.median(t), 2) for name, t in times.items()}
    return {"case": case.name, "size": case.size, "us": medians}


def _print(results: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"microseconds, {THREADS} threads")
    peer = "torch" if all("torch" in row["us"] for row in results) else "copy"
    for column in ("case", "normkit", peer, f"{peer}/normkit", "copy/normkit"):
        table.add_column(column, justify="left" if column == "case" else "right")
    for row in results:
        us = row["us"]
        ratio = us[peer] / us["normkit"]
        table.add_row(
            row["case"],
            f"{us['normkit']:.1f}",
            f"{us[peer]:.1f}",
            f"[{'red' if ratio < 1 else 'green'}]{ratio:.2f}[/]",
            f"{us['copy'] / us['normkit']:.2f}",
        )
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    for size in ("small", "large"):
        ratios = [row["us"][peer] / row["us"]["normkit"] for row in results if row["size"] == size]
        if ratios:
            console.print(
                f"{size}: {peer}/normkit geometric mean {statistics.geometric_mean(ratios):.2f}, "
                f"least {min(ratios):.2f}, rows below 1: {sum(r < 1 for r in ratios)}"
                f" of {len(ratios)}"
            )


def _machine() -> dict[str, Any]:
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = models[0].split(":")[1].strip() if models else cpu
    versions = {}
    for package in ("numpy", "numba", "torch"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"cpu": cpu, "cores": os.cpu_count(), "python": platform.python_version()} | versions


if __name__ == "__main__":
    if os.environ.get("GLIBC_TUNABLES") != TUNABLES:  # read when a process starts
        os.environ |= {"GLIBC_TUNABLES": TUNABLES, "NUMBA_NUM_THREADS": str(THREADS)}
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks", *sys.argv[1:]])
    raise SystemExit(main())
