"""Whether to use several threads, and how not to come to grief with them.

Numba's "workqueue" layer aborts the process when two threads enter it at once, and a child forked
after OpenMP's pool was started is killed when it uses it. Both are met by doing without: only one
thread at a time spreads its work, and a forked child never does. The bits do not depend on it.

GCC's OpenMP has threads that wait for more work spin for 7 ms and longer. NumPy's matrix products
have threads of their own, as many as there are processors: then two threads take turns on each, a
scheduler's turn being milliseconds, and both libraries become slower by up to 100 times. So threads
are to sleep soon, and to be woken only by work that is worth it. They spin on where somebody else
has loaded the same OpenMP before, and sleep soon for whoever uses it later.
"""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from time import perf_counter
from typing import Any

import numba
import numpy as np

#: elements of work from which on threads pay, by threading layer: a region costs about 2 us under
#: OpenMP and TBB, 85 us under workqueue
_PAYS = {"omp": 1 << 15, "tbb": 1 << 15, "workqueue": 1 << 20}
_SPINS = "4000"  #: turns, of some 20 ns, in which GCC's OpenMP waits before a thread sleeps
_AWAKE = 60e-6  #: seconds after a call in which its threads have not yet gone to sleep
_WAKES = 1 << 19  #: elements of work that are worth waking them, which takes 30 to 100 us
_BUSY = 8  #: calls that follow each other, more than any norm makes, after which more are expected

_starting = threading.Lock()
failure: list[BaseException | None] = [None]  #: the last of what a kernel called and cannot raise


@cache
def start_threads() -> str:
    """Start Numba's threads; their threading layer."""
    spins = "GOMP_SPINCOUNT"
    with _starting:
        free = {spins, "OMP_WAIT_POLICY"}.isdisjoint(os.environ)
        if free:  # nobody else has a say: OpenMP reads it while it is loaded, and never again
            os.environ[spins] = _SPINS
        try:
            numba.get_num_threads()
        finally:
            if free:
                del os.environ[spins]
    return str(numba.threading_layer())  # type: ignore[attr-defined]


def count_threads() -> int:
    """Numba's threads, which are started if need be; 0.7 us to ask."""
    start_threads()
    return int(numba.get_num_threads())


class Pool:
    """Numba's threads, entered by one Python thread at a time."""

    def __init__(self) -> None:
        self._entered = threading.Lock()
        self._lost = False
        self._pays = _PAYS["omp"]
        self._ended, self._close = 0.0, 0  # the last call's end; calls before that were close
        os.register_at_fork(after_in_child=self._forked)

    def _forked(self) -> None:
        self._lost = True  # even to ask Numba for its threads starts them: who knows who did
        self._entered = threading.Lock()

    def _may_share(self, elements: int) -> bool:
        """Whether to share work on so many elements, if threads are awake."""
        many: bool = numba.config.NUMBA_NUM_THREADS > 1  # type: ignore[attr-defined]
        return elements >= self._pays and many and not self._lost

    def threads(self, elements: int) -> int:
        """How many threads share work on so many elements, if they are awake."""
        return count_threads() if self._may_share(elements) else 1

    def run(self, kernel: Any, call: tuple[Any, ...], tasks: int, elements: int) -> None:
        """Run all tasks of a compiled kernel, which work on so many elements."""
        before = failure[0]
        if tasks == 1 or not self._may_share(elements):
            kernel.run(kernel.address, call, tasks)
        else:
            self._share(kernel, call, tasks, elements)
        if failure[0] is not before:  # this call's, or that of one beside it, which fails as well
            raise failure[0]  # type: ignore[misc]

    def _share(self, kernel: Any, call: tuple[Any, ...], tasks: int, elements: int) -> None:
        """The same on several threads, if that pays."""
        self._close = self._close + 1 if perf_counter() - self._ended < _AWAKE else 0
        pays = self._close >= _BUSY or elements >= _WAKES
        if pays and self._entered.acquire(blocking=False):
            try:
                self._pays = _PAYS[start_threads()]
                kernel.share(kernel.address, call, tasks)
            finally:
                self._entered.release()
        else:
            kernel.run(kernel.address, call, tasks)
        self._ended = perf_counter()

    def about(self) -> dict[str, str]:
        """Numba's threading layer and its threads."""
        if self._lost:
            return {"threads": "1 (a forked child has no others)"}
        return {"threading layer": start_threads(), "threads": str(count_threads())}

    def copy_seconds(self, size: int) -> float:
        """How long NumPy needs, on one thread or on all, for a copy that moves so many bytes."""
        a, b = np.ones(max(1, size // 16)), np.ones(max(1, size // 16))
        threads = 1 if self._lost else count_threads()
        shares = list(zip(np.array_split(b, threads), np.array_split(a, threads), strict=True))
        alone, together = [], []
        with ThreadPoolExecutor(threads) as pool:
            for _ in range(7):
                start = perf_counter()
                np.copyto(b, a)
                middle = perf_counter()
                wait([pool.submit(np.copyto, *share) for share in shares])
                alone.append(middle - start)
                together.append(perf_counter() - middle)
        return min(alone + together)
