"""CuPy's own arrays in the host's memory: all of a call's path but the driver, with no GPU.

CuPy makes views, looks at strides and calls its allocator, which is ours; our kernels run on the
emulation. What needs a kernel of CuPy's (a copy, a cast) or the driver (a synchronisation) fails.
"""

import ctypes
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import cupy
import numpy as np
from cuda_host import HostDevice, Launch

from normkit.backends.cuda import Cuda, planner
from normkit.backends.cuda import device as cuda_device
from normkit.dispatch import use_backend

LIMITS = planner.Limits(sms=2)


class Machine:
    """A few devices, whose kernels one emulation runs."""

    def __init__(self, host: HostDevice) -> None:
        self.host, self.current = host, 0
        self.launched: list[tuple[int, str]] = []  # on which device, what
        self.left = 1 << 30  # allocations, until memory runs out

    def allocate(self, size: int) -> Any:
        if self.left == 0:
            raise cupy.cuda.memory.OutOfMemoryError(size, 0)
        self.left -= 1
        memory = self.host.empty(max(1, size), np.uint8)
        address = memory.ctypes.data
        chunk = cupy.cuda.UnownedMemory(address, size, memory, self.current)
        return cupy.cuda.MemoryPointer(chunk, 0)

    def array(self, a: np.ndarray) -> Any:
        """A C-ordered copy on the current device."""
        copy = cupy.empty(a.shape, a.dtype)
        self.host_view(copy)[...] = a
        return copy

    @staticmethod
    def host_view(a: Any) -> np.ndarray:
        """The same memory, as NumPy sees it."""
        assert min(a.strides, default=0) >= 0
        size = sum(s * (n - 1) for s, n in zip(a.strides, a.shape, strict=True)) + a.itemsize
        memory = (ctypes.c_char * (size if a.size else 0)).from_address(a.data.ptr)
        weakref.finalize(memory, lambda *_: None, a)  # which it belongs to
        return np.ndarray(a.shape, a.dtype, memory, strides=a.strides)

    def zeros(self, shape: Any, dtype: Any) -> Any:
        return self.array(np.zeros(shape, dtype))

    def function(self, kernel: str, shared: int, device: int) -> Callable[..., None]:
        def run(
            grid: Any,
            block: Any,
            args: tuple[Any, ...],
            shared: int,
            enable_cooperative_groups: bool = False,
        ) -> None:
            assert device == self.current
            *arrays, values = args
            on_host = [None if a is None else self.host_view(a) for a in arrays]
            on_host.append(values[()])
            self.launched.append((self.current, kernel))
            source = planner.source()
            together = enable_cooperative_groups
            self.host.launch(Launch(source, kernel, grid, block, shared, together, tuple(on_host)))

        return run

    @contextmanager
    def device(self, number: int) -> Iterator[None]:
        """As ``cupy.cuda.Device(number)``."""
        before, self.current = self.current, number
        yield
        self.current = before


class OnHost(Cuda):
    """The CUDA backend; NumPy arrays it only looks at, for what a call would be."""

    arrays = ("cupy", "numpy")


@contextmanager
def cupy_on_host(limits: planner.Limits = LIMITS, **options: Any) -> Iterator[Machine]:
    """A machine that CuPy arrays live on and normkit serves."""
    machine = Machine(HostDevice(**options))

    def current() -> int:
        return machine.current

    with (
        mock.patch.object(cuda_device, "_current", current),
        mock.patch.object(cuda_device, "_value", np.asarray),
        mock.patch.object(cuda_device, "_limits", return_value=limits),
        mock.patch.object(cuda_device, "function", machine.function),
        mock.patch.object(cuda_device.CuPyDevice, "current", staticmethod(current)),
        mock.patch.object(cuda_device.CuPyDevice, "null", None),
        mock.patch.object(cuda_device.CuPyDevice, "zeros", machine.zeros),
        mock.patch.object(cupy.cuda, "Device", machine.device),
        mock.patch.object(cupy.cuda.runtime, "getDeviceCount", return_value=2),
        cupy.cuda.using_allocator(machine.allocate),
        use_backend(OnHost(cuda_device.CuPyDevice())),
    ):
        yield machine
