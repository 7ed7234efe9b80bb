"""Arrays of third-party libraries, given the few NumPy methods that a call needs of an array.

All that is asked of such a library is the array API standard, arrays that can be written to, and
reshape and permute_dims that give views. The standard knows no strides, so its arrays are taken in
their logical order, as if they were C-contiguous.
"""

from __future__ import annotations

import operator
from functools import cache, partial
from math import prod
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np

from normkit.backends.base import Backend, Stats, Update


class Portable:
    """A third party's array (`own`) behind NumPy's methods.

    Like NumPy's arrays, those of one library and device have a class and a namespace; here they are
    the same object, a subclass that `wrap` makes.
    """

    __slots__ = ("own",)

    xp: ClassVar[Any]  #: the library's array API namespace
    home: ClassVar[Any]  #: the arrays' device
    flags = SimpleNamespace(c_contiguous=True, writeable=True)

    def __init__(self, own: Any) -> None:
        self.own = own

    # what an array is

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.own.shape)

    @property
    def ndim(self) -> int:
        return len(self.own.shape)

    @property
    def size(self) -> int:
        return prod(self.own.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    @property
    def strides(self) -> tuple[int, ...]:
        shape, step = self.shape, self.dtype.itemsize
        return tuple(step * prod(shape[axis + 1 :]) for axis in range(len(shape)))

    @property
    def dtype(self) -> np.dtype[Any]:
        name = getattr(self.own.dtype, "name", None) or str(self.own.dtype).rpartition(".")[2]
        if name == "bfloat16":
            import ml_dtypes  # noqa: F401  (makes it known to NumPy)
        return np.dtype(name)

    @property
    def base(self) -> Any:
        return self.own  # whose memory it is

    @property
    def device(self) -> Any:
        return self.own.device

    # what is done with it

    def reshape(self, *shape: Any) -> Portable:
        sizes = shape if isinstance(shape[0], int) else tuple(shape[0])
        return type(self)(self.xp.reshape(self.own, sizes))

    def ravel(self) -> Portable:
        return self.reshape(-1)

    def transpose(self, axes: Any) -> Portable:
        return type(self)(self.xp.permute_dims(self.own, tuple(map(int, axes))))

    def astype(self, dtype: Any, order: str = "K", copy: bool = True) -> Portable:
        if not copy and self.dtype == dtype:
            return self
        return type(self)(self.xp.astype(self.own, self.named(dtype)))

    def sum(self, axis: Any) -> Portable:
        return type(self)(self.xp.sum(self.own, axis=axis, dtype=self.own.dtype))

    def mean(self, axis: Any) -> Portable:
        return type(self)(self.xp.mean(self.own, axis=axis))

    def clip(self, low: float, high: float) -> Portable:
        return type(self)(self.xp.clip(self.own, low, high))

    def __setitem__(self, key: Any, value: Portable | float) -> None:
        if isinstance(value, Portable):
            value = value.astype(self.dtype, copy=False).own
        self.own[key] = value

    # what its library does

    @classmethod
    def named(cls, dtype: Any) -> Any:
        """The library's own dtype of that name."""
        return getattr(cls.xp, np.dtype(dtype).name)

    @classmethod
    def empty(cls, shape: Any, dtype: Any) -> Portable:
        return cls(cls.xp.empty(shape, dtype=cls.named(dtype), device=cls.home))

    @classmethod
    def empty_like(cls, like: Portable, dtype: Any) -> Portable:
        return cls(cls.xp.empty_like(like.own, dtype=cls.named(dtype)))

    @classmethod
    def zeros_like(cls, like: Portable, dtype: Any = None) -> Portable:
        return cls(cls.xp.zeros_like(like.own))

    @classmethod
    def broadcast_to(cls, array: Portable, shape: Any) -> Portable:
        return cls(cls.xp.broadcast_to(array.own, tuple(shape)))

    @staticmethod
    def ascontiguousarray(array: Portable) -> Portable:
        return array

    @staticmethod
    def may_share_memory(a: Portable, b: Portable) -> bool:
        return a.own is b.own  # the standard cannot tell more


def _arithmetic(operation: Any, reflected: bool) -> Any:
    def method(self: Portable, other: Any) -> Portable:
        a, b = self.own, unwrap(other)
        return type(self)(operation(b, a) if reflected else operation(a, b))

    return method


for _name in ("add", "sub", "mul", "truediv", "pow"):
    setattr(Portable, f"__{_name}__", _arithmetic(getattr(operator, _name), False))
    setattr(Portable, f"__r{_name}__", _arithmetic(getattr(operator, _name), True))


def _standard(array: Any) -> Any:
    """The array API namespace of an array."""
    if hasattr(array, "__array_namespace__"):
        return array.__array_namespace__()
    from array_api_compat import array_namespace  # for libraries that do not name theirs: torch

    return array_namespace(array)


@cache
def _class(kind: type, library: str, xp: Any, home: Any) -> type[Portable]:
    fields = {"__slots__": (), "__module__": library, "xp": xp, "home": home}
    return type(kind.__name__, (Portable,), fields)


def wrap(array: Any, library: str) -> Any:
    """An array of `library`, or each in a tuple of such, behind NumPy's methods."""
    if isinstance(array, tuple):
        return _like(array, [wrap(a, library) for a in array])
    if array is None:
        return None
    kind: type = type(array)
    return _class(kind, library, _standard(array), array.device)(array)


def unwrap(array: Any) -> Any:
    """What `wrap` was given; anything else is left alone."""
    if isinstance(array, tuple) and isinstance(array[0], Portable):
        return _like(array, [unwrap(a) for a in array])
    return array.own if isinstance(array, Portable) else array


def _like(array: tuple[Any, ...], items: list[Any]) -> Any:
    """A tuple of the same kind."""
    return getattr(type(array), "_make", tuple)(items)


def _crossing(method: str) -> Any:
    def cross(self: Adapted, *args: Any, **options: Any) -> Any:
        return wrap(getattr(self.own, method)(*map(unwrap, args), **options), self.library)

    return cross


class Adapted(Backend):
    """A third party's backend, which takes its own arrays, as one that takes `Portable`s.

    What `Backend` has already is written with NumPy's methods, so it runs here, on `Portable`s.
    """

    def __init__(self, own: Backend, library: str) -> None:
        self.own, self.library = own, library
        self.name, self.arrays = own.name, own.arrays  # type: ignore[misc]
        for method in "infer", "given", "average", "renorm", "affine":
            if getattr(type(own), method) is not getattr(Backend, method):
                setattr(self, method, partial(_crossing(method), self))

    moments = _crossing("moments")
    normalize = _crossing("normalize")
    gradients = _crossing("gradients")
    _forward = _crossing("forward")

    def forward(
        self, *args: Any, keep: bool, update: Update | None = None, **options: Any
    ) -> Stats | None:
        stats: Stats | None = self._forward(*args, keep=keep or update is not None, **options)
        if update is not None:
            assert stats is not None
            self.average(update, stats.mean, stats.var)
        return stats
