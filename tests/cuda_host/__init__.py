"""CUDA kernels on the host: the sources that NVRTC compiles for a GPU, compiled by g++.

`HostDevice` runs the launches that a CuPy device runs in life. Each CUDA thread is a fiber, and
barriers, warp operations and the order of blocks and threads are the emulation's. So it notices
divergent barriers, deadlocks, misaligned vectors, signed overflow, and results that depend on an
order. With ``check=True`` it watches every access: bounds, reads of what was never written, data
races, writes through const. A mistake is a `KernelFault`.

It proves nothing about the memory model beyond the rules in checker.cpp, about occupancy and
forward progress on a GPU, bank conflicts, speed, inline PTX, or what ptxas makes of the code. It is
stricter than a GPU in places: no thread may return before a barrier or while a warp operation names
it, and blocks may not write the same value to one place.
"""

from .build import unavailable
from .device import HostDevice, KernelFault, Launch

__all__ = ["HostDevice", "KernelFault", "Launch", "unavailable"]
