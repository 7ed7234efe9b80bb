"""The same values in every memory layout that an array can have, on NumPy and CuPy alike."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Layout = Callable[[Any], Any]


def in_order(a: Any, order: Sequence[int]) -> Any:
    """Equal to `a`, with its axes in memory in the given order."""
    return a.transpose(order).copy().transpose(np.argsort(order))


def axis_to(source: int, destination: int) -> Layout:
    """A layout whose axis `source` lies in memory where axis `destination` did."""

    def lay_out(a: Any) -> Any:
        order = list(range(a.ndim))
        order.insert(min(destination, a.ndim - 1), order.pop(min(source, a.ndim - 1)))
        return in_order(a, order)

    return lay_out


def shuffled(a: Any) -> Any:
    return in_order(a, np.random.default_rng(a.size).permutation(a.ndim))


def backwards(a: Any) -> Any:
    return a[(slice(None, None, -1),) * a.ndim]


def within_nan(a: Any, start: int, step: int, end: int) -> Any:
    """A view into a larger array whose other elements are NaN."""
    whole = np.full_like(a, np.nan, shape=[start + step * n + end for n in a.shape])
    inside = whole[tuple(slice(start, start + step * n, step) for n in a.shape)]
    inside[...] = a
    return inside


def unaligned(a: np.ndarray) -> np.ndarray:
    b = np.empty(a.nbytes + 1, np.uint8)[1:].view(a.dtype).reshape(a.shape)
    b[...] = a
    return b


def byteswapped(a: np.ndarray) -> np.ndarray:
    return a if a.dtype.name == "bfloat16" else a.astype(a.dtype.newbyteorder())


def read_only(a: np.ndarray) -> np.ndarray:
    b = a.copy()
    b.flags.writeable = False
    return b


ANY_DEVICE: dict[str, Layout] = {
    "C": lambda a: a.copy(order="C"),
    "Fortran": lambda a: a.copy(order="F"),
    "channels last": axis_to(1, 9),
    "channels first": axis_to(1, 0),
    "batch last": axis_to(0, 9),
    "shuffled axes": shuffled,
    "reversed": lambda a: backwards(backwards(a).copy()),
    "every second": lambda a: within_nan(a, 1, 2, 0),
    "cropped": lambda a: within_nan(a, 1, 1, 2),
}
HOST_ONLY: dict[str, Layout] = {
    "unaligned": unaligned,
    "byte-swapped": byteswapped,
    "read-only": read_only,
}


def layouts(xp: Any) -> dict[str, Layout]:
    """Name -> layout, for the arrays of `xp`."""
    return ANY_DEVICE | HOST_ONLY if xp is np else ANY_DEVICE
