"""Kernels from their source: compiled when first launched, once a process and device."""

from __future__ import annotations

import threading
from functools import cache
from typing import Any

import cupy

from normkit.backends.cuda.planner import OPTIONS

_LOCK = threading.RLock()


class KernelError(RuntimeError):
    """A kernel that cannot be compiled or loaded."""


@cache
def _function(source: str, kernel: str, cooperative: bool, shared: int, device: int) -> Any:
    with _LOCK:  # CuPy keeps compiled kernels on disk as well, by their source and options
        try:
            module = cupy.RawModule(
                code=source,
                options=OPTIONS,
                name_expressions=[kernel],
                enable_cooperative_groups=cooperative,
            )
            function = module.get_function(kernel)
            if shared > 48 << 10:
                function.max_dynamic_shared_size_bytes = shared
        except Exception as error:
            arch = cupy.cuda.Device(device).compute_capability
            raise KernelError(
                f"the CUDA kernel {kernel} cannot be used on device {device} (sm_{arch}, "
                f"CuPy {cupy.__version__}): {error}"
            ) from error
        return function


def function(source: str, kernel: str, cooperative: bool, shared: int) -> Any:
    """The compiled kernel, on the current device."""
    device = cupy.cuda.runtime.getDevice()
    return _function(source, kernel, cooperative, shared, device)
