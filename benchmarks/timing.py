"""How a row is timed: everyone checked first, then in turns, in one process."""

from __future__ import annotations

import ctypes
import gc
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Collection, Sequence
from functools import cache
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from benchmarks.cases import Array, Case, function, inputs, reference
from benchmarks.peers import Contestant, Make, Unsupported, plain

Run = Callable[[], Any]
Row = dict[str, Any]  #: one row of the results, as JSON has it
Times = dict[str, list[float]]  #: everyone's samples, a round each, in microseconds

#: largest error over largest value that a contestant may have
TOLERANCE = {"float64": 1e-10, "float32": 1e-4, "float16": 1e-2, "bfloat16": 8e-2}
FEW, LONG = 3, 2e5  #: samples a pass that are enough of calls of so many microseconds
OURS = "normkit"
OUT = "normkit, out="


class Device(Protocol):
    """Where a row is timed."""

    name: str
    xp: Any  #: the array library of its inputs

    def microseconds(self, run: Run) -> float:
        """One sample: how long a call takes."""

    def copies(self, size: int) -> dict[str, Run]:
        """Copies that move `size` bytes, half of them read and half written."""

    def release(self) -> None:
        """Give back memory kept from a row that is done."""

    def machine(self) -> dict[str, Any]:
        """What the figures depend on."""


def _trim() -> None:
    """Have glibc return what is free: it keeps gigabytes of every row, and their places."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


@cache
def _shared_copy() -> Callable[[Array, Array], None]:
    """Copy by all of Numba's threads."""
    import numba

    from normkit.backends.numba.threads import count_threads

    tasks = count_threads()

    @numba.njit(parallel=True)
    def copy(target: Array, source: Array) -> None:
        n = source.size
        for i in numba.prange(tasks):
            low, high = n * i // tasks, n * (i + 1) // tasks
            target[low:high] = source[low:high]

    return copy


class Cpu:
    """This machine's processor, on as many threads as OMP_NUM_THREADS says, for everyone."""

    name, xp = "cpu", np
    #: seconds until the threads of the contestant before have stopped spinning for more work, each
    #: OpenMP runtime in the process having threads of its own
    settle = 0.03
    #: seconds to run untimed, until its own threads are awake and spread over the processors
    wake = 0.01
    measure = 0.02  #: seconds of calls whose median is a sample
    batch = 1e-4  #: seconds of calls that are timed together, so that reading the clock is nothing

    def microseconds(self, run: Run) -> float:
        time.sleep(self.settle)
        begin, calls = time.perf_counter(), 0
        while (waking := time.perf_counter() - begin) < self.wake or not calls:
            run()
            calls += 1
        loops = max(1, int(self.batch * calls / waking))
        taken: list[float] = []
        gc.disable()
        end = time.perf_counter() + self.measure
        while not taken or time.perf_counter() < end:
            begin = time.perf_counter()
            for _ in repeat(None, loops):
                run()
            taken.append(time.perf_counter() - begin)
        gc.enable()
        return statistics.median(taken) / loops * 1e6

    def copies(self, size: int) -> dict[str, Run]:
        source = np.full(size // 2, 1, np.uint8)  # zeros would all be one page
        target, copy = np.ones_like(source), _shared_copy()
        return {
            "copy, 1 thread": lambda: np.copyto(target, source),
            "copy": lambda: copy(target, source),
        }

    def release(self) -> None:
        gc.collect()
        _trim()

    def machine(self) -> dict[str, Any]:
        info = Path("/proc/cpuinfo")
        lines = info.read_text().splitlines() if info.exists() else []
        models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        return {
            "hardware": models[0] if models else platform.processor(),
            "threads": int(os.environ["OMP_NUM_THREADS"]),
            "cores": os.cpu_count(),
            "load at start": round(os.getloadavg()[0], 2),  # of others: 0 is a quiet machine
            "allocator": "tuned" if os.environ.get("GLIBC_TUNABLES") else "default",
        }


class Checked(NamedTuple):
    """Who can do a case, each with its error, and why the others cannot."""

    runs: dict[str, Run]
    errors: dict[str, float]
    absent: dict[str, str]


class Pass(NamedTuple):
    """What one pass found of a case."""

    times: Times
    errors: dict[str, float]
    absent: dict[str, str]


def check(case: Case, given: dict[str, Array], peers: dict[str, Make]) -> Checked:
    """The first call of normkit and its peers, whose results are held against the reference's."""
    exact = reference(case, given)
    ours: dict[str, Make] = {OURS: _normkit}
    if case.direction != "backward":  # which has no out=
        ours[OUT] = _normkit_out
    found = Checked({}, {}, {})
    for who, make in (ours | peers).items():
        try:
            contestant = make(case, given)
            error = _error(contestant, exact)
        except Unsupported as reason:
            found.absent[who] = str(reason)
        except Exception as failure:  # a peer's, reported; the next one may do better
            if who in ours:
                raise
            found.absent[who] = f"{type(failure).__name__}: {failure}".splitlines()[0][:200]
        else:
            found.errors[who] = float(f"{error:.2g}")
            if error < TOLERANCE[case.dtype]:
                found.runs[who] = contestant.run
            else:
                found.absent[who] = f"wrong by {error:.1e}"
    if wrong := set(ours) - set(found.runs):
        raise AssertionError(f"{wrong} is {found.absent}")
    return found


def time_row(case: Case, device: Device, peers: dict[str, Make], rounds: int) -> Pass:
    """Samples and error of all who can do the case."""
    checked = check(case, inputs(case, device.xp), peers)
    times = in_turns(checked.runs | device.copies(case.bytes), device, rounds)
    return Pass(times, checked.errors, checked.absent)


def row_of(case: Case, peers: Collection[str], passes: Sequence[Pass]) -> Row:
    """Microseconds, spread and error of all who were timed, and the peers' times over normkit's."""
    times = pooled([one.times for one in passes])
    beside = pooled(
        [{who: ratios(one.times, who) for who in peers if who in one.times} for one in passes]
    )
    errors = pooled([{who: [error] for who, error in one.errors.items()} for one in passes])
    absent = {who: why for one in passes for who, why in one.absent.items() if who not in times}
    return {
        "case": case.name,
        "where": case.where,
        **{key: getattr(case, key) for key in ("norm", "direction", "dtype", "layout", "shape")},
        "elements": case.elements,
        "bytes": case.bytes,
        "us": {who: round(statistics.median(samples), 3) for who, samples in times.items()},
        "spread": {who: round(spread(samples), 4) for who, samples in times.items()},
        "ratio": {who: round(statistics.median(found), 4) for who, found in beside.items()},
        "ratio spread": {who: round(spread(found), 4) for who, found in beside.items()},
        "error": {who: max(found) for who, found in errors.items()},
        "absent": absent,
    }


def in_turns(runs: dict[str, Run], device: Device, rounds: int) -> Times:
    """Samples of everyone, round by round; of who takes long, a few are enough."""
    times: Times = {who: [] for who in runs}
    forth = list(runs.items())
    for turn in range(rounds):
        for who, run in reversed(forth) if turn % 2 else forth:  # nobody always after another
            if len(times[who]) < FEW or min(times[who]) < LONG:
                times[who].append(device.microseconds(run))
    return times


def pooled(passes: Sequence[Times]) -> Times:
    """Everyone's numbers of all passes."""
    everyone = dict.fromkeys(who for one in passes for who in one)
    return {who: [sample for one in passes for sample in one.get(who, ())] for who in everyone}


def ratios(times: Times, who: str) -> list[float]:
    """Someone's time over normkit's in each round: a machine that slows down slows down both."""
    return [theirs / ours for theirs, ours in zip(times[who], times[OURS], strict=False)]


def spread(samples: list[float]) -> float:
    """Half of the median's 95 % confidence interval, over the median: its ±.

    The interval is between two samples, as many from the least as from the greatest; fewer than six
    do not tell so much, and it is all between them.
    """
    ordered, beyond, skipped = sorted(samples), 0.0, -1
    while 2 * beyond <= 0.05:  # the share of medians that are not within
        skipped += 1
        beyond += math.comb(len(samples), skipped) / 2 ** len(samples)
    low, high = ordered[max(0, skipped - 1)], ordered[-max(1, skipped)]
    return (high - low) / 2 / statistics.median(samples)


def _normkit(case: Case, given: dict[str, Array]) -> Contestant:
    return Contestant(function(case, given), plain)


def _normkit_out(case: Case, given: dict[str, Array]) -> Contestant:
    y = given["x"].copy(order="K")  # its pages are there
    return Contestant(function(case, given, out=y), plain)


def _error(contestant: Contestant, exact: tuple[Array, ...]) -> float:
    """Largest error over largest value, of the worst part of a result."""
    found = 0.0
    for got, want in zip(contestant.arrays(contestant.run()), exact, strict=True):
        if got.shape != want.shape:
            raise ValueError(f"result of shape {got.shape}, not {want.shape}")
        error = float(abs(got.astype("float64") - want).max() / abs(want).max())
        found = max(found, math.inf if math.isnan(error) else error)
    return found
