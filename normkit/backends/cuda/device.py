"""Launches on a GPU by way of CuPy: its memory pool, its current stream, the array's device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import cupy
import numpy as np

from normkit.backends.cuda.compiler import function
from normkit.backends.cuda.planner import Launch, Limits

OLDEST = 13, 4  # the first CuPy that is tested
if tuple(map(int, cupy.__version__.split(".")[:2])) < OLDEST:
    raise ImportError(f"CuPy {cupy.__version__} is too old: {'.'.join(map(str, OLDEST))} is needed")

_NULL = np.uint64(0)  # of eight bytes, as kernels want a pointer
_HERE: AbstractContextManager[Any] = nullcontext()


@cache
def _limits(device: int) -> Limits:
    return Limits(sms=cupy.cuda.Device(device).attributes["MultiProcessorCount"])


class CuPyDevice:
    """Whatever device is CuPy's current one. Nothing waits for the GPU."""

    @property
    def limits(self) -> Limits:
        return _limits(cupy.cuda.runtime.getDevice())

    def empty(self, shape: int | tuple[int, ...], dtype: Any) -> Any:
        return cupy.empty(shape, dtype)

    def address(self, array: Any) -> int:
        return int(array.data.ptr)

    def on(self, array: Any) -> AbstractContextManager[Any]:
        device = array.device
        return _HERE if device.id == cupy.cuda.runtime.getDevice() else device

    def launch(self, launch: Launch) -> None:
        kernel = function(launch.source, launch.kernel, launch.cooperative, launch.shared)
        args = tuple(_NULL if a is None else a for a in launch.args)
        kernel(launch.grid, launch.block, args, shared_mem=launch.shared)
