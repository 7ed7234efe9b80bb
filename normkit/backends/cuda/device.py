"""Launches on a GPU by way of CuPy: its memory pool, its current device and stream."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import cache, partial
from operator import attrgetter
from typing import Any

import cupy
import numpy as np

from normkit.backends.cuda import Cuda
from normkit.backends.cuda.compiler import function
from normkit.backends.cuda.planner import Launch, Limits, needed

OLDEST = 13, 4  # the first CuPy that is tested
if tuple(map(int, cupy.__version__.split(".")[:2])) < OLDEST:
    raise ImportError(f"CuPy {cupy.__version__} is too old: {'.'.join(map(str, OLDEST))} is needed")

_COPIES = 10  # of which the mean time is taken
_current = cupy.cuda.runtime.getDevice


def _value(a: Any) -> Any:
    """A NumPy scalar as a kernel's argument, prepared: CuPy takes 7 us to look into a struct."""
    prepare = getattr(cupy.cuda.function, "CNumpyArray", np.asarray)
    return prepare(a)


@cache
def _limits(device: int) -> Limits:
    has = cupy.cuda.Device(device).attributes
    shared = has["MaxSharedMemoryPerMultiprocessor"]
    return Limits(has["MultiProcessorCount"], shared, os.environ.get("NORMKIT_CUDA_WAVES") == "1")


class CuPyDevice:
    """Whatever device is CuPy's current one. Nothing waits for the GPU."""

    null = _value(np.zeros(1, np.uint64))
    empty = cupy.ndarray  # what cupy.empty calls
    zeros = staticmethod(cupy.zeros)
    current = staticmethod(_current)
    address = staticmethod(attrgetter("data.ptr"))

    def __init__(self) -> None:
        try:
            cupy.cuda.runtime.getDeviceCount()
        except cupy.cuda.runtime.CUDARuntimeError as error:
            raise ImportError(f"no usable GPU or driver: {error}") from error

    @property
    def limits(self) -> Limits:
        return _limits(_current())

    def elsewhere(self, array: Any) -> AbstractContextManager[Any] | None:
        home = array.data.device_id
        return None if home == _current() else cupy.cuda.Device(home)

    def bind(self, launch: Launch) -> Callable[[tuple[Any, ...]], None]:
        run = function(launch.kernel, launch.shared, _current())
        grid, block, shared = launch.grid, (launch.threads, 1, 1), launch.shared
        last = (_value(launch.values),)
        options = {"enable_cooperative_groups": True} if launch.cooperative else {}

        def start(arrays: tuple[Any, ...]) -> None:
            run(grid, block, arrays + last, shared, **options)

        return start


class CuPyCuda(Cuda):
    """The backend on a GPU, and what can be asked of one."""

    def __init__(self) -> None:
        super().__init__(CuPyDevice())

    def about(self) -> dict[str, str]:
        device = cupy.cuda.Device()
        name = cupy.cuda.runtime.getDeviceProperties(device.id)["name"].decode()
        return {
            "version": cupy.__version__,
            "device": f"{name} (sm_{device.compute_capability})",
            "cache": os.environ.get("CUPY_CACHE_DIR", os.path.expanduser("~/.cupy/kernel_cache")),
        }

    def copy_seconds(self, size: int) -> float:
        a, b = (cupy.ones(max(1, size // 16)) for _ in range(2))
        start, end = cupy.cuda.Event(), cupy.cuda.Event()
        cupy.copyto(b, a)
        start.record()
        for _ in range(_COPIES):
            cupy.copyto(b, a)
        end.record()
        end.synchronize()
        return float(cupy.cuda.get_elapsed_time(start, end)) / 1000 / _COPIES

    def kernels(self, dtype: str) -> Iterator[tuple[str, Callable[[], object]]]:
        for kernel in needed(dtype):
            yield kernel, partial(function, kernel, 0, _current())
