"""Whether to use several threads, and how not to come to grief with them.

Numba's "workqueue" layer aborts the process when two threads enter it at once, and a child forked
after OpenMP's pool was started is killed when it uses it. Both are met by doing without: only one
thread at a time spreads its work, and a forked child never does. The bits do not depend on it.
"""

from __future__ import annotations

import os
import threading
from typing import Any

import numba

#: elements of work from which on threads pay, by threading layer: a region costs about 2 us under
#: OpenMP and TBB, 85 us under workqueue
_PAYS = {"omp": 1 << 16, "tbb": 1 << 16, "workqueue": 1 << 20}


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

    def threads(self, elements: int) -> int:
        """How many threads to share work on so many elements."""
        if elements < self._pays or self._lost:
            return 1
        return int(numba.get_num_threads())

    def run(self, kernel: Any, call: tuple[Any, ...], tasks: int, threads: int) -> None:
        """Run all tasks of a compiled kernel."""
        if threads > 1 and tasks > 1 and not self._lost and self._entered.acquire(blocking=False):
            try:
                kernel.share(kernel.address, call, tasks, threads)
                if not self._measured:
                    self._measured = True
                    self._pays = _PAYS[numba.threading_layer()]  # type: ignore[attr-defined]
            finally:
                self._entered.release()
        else:
            kernel.run(kernel.address, call, tasks)
