"""Correctness, then speed, on a GPU: ``python -m benchmarks.gpu [--out results/gpu]``.

Results are written as they come, so that a late failure loses nothing. Speed is given as a share of
the bandwidth that a device-to-device copy reaches in the same run, on the least bytes that an
operation can move (2 n forward, 3 n backward); the L2 cache is flushed before every repetition.
``--plan`` needs no GPU: it prints how every case would be launched.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

import normkit as nk
from normkit.axes import Axes
from normkit.backends.cuda import planner

REPETITIONS = 20
MINUTES = 9
Function = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    norm: str
    shape: tuple[int, ...]
    dtype: str
    last: bool = False  # channels are the last axis

    @property
    def name(self) -> str:
        layout = " channels-last" if self.last else ""
        return f"{self.norm} {'x'.join(map(str, self.shape))} {self.dtype}{layout}"

    @property
    def options(self) -> dict[str, Any]:
        channel = {"channel_axis": -1 if self.last else 1}
        if self.norm in ("layer_norm", "rms_norm"):
            return {}
        return channel | ({"num_groups": 32} if self.norm == "group_norm" else {})

    @property
    def params(self) -> int:
        last = self.last or self.norm in ("layer_norm", "rms_norm")
        return self.shape[-1 if last else 1]

    @property
    def bytes(self) -> int:
        return prod(self.shape) * planner.ITEMSIZE[self.dtype]

    @property
    def axes(self) -> Axes:
        norm = nk.batch_norm if self.norm == "batch_renorm" else getattr(nk, self.norm)
        with nk.use_backend("reference"):  # which looks at the shape alone here
            x = np.empty(self.shape, np.float32)
            axes: Axes = norm.declare(x, **self.options).plan.layout.axes
        return axes


def cases() -> Iterator[Case]:
    for dtype in ("bfloat16", "float32"):
        for rows, n in ((1 << 20, 64), (1 << 18, 256), (1 << 16, 1024), (1 << 13, 8192)):
            yield Case("layer_norm", (rows, n), dtype)
        yield Case("layer_norm", (4096, 32768), dtype)
        yield Case("layer_norm", (512, 131072), dtype)
        yield Case("layer_norm", (16384, 4097), dtype)
        yield Case("layer_norm", (65536, 1023), dtype)
        yield Case("rms_norm", (16384, 4096), dtype)
        for norm in ("batch_norm", "batch_renorm"):
            yield Case(norm, (256, 64, 56, 56), dtype)
            yield Case(norm, (256, 56, 56, 64), dtype, last=True)
        yield Case("batch_norm", (2048, 512, 7, 7), dtype)
        yield Case("instance_norm", (64, 64, 112, 112), dtype)
        yield Case("group_norm", (64, 256, 56, 56), dtype)
        yield Case("group_norm", (64, 56, 56, 256), dtype, last=True)
        yield Case("layer_norm", (64, 512), dtype)
        yield Case("batch_norm", (32, 64, 28, 28), dtype)


def plan(case: Case) -> str:
    axes = case.axes
    tile = planner.tile(axes, planner.ITEMSIZE[case.dtype], True)
    lanes, slots = tile.geometry.lanes, tile.geometry.slots
    team = f"block of {tile.threads}" if tile.wide else f"{lanes} lanes"
    read = "one read" if tile.parts == 1 else f"{tile.parts} parts, two reads"
    return f"{case.name:48} {tuple(axes)!s:38} {tile.walk:8} {team:12} {slots:3} vectors  {read}"


class Bench:
    """What the cases share on one GPU."""

    def __init__(self) -> None:
        import cupy

        self.cp = cupy
        properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
        self.hardware = properties["name"].decode()
        self.flush = cupy.empty(4 * properties["l2CacheSize"] + (64 << 20), cupy.uint8)

    def microseconds(self, function: Function) -> float:
        """Median over repetitions; the last warm-up run has compiled everything."""
        cp, times = self.cp, []
        for _ in range(3):
            function()
        for _ in range(REPETITIONS):
            self.flush.fill(0)
            start, end = cp.cuda.Event(), cp.cuda.Event()
            start.record()
            function()
            end.record()
            end.synchronize()
            times.append(1e3 * cp.cuda.get_elapsed_time(start, end))
        return statistics.median(times)

    def inputs(self, case: Case) -> dict[str, Any]:
        rng = self.cp.random.default_rng(0)

        def make(*shape: int) -> Any:
            return (rng.standard_normal(shape, dtype="float32") + 1).astype(case.dtype)

        given = {"x": make(*case.shape), "dy": make(*case.shape)}
        return given | {"gamma": make(case.params), "beta": make(case.params)}

    def functions(self, case: Case, given: dict[str, Any]) -> dict[str, Function]:
        """What is timed, each returning arrays."""
        norm, options = getattr(nk, case.norm), case.options
        statistics_: dict[str, Any] = {}
        if case.norm in ("batch_norm", "batch_renorm"):
            spread = "running_std" if case.norm == "batch_renorm" else "running_var"
            mean, one = self.cp.zeros(case.params, "f4"), self.cp.ones(case.params, "f4")
            statistics_ = {"running_mean": mean, spread: one}
        args = given["x"], given["gamma"], given["beta"]
        _, pullback = nk.vjp(norm, *args, **options, **statistics_)
        found = {
            "forward": lambda: norm(*args, **options, **statistics_),
            "backward": lambda: pullback(given["dy"]),
        }
        if statistics_:
            frozen = {**options, **statistics_, "training": False}
            found["inference"] = lambda: norm(*args, **frozen)
        return found

    def error(self, case: Case, given: dict[str, Any]) -> dict[str, float]:
        """Largest error against the reference backend, relative to the largest value."""
        norm, options = getattr(nk, case.norm), case.options
        results = []
        for backend in ("cuda", "reference"):
            extra = {}
            if case.norm == "batch_renorm":
                extra["running_mean"] = self.cp.zeros(case.params, "f4")
                extra["running_std"] = self.cp.ones(case.params, "f4")
            with nk.use_backend(backend):
                args = given["x"], given["gamma"], given["beta"]
                y, pullback = nk.vjp(norm, *args, **options, **extra)
                results.append((y, *pullback(given["dy"])))
        found = {}
        for name, got, want in zip(("y", "dx", "dgamma", "dbeta"), *results, strict=True):
            got, want = got.astype("f8"), want.astype("f8")
            found[name] = float(abs(got - want).max() / abs(want).max())
        return found

    def peers(self, case: Case, given: dict[str, Any]) -> Iterator[tuple[str, dict[str, Function]]]:
        try:
            import torch
        except ImportError:
            return
        functional = torch.nn.functional
        move = {name: torch.from_dlpack(a) for name, a in given.items()}
        x, dy = move["x"], move["dy"]
        if case.last:
            x, dy = x.permute(0, 3, 1, 2), dy.permute(0, 3, 1, 2)
        weight, bias = move["gamma"], move["beta"]
        eager = {
            "layer_norm": lambda a, w, b: functional.layer_norm(a, a.shape[-1:], w, b),
            "rms_norm": lambda a, w, b: functional.rms_norm(a, a.shape[-1:], w),
            "batch_norm": lambda a, w, b: functional.batch_norm(a, None, None, w, b, True),
            "instance_norm": lambda a, w, b: functional.instance_norm(a, weight=w, bias=b),
            "group_norm": lambda a, w, b: functional.group_norm(a, 32, w, b),
        }.get(case.norm)
        if eager is None:
            return
        for name, function in (("torch", eager), ("torch.compile", torch.compile(eager))):
            leaves = [a.detach().requires_grad_() for a in (x, weight, bias)]
            used = leaves[:2] if case.norm == "rms_norm" else leaves
            y = function(*leaves)

            def backward(y: Any = y, used: Any = used) -> Any:
                return torch.autograd.grad(y, used, dy, retain_graph=True)

            with torch.no_grad():
                yield name, {"forward": lambda f=function: f(x, weight, bias), "backward": backward}

    def rows(self, case: Case) -> Iterator[dict[str, Any]]:
        given = self.inputs(case)
        target = self.cp.empty_like(given["x"])
        copied = self.microseconds(lambda: self.cp.copyto(target, given["x"]))
        per_byte = copied / (2 * case.bytes)
        error = self.error(case, given)
        ours = [("normkit", self.functions(case, given))]
        for who, functions in chain(ours, self.peers(case, given)):  # peers may fail: ours first
            for direction, function in functions.items():
                taken = self.microseconds(function)
                least = (3 if direction == "backward" else 2) * case.bytes * per_byte
                row = {"case": case.name, "who": who, "direction": direction, "us": taken}
                yield row | {
                    "of copy": least / taken,
                    "error": error if who == "normkit" else None,
                }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plan", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("gpu"))
    options = parser.parse_args()
    if options.plan:
        print("\n".join(map(plan, cases())))
        return
    began, rows, skipped = time.monotonic(), [], []
    tests = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests"]
    passed = subprocess.run(tests, check=False).returncode == 0
    bench = Bench()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for case in cases():
        if time.monotonic() - began > 60 * MINUTES:
            skipped.append(f"{case.name}: no time left")
            continue
        try:
            for row in bench.rows(case):
                rows.append(row)
                print(json.dumps(row), flush=True)
        except Exception as error:  # the next case may do better; this one is reported
            skipped.append(f"{case.name}: {type(error).__name__}: {error}")
        bench.cp.get_default_memory_pool().free_all_blocks()
        result = {"hardware": bench.hardware, "tests passed": passed, "rows": rows}
        options.out.with_suffix(".json").write_text(json.dumps(result | {"skipped": skipped}))
        options.out.with_suffix(".md").write_text(markdown(bench.hardware, rows, skipped))
    print("\n".join(["skipped:", *skipped] if skipped else ["nothing skipped"]))


def markdown(hardware: str, rows: list[dict[str, Any]], skipped: list[str]) -> str:
    lines = [f"{hardware}: share of a copy's bandwidth on the least bytes", ""]
    lines += ["| case | direction | who | µs | % of copy |", "|---|---|---|---|---|"]
    for row in rows:
        share = f"{100 * row['of copy']:.0f}"
        cells = row["case"], row["direction"], row["who"], f"{row['us']:.1f}", share
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"Skipped: {line}" for line in skipped)]) + "\n"


if __name__ == "__main__":
    main()
