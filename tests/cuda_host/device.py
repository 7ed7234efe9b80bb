"""Run launches on the host."""

import ctypes as c
import math
import re
import subprocess
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import DTypeLike

from normkit.backends.cuda import planner
from normkit.backends.cuda.planner import Limits

from .build import kernel, runtime

ORDERS = ("ascending", "descending", "random")
SMALL = Limits(sms=4)
MESSAGE = 8192
ONE_AT_A_TIME = threading.Lock()  # the runtime's state is global


@dataclass(frozen=True)
class Launch:
    """A kernel of any source; `args` are arrays, NumPy scalars or None (a null pointer)."""

    source: str
    kernel: str  # C++ name expression
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int  # bytes of dynamic shared memory
    cooperative: bool
    args: tuple[Any, ...]


class KernelFault(Exception):
    """A mistake of a kernel: `kind` in two or three words, then which thread did what and where."""

    def __init__(self, kernel: str, kind: str, text: str) -> None:
        super().__init__(f"{kernel}: {kind}: {text}")
        self.kind = kind


class _Param(c.Structure):
    _fields_ = [
        ("pointer", c.c_bool),
        ("constant", c.c_bool),
        ("kind", c.c_char),
        ("size", c.c_int),
    ]


class _Kernel(c.Structure):
    _fields_ = [("call", c.c_void_p), ("count", c.c_int), ("params", c.POINTER(_Param))]


class _Range(c.Structure):
    _fields_ = [
        ("low", c.c_uint64),
        ("high", c.c_uint64),
        ("cell", c.c_uint32),
        ("writable", c.c_uint32),
        ("fresh", c.c_uint32),
        ("arg", c.c_int32),
    ]


class _Launch(c.Structure):
    _fields_ = [
        ("grid", c.c_uint32 * 3),
        ("block", c.c_uint32 * 3),
        *((n, c.c_uint32) for n in ("shared", "cooperative", "check", "order", "resident")),
        *((n, c.c_uint32) for n in ("ftz", "seconds", "ranges_count")),
        ("seed", c.c_uint64),
        ("kernel", c.c_void_p),
        ("args", c.POINTER(c.c_void_p)),
        ("ranges", c.POINTER(_Range)),
        ("message", c.c_char_p),
        ("message_size", c.c_uint32),
    ]


class HostDevice:
    """A CUDA device made of g++ and fibers.

    Parameters
    ----------
    check : whether to watch every access of memory (up to twice as slow)
    order : of blocks and threads between barriers; "random" also interrupts at atomics and fences
    seed : of the random order
    resident : how many blocks can be on the device at a time
    ftz : whether denormal numbers count as zero, as under the ``-ftz=true`` that CuPy always passes
        (float64 denormals too, other than on a GPU)
    seconds : of processor time, after which a launch has hung
    limits : what the planner reads
    """

    def __init__(
        self,
        check: bool = False,
        order: Literal["ascending", "descending", "random"] = "ascending",
        seed: int = 0,
        resident: int = 64,
        ftz: bool = True,
        seconds: int = 60,
        limits: Limits = SMALL,
    ) -> None:
        self.check, self.order, self.seed, self.resident = check, order, seed, resident
        self.ftz, self.seconds, self.limits = ftz, seconds, limits
        self.launched: list[str] = []  # names of kernels

    def empty(self, shape: int | Sequence[int], dtype: DTypeLike) -> np.ndarray:
        """NaNs at the end of readable memory, 16-byte aligned."""
        a = _allocate(shape, np.dtype(dtype))
        a.reshape(-1).view(np.uint8)[...] = 0xFF
        _fresh.add(a.ctypes.data)
        return a

    def zeros(self, shape: int | Sequence[int], dtype: DTypeLike) -> np.ndarray:
        """What a memset makes."""
        return self.array(np.zeros(shape, dtype))

    def array(self, a: Any, offset: int = 0) -> np.ndarray:
        """A copy with the same order of axes in memory, `offset` elements past alignment."""
        a = np.asarray(a)
        order = sorted(range(a.ndim), key=lambda i: -abs(a.strides[i]))
        inner = a.transpose(order)
        copy = _allocate(a.size + offset, a.dtype)[offset:].reshape(inner.shape)
        copy[...] = inner
        return copy.transpose(np.argsort(order))

    def address(self, a: np.ndarray) -> int:
        return a.ctypes.data

    null = None

    def current(self) -> int:
        return 0

    def elsewhere(self, a: np.ndarray) -> None:
        return None

    def bind(self, launch: planner.Launch) -> Callable[[tuple[Any, ...]], None]:
        def start(arrays: tuple[Any, ...]) -> None:
            block, args = (launch.threads, 1, 1), (*arrays, launch.values)
            name, grid, shared = launch.kernel, launch.grid, launch.shared
            together = launch.cooperative
            self.launch(Launch(planner.source(), name, grid, block, shared, together, args))

        return start

    def launch(self, launch: Launch) -> None:
        """Compile if need be, run to the end, raise KernelFault on a mistake."""
        library = kernel(launch.source, launch.kernel)
        entry = _Kernel.in_dll(library, "host_kernel")
        _check_launch(launch, entry)
        keep = [_argument(launch.kernel, i, a, entry.params[i]) for i, a in enumerate(launch.args)]
        ranges = _ranges(launch.args, entry)
        message = c.create_string_buffer(MESSAGE)
        record = _Launch(
            grid=launch.grid,
            block=launch.block,
            shared=launch.shared,
            cooperative=launch.cooperative,
            check=self.check,
            order=ORDERS.index(self.order),
            resident=self.resident,
            ftz=self.ftz,
            seconds=self.seconds,
            ranges_count=len(ranges),
            seed=self.seed,
            kernel=c.addressof(entry),
            args=(c.c_void_p * (len(keep) + 1))(*map(c.addressof, keep)),
            ranges=(_Range * (len(ranges) + 1))(*ranges),
            message=c.cast(message, c.c_char_p),
            message_size=MESSAGE,
        )
        with ONE_AT_A_TIME:
            library.host_shared()  # a thread's first access makes its thread-local variables
            failed = runtime().host_run(c.byref(record))
        self.launched.append(launch.kernel)
        if failed:
            kind, _, text = message.value.decode(errors="replace").partition("\n")
            raise KernelFault(launch.kernel, kind, re.sub(r"\[(\S+)\+(0x\w+)\]", _line, text))


_fresh: set[int] = set()  # addresses of arrays that nobody but a kernel has written


def _allocate(shape: int | Sequence[int], dtype: np.dtype) -> np.ndarray:
    count = int(np.prod(shape, dtype=np.int64))
    size = count * dtype.itemsize
    address = runtime().host_allocate(size)
    if address is None:
        raise MemoryError(f"{size} bytes")
    memory = (c.c_char * size).from_address(address)
    weakref.finalize(memory, _release, address, size).atexit = False
    return np.frombuffer(memory, dtype, count).reshape(shape)


def _release(address: int, size: int) -> None:
    _fresh.discard(address)
    runtime().host_free(address, size)


def _check_launch(launch: Launch, entry: _Kernel) -> None:
    name, grid, block, given = launch.kernel, launch.grid, launch.block, len(launch.args)
    if given != entry.count:
        raise TypeError(f"{name}: {given} arguments for {entry.count} parameters")
    if (
        min(grid + block) < 1
        or grid[0] >= 2**31
        or max(grid[1:]) > 65535
        or math.prod(block) > 1024
        or block[2] > 64
        or not 0 <= launch.shared <= 227 << 10
    ):
        shared = f"{launch.shared} bytes of shared memory"
        raise ValueError(f"{name}: no GPU runs grid {grid}, block {block}, {shared}")


def _argument(kernel: str, i: int, a: Any, p: _Param) -> Any:
    """The argument in memory, as cuLaunchKernel takes it."""
    if a is None and p.pointer:
        return c.c_void_p(None)
    if isinstance(a, np.ndarray) and p.pointer and _fits(a.dtype, p):
        return c.c_void_p(a.ctypes.data)
    if isinstance(a, np.generic) and not p.pointer and _fits(a.dtype, p):
        return c.create_string_buffer(a.tobytes(), max(8, a.nbytes))
    wanted = f"{'a pointer to ' if p.pointer else ''}{p.kind.decode()}{p.size}"
    given = f"an array of {a.dtype}" if isinstance(a, np.ndarray) else repr(a)
    raise TypeError(f"{kernel}: argument {i} is {given}, the kernel takes {wanted}")


def _fits(dtype: np.dtype, p: _Param) -> bool:
    kinds = {"f": "f", "i": "i", "u": "u", "b": "b", "w": "ufV", "s": "biufV", "v": "biufV"}
    kind = p.kind.decode()
    size = kind == "v" or dtype.itemsize == p.size
    return size and dtype.isnative and dtype.kind in kinds[kind]


def _ranges(args: tuple[Any, ...], entry: _Kernel) -> list[_Range]:
    """The memory of the arguments; those that overlap count as one, writable if any is."""
    found = []
    for i, a in enumerate(args):
        if isinstance(a, np.ndarray) and a.size:
            low, high = np.lib.array_utils.byte_bounds(a)
            cell, writable = min(a.itemsize, 4), not entry.params[i].constant
            found.append(_Range(low, high, cell, writable, a.ctypes.data in _fresh, i))
    merged: list[_Range] = []
    for r in sorted(found, key=lambda r: r.low):
        if merged and r.low < merged[-1].high:
            last = merged[-1]
            last.high, last.cell = max(last.high, r.high), min(last.cell, r.cell)
            last.writable, last.fresh = last.writable or r.writable, last.fresh and r.fresh
        else:
            merged.append(r)
    return merged


def _line(address: re.Match[str]) -> str:
    """file:line of an address: in the kernel, if an intrinsic is inlined there."""
    command = ["addr2line", "-i", "-e", *address.groups()]
    frames = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    lines = [frame.split(" (")[0].rpartition("/")[2] for frame in frames]
    return next((line for line in lines if not line.startswith("cuda.h:")), address.group())
