"""Threads and processes under the threading layer that the environment names; see test_threads.py.

Every check prints one line, "name: result", as it is done.
"""

import hashlib
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes  # makes np.dtype("bfloat16") known
import numba
import numpy as np

import normkit as nk

assert ml_dtypes
LIMIT = 60  # seconds that a child may take
SHAPES = {
    "tiny": [(4, 8), (2, 4, 3, 3)],
    "large": [
        (1031, 1024),
        (16, 66, 33, 33),
        (33_000, 33),
        (131_101, 8),
    ],  # workqueue pays from 2**20 elements on
    "long": [(4, 300_001), (1, 2, 600_011)],
}


def results(kinds: tuple[str, ...], dtypes: tuple[str, ...] = ("float32",)) -> list[bytes]:
    """The bits that every norm gives, forward and backward."""
    bits = []
    for kind in kinds:
        for shape in SHAPES[kind]:
            channels, ndim = shape[1], len(shape)
            for dtype in dtypes:
                rng = np.random.default_rng(0)
                values = rng.standard_normal(shape, "float32").astype(dtype)
                last = np.moveaxis(np.moveaxis(values, 1, -1).copy(), -1, 1)
                for x in (values, last) if ndim > 2 else (values,):
                    dy = x[::-1] * x
                    for norm, options in calls(channels, ndim):
                        size = channels if "axis" not in options else shape[-1]
                        gamma = np.linspace(0.5, 2, size).astype(dtype)
                        y, pullback = nk.vjp(norm, x, gamma, gamma[::-1], **options)
                        arrays = [y, *pullback(dy)]
                        arrays += [v for k, v in options.items() if k.startswith("running")]
                        bits += [a.tobytes() for a in arrays]
    return bits


def calls(channels: int, ndim: int) -> list[tuple[Callable[..., Any], dict[str, Any]]]:
    def statistics(spread: str) -> dict[str, Any]:
        return {"running_mean": np.zeros(channels), spread: np.ones(channels)}

    found: list[tuple[Callable[..., Any], dict[str, Any]]] = [
        (nk.batch_norm, statistics("running_var")),
        (nk.batch_norm, {"training": False, **statistics("running_var")}),
        (nk.batch_renorm, statistics("running_std")),
        (nk.layer_norm, {"axis": -1}),
        (nk.rms_norm, {"axis": -1}),
        (nk.group_norm, {"num_groups": 1 + (channels % 2 == 0)}),
    ]
    return found + [(nk.instance_norm, statistics("running_var"))] * (ndim > 2)


def digest(*args: Any) -> str:
    return hashlib.sha256(b"".join(results(*args))).hexdigest()


# What children do: 0 is the exit status of a right result


def child(expected: str, *args: Any) -> None:
    sys.exit(digest(*args) != expected)


def outcome(processes: list[Any]) -> str:
    for process in processes:
        process.start()
    codes = []
    for process in processes:
        process.join(LIMIT)
        codes.append(process.exitcode)
        if process.is_alive():
            process.kill()
    meaning = {0: "right", None: "hangs", 1: "wrong or raised"}
    return ", ".join(sorted({meaning.get(code, f"killed ({code})") for code in codes}))


# Checks


def same_bits_for_any_number_of_threads() -> str:
    different = []
    for threads in (1, 2, 3):
        numba.set_num_threads(threads)
        together = results(("tiny", "large", "long"))
        together += results(("tiny", "large"), ("bfloat16", "float64"))
        together += results(("long",), ("float16", "bfloat16"))
        if threads == 1:
            alone = together
        different += [(threads, i) for i in range(len(alone)) if alone[i] != together[i]]
    numba.set_num_threads(numba.config.NUMBA_NUM_THREADS)
    return f"{len(different)} differ: {different[:5]}" if different else "right"


def unusual_rows_met_by_all_threads() -> str:
    """What a kernel leaves to another, which is not there yet; beside rows that it does itself."""
    different = []
    for size in (4, 64, 300):
        x = np.random.default_rng(size).standard_normal((2**21 // size, size), "float32")
        x[5::31], x[7::31, 0], x[9::310] = 3, np.nan, 1e30
        for gamma in (None, x[0].copy()):
            together = nk.layer_norm(x, gamma)
            alone = np.concatenate([nk.layer_norm(rows, gamma) for rows in np.split(x[:60], 15)])
            if together[:60].tobytes() != alone.tobytes():
                different.append(size)
    return f"{different} differ" if different else "right"


def the_layer_was_used() -> str:
    return "right" if numba.threading_layer() == LAYER else numba.threading_layer()


def eight_threads_at_once() -> str:
    start = threading.Barrier(8)

    def work(kinds: tuple[str, ...]) -> str:
        start.wait()
        return digest(kinds)

    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(work, [SMALL, LARGE] * 4))
    return "right" if got == [EXPECTED[SMALL], EXPECTED[LARGE]] * 4 else "wrong"


def fork_after_use() -> str:
    fork = multiprocessing.get_context("fork")
    return outcome([fork.Process(target=child, args=(EXPECTED[LARGE], LARGE)) for _ in range(3)])


def fork_inside_a_kernel() -> str:
    """Children are forked at arbitrary moments of another thread's parallel kernels."""
    fork = multiprocessing.get_context("fork")
    done = threading.Event()

    def keep_busy() -> None:
        x = np.ones((2048, 1024), "float32")
        while not done.is_set():
            y, pullback = nk.vjp(nk.layer_norm, x)
            pullback(y)

    busy = threading.Thread(target=keep_busy)
    busy.start()
    try:
        return outcome(
            [fork.Process(target=child, args=(EXPECTED[LARGE], LARGE)) for _ in range(4)]
        )
    finally:
        done.set()
        busy.join()


def the_parent_still_works() -> str:
    return "right" if digest(LARGE) == EXPECTED[LARGE] else "wrong"


def spawn() -> str:
    context = multiprocessing.get_context("spawn")
    return outcome([context.Process(target=child, args=(EXPECTED[LARGE], LARGE))])


CHECKS = [
    unusual_rows_met_by_all_threads,
    same_bits_for_any_number_of_threads,
    the_layer_was_used,
    eight_threads_at_once,
    fork_after_use,
    fork_inside_a_kernel,
    the_parent_still_works,
    spawn,
]
SMALL, LARGE = ("tiny",), ("tiny", "large")
LAYER = os.environ.get("NUMBA_THREADING_LAYER")

if __name__ == "__main__":
    numba.set_num_threads(1)
    EXPECTED = {kinds: digest(kinds) for kinds in (SMALL, LARGE)}
    numba.set_num_threads(numba.config.NUMBA_NUM_THREADS)
    for check in CHECKS:
        print(f"{check.__name__}: {check()}", flush=True)
