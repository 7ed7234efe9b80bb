"""Whether to use several threads, and how not to come to grief with them.

Numba's "workqueue" layer aborts the process when two threads enter it at once, and a child forked
after OpenMP's pool was started is killed when it uses it. Both are met by doing without: only one
thread at a time spreads its work, and a forked child never does. The bits do not depend on it.
"""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from time import perf_counter
from typing import Any

import numba
import numpy as np

#: elements of work from which on threads pay, by threading layer: a region costs about 2 us under
#: OpenMP and TBB, 85 us under workqueue
_PAYS = {"omp": 1 << 15, "tbb": 1 << 15, "workqueue": 1 << 20}


class Pool:
    """Numba's threads, entered by one Python thread at a time."""

    def __init__(self) -> None:
        self._entered = threading.Lock()
        self._measured = self._lost = False
        self._pays = _PAYS["omp"]
        os.register_at_fork(after_in_child=self._forked)

    def _forked(self) -> None:
        self._lost = True  # even to ask Numba for its threads starts them: who knows who did
        self._entered = threading.Lock()

    def _shares(self, elements: int) -> bool:
        """Whether to share work on so many elements."""
        many: bool = numba.config.NUMBA_NUM_THREADS > 1  # type: ignore[attr-defined]
        return elements >= self._pays and many and not self._lost

    def threads(self, elements: int) -> int:
        """How many threads share work on so many elements; 0.7 us to ask Numba."""
        return int(numba.get_num_threads()) if self._shares(elements) else 1

    def run(self, kernel: Any, call: tuple[Any, ...], tasks: int, elements: int) -> None:
        """Run all tasks of a compiled kernel, which work on so many elements."""
        if tasks > 1 and self._shares(elements) and self._entered.acquire(blocking=False):
            try:
                kernel.share(kernel.address, call, tasks)
                if not self._measured:
                    self._measured = True
                    self._pays = _PAYS[numba.threading_layer()]  # type: ignore[attr-defined]
            finally:
                self._entered.release()
        else:
            kernel.run(kernel.address, call, tasks)

    def about(self) -> dict[str, str]:
        """Numba's threading layer and its threads, which it starts if need be."""
        if self._lost:
            return {"threads": "1 (a forked child has no others)"}
        threads = numba.get_num_threads()
        layer = numba.threading_layer()  # type: ignore[attr-defined]
        return {"threading layer": layer, "threads": str(threads)}

    def copy_seconds(self, size: int) -> float:
        """How long NumPy needs, on one thread or on all, for a copy that moves so many bytes."""
        a, b = np.ones(max(1, size // 16)), np.ones(max(1, size // 16))
        threads = 1 if self._lost else numba.get_num_threads()
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
