"""Which backend serves a call: found by the array's type, importing nothing until it is needed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from typing import Any

from normkit.backends.base import Backend

_BUILT_IN = ("numba", "cuda", "reference")
_DEFAULT = {"numpy": "numba", "cupy": "cuda"}  #: the array type's top-level module -> backend
_HANDOVER = {
    "torch": "pass tensor.numpy(), or cupy.from_dlpack(tensor) for one on a GPU: both share memory",
    "jax": "pass numpy.asarray(array), or cupy.from_dlpack(array) for one on a GPU",
    "jaxlib": "pass numpy.asarray(array), or cupy.from_dlpack(array) for one on a GPU",
    "tensorflow": "pass tensor.numpy()",
    "builtins": "pass numpy.asarray(x, dtype=...)",
}
_chosen: ContextVar[str | None] = ContextVar("normkit_backend", default=None)


def library(kind: type) -> str:
    """Top-level module of an array type, a subclass counted as what it derives from."""
    names = [base.__module__.partition(".")[0] for base in kind.__mro__]
    return next((name for name in names if name in _DEFAULT), names[0])


def is_array_library(name: str) -> bool:
    """Whether some backend serves the arrays of a top-level module."""
    return name in _DEFAULT


_library: Callable[[type], str] = cache(library)


def namespace(array: object) -> Any:
    """The array library that `array` belongs to."""
    return sys.modules[_library(type(array))]


@cache
def load(name: str) -> Backend:
    """The backend called `name`; RuntimeError says what to install where it cannot run."""
    if name not in _BUILT_IN:
        raise ValueError(f"no backend is called {name!r}: expected one of {', '.join(_BUILT_IN)}")
    try:
        found = import_module(f"normkit.backends.{name}").backend
    except ImportError as error:
        raise RuntimeError(
            f"the {name!r} backend is not available ({error}). Install what it needs, "
            'for example `pip install "normkit[cuda12]"` or `normkit[cuda13]` for CuPy arrays, '
            'or compute with plain array code inside `with normkit.use_backend("reference"):`'
        ) from error
    assert isinstance(found, Backend)
    return found


@cache
def _find(kind: type, chosen: str | None) -> Backend:
    home = library(kind)
    if home not in _DEFAULT:
        hint = _HANDOVER.get(home, "pass a NumPy or CuPy array")
        raise TypeError(f"expected a NumPy or CuPy array, not {home}.{kind.__name__}: {hint}")
    backend = load(chosen or _DEFAULT[home])
    if home not in backend.arrays:
        raise TypeError(
            f"the {backend.name!r} backend that use_backend chose serves arrays of "
            f"{' and '.join(backend.arrays)}, not {home}.{kind.__name__}"
        )
    return backend


def backend_for(kind: type) -> Backend:
    """The backend for arrays of type `kind`."""
    return _find(kind, _chosen.get())


@contextmanager
def use_backend(name: str) -> Iterator[Backend]:
    """Compute with the named backend inside a ``with`` block.

    Parameters
    ----------
    name : {"numba", "cuda", "reference"}
        "reference" is plain array code in the widest type, for NumPy and CuPy arrays: slow, and
        what the others are tested against. The choice holds for the current thread or task.

    Raises
    ------
    ValueError
        If no backend has that name.
    RuntimeError
        If it cannot run here; the message says what to install.

    Examples
    --------
    >>> import numpy as np, normkit as nk
    >>> with nk.use_backend("reference"):
    ...     nk.layer_norm(np.array([[1.0, 3.0]]), eps=0.0)
    array([[-1.,  1.]])
    """
    backend = load(name)
    token = _chosen.set(name)
    try:
        yield backend
    finally:
        _chosen.reset(token)
