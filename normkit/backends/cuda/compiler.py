"""Kernels from their source: compiled when first launched, once a process and device."""

from __future__ import annotations

import threading
from functools import cache
from typing import Any

import cupy

from normkit.backends.cuda.planner import OPTIONS, source

_LOCK = threading.RLock()


class KernelError(RuntimeError):
    """A kernel that cannot be compiled or loaded."""


@cache
def function(kernel: str, shared: int, device: int) -> Any:
    """The compiled kernel, on a device, which must be the current one."""
    with _LOCK:  # CuPy keeps compiled kernels on disk as well, by their source and options
        try:
            module = cupy.RawModule(code=source(), options=OPTIONS, name_expressions=[kernel])
            found = module.get_function(kernel)
            if shared > 48 << 10:
                found.max_dynamic_shared_size_bytes = shared
            return found.kernel  # what it looks up in each of its own calls
        except cupy.cuda.memory.OutOfMemoryError:
            raise
        except Exception as error:
            arch = cupy.cuda.Device(device).compute_capability
            raise KernelError(
                f"the CUDA kernel {kernel} cannot be used on device {device} (sm_{arch}, "
                f"CuPy {cupy.__version__}): {error}"
            ) from error
