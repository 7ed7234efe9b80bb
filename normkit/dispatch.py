"""Which backend serves a call: found by the array's type, importing nothing until it is needed.

A plug-in is an entry point of the group `GROUP`, whose name is the top-level module of the array
type that it serves, or a backend registered at run time. Entry points are read when an array, or a
name, is met that no built-in or registered backend serves.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple

from normkit.backends.base import Backend
from normkit.portable import Adapted, Portable, wrap

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUP = "normkit.backends"
_BUILT_IN = ("numba", "cuda", "reference")
_DEFAULT = {"numpy": "numba", "cupy": "cuda"}  #: the array type's top-level module -> backend
_HANDOVER = {
    "torch": "pass tensor.numpy(), or cupy.from_dlpack(tensor) for one on a GPU: both share memory",
    "jax": "pass numpy.asarray(array), or cupy.from_dlpack(array) for one on a GPU",
    "jaxlib": "pass numpy.asarray(array), or cupy.from_dlpack(array) for one on a GPU",
    "tensorflow": "pass tensor.numpy()",
    "builtins": "pass numpy.asarray(x, dtype=...)",
}
_registered: dict[str, Backend] = {}
_chosen: ContextVar[Backend | None] = ContextVar("normkit_backend", default=None)
chosen_backend = _chosen.get  #: what `use_backend` chose, None by default


class Availability(NamedTuple):
    """Whether a backend can serve calls here: see `backends`."""

    available: bool
    version: str  #: of what it computes with, "" where nobody says
    reason: str  #: why it is not available; of one that is, what else there is to know


# What a type's library is, and who serves it


def library(kind: type) -> str:
    """Top-level module of an array type, a subclass counted as what it derives from."""
    names = [base.__module__.partition(".")[0] for base in kind.__mro__]
    built_in = (name for name in names if name in _DEFAULT)
    plugged_in = (name for name in names if _serving(name))
    return next(built_in, None) or next(plugged_in, names[0])


def is_array_library(name: str) -> bool:
    """Whether some backend serves the arrays of a top-level module."""
    return name in _DEFAULT or bool(_serving(name))


_library: Callable[[type], str] = cache(library)


def namespace(array: object) -> Any:
    """The array library that `array` belongs to, or what stands for it in `normkit.portable`."""
    kind = type(array)
    return kind if issubclass(kind, Portable) else sys.modules[_library(kind)]


def _fingerprint(kind: type) -> Callable[[Any], tuple[Any, ...]] | None:
    """What tells an array of a library with devices from others, but for its data; CuPy's so far.

    None for a type that is not exactly the library's own.
    """
    if getattr(sys.modules.get("cupy"), "ndarray", None) is not kind or not hasattr(kind, "data"):
        return None
    return attrgetter("shape", "strides", "dtype", "data.device_id")


fingerprint: Callable[[type], Callable[[Any], tuple[Any, ...]] | None] = cache(_fingerprint)


def adopt(array: Any) -> Any:
    """`array` with NumPy's methods: itself, or a third party's as a `Portable`."""
    home = library(type(array))
    return array if home in _DEFAULT else wrap(array, home)


def _serving(home: str) -> list[Backend | EntryPoint]:
    """The plug-ins for arrays of a top-level module."""
    registered: list[Backend | EntryPoint] = [b for b in _registered.values() if home in b.arrays]
    return registered or [entry for entry in _entries() if entry.name == home]


# Plug-ins


@cache
def _entries() -> tuple[EntryPoint, ...]:
    from importlib.metadata import entry_points  # slow to import, and needed on a miss only

    return tuple(entry_points(group=GROUP))


def _origin(plugin: Backend | EntryPoint) -> str:
    if isinstance(plugin, Backend):
        return f"{plugin.name!r} ({type(plugin).__module__}.{type(plugin).__qualname__})"
    home = f"{plugin.dist.name} {plugin.dist.version}" if plugin.dist else "no distribution"
    return f"{plugin.value!r} ({home})"


def _instance(backend: Any) -> Backend:
    backend = backend() if isinstance(backend, type) else backend
    if not isinstance(backend, Backend):
        raise TypeError(f"{backend!r} is not a normkit.backends.base.Backend")
    return backend


@cache
def _loaded(plugin: Backend | EntryPoint) -> Backend:
    """A plug-in's backend; RuntimeError says whose it is and what is wrong with it."""
    if isinstance(plugin, Backend):
        return plugin
    try:
        found = _instance(plugin.load())
        if found.name in _BUILT_IN:
            raise ValueError(f"its name {found.name!r} is that of a built-in backend")
        if plugin.name not in found.arrays:
            raise ValueError(f"it says that it serves arrays of {' and '.join(found.arrays)}")
    except Exception as error:  # whatever another's code may raise
        raise RuntimeError(
            f"the plug-in {_origin(plugin)} for {plugin.name} arrays cannot be used: "
            f"{type(error).__name__}: {error}"
        ) from error
    return found


def _built_in(name: str) -> Backend:
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
def load(name: str) -> Backend:
    """The backend called `name`; RuntimeError says what to install where it cannot run."""
    if name in _BUILT_IN:
        return _built_in(name)
    if name in _registered:
        return _registered[name]
    named, broken = [], []
    for entry in _entries():
        try:
            named += [entry] if _loaded(entry).name == name else []
        except RuntimeError as error:
            broken.append(f". And {error}")
    if not named:
        known = (*_BUILT_IN, *_registered, *(e.name for e in _entries()))
        raise ValueError(
            f"no backend is called {name!r}: expected one of {', '.join(known)}{''.join(broken)}"
        )
    if len(named) > 1:
        raise RuntimeError(
            f"{len(named)} plug-ins are called {name!r}: {' and '.join(map(_origin, named))}; "
            "uninstall all but one"
        )
    return _loaded(named[0])


def _rivals(home: str) -> str:
    """What to say if several plug-ins serve a library that no built-in backend serves."""
    plugins = _serving(home)
    if home in _DEFAULT or len(plugins) < 2:
        return ""
    return (
        f"{len(plugins)} plug-ins serve {home} arrays: {' and '.join(map(_origin, plugins))}; "
        "choose one with normkit.use_backend, or uninstall the others"
    )


def _default(home: str) -> Backend:
    if home in _DEFAULT:
        return load(_DEFAULT[home])
    if rivals := _rivals(home):
        raise RuntimeError(rivals)
    return _loaded(_serving(home)[0])


@cache
def _find(kind: type, chosen: Backend | None) -> Backend:
    home = library(kind)
    if not (is_array_library(home) or (chosen and home in chosen.arrays)):
        hint = _HANDOVER.get(home, "pass a NumPy or CuPy array")
        raise TypeError(f"expected a NumPy or CuPy array, not {home}.{kind.__name__}: {hint}")
    backend = chosen or _default(home)
    if home not in backend.arrays:
        raise TypeError(
            f"the {backend.name!r} backend that use_backend chose serves arrays of "
            f"{' and '.join(backend.arrays)}, not {home}.{kind.__name__}"
        )
    return backend if home in _DEFAULT else Adapted(backend, home)


def backend_for(kind: type) -> Backend:
    """The backend for arrays of type `kind`."""
    return _find(kind, _chosen.get())


# What users call


@contextmanager
def use_backend(name: str | Backend) -> Iterator[Backend]:
    """Compute with the named backend inside a ``with`` block.

    Parameters
    ----------
    name : str or Backend
        "numba", "cuda", "reference", the name of a plug-in, or a backend itself. "reference" is
        plain array code in the widest type, for NumPy and CuPy arrays: slow, and what the others
        are tested against. The choice holds for the current thread or task.

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
    backend = load(name) if isinstance(name, str) else _instance(name)
    token = _chosen.set(backend)
    try:
        yield backend
    finally:
        _chosen.reset(token)


def register_backend(backend: Backend | type[Backend]) -> None:
    """Add a backend for the running process; see `normkit.backends.base.Backend`.

    It serves the arrays of the libraries that its `arrays` names, but for those of NumPy and CuPy,
    where it serves whoever chooses it with `use_backend`. A package that is installed does without
    this by an entry point of the group ``normkit.backends``, whose name is the top-level module of
    the array type.

    Parameters
    ----------
    backend : Backend or class
        A class is called without arguments.

    Raises
    ------
    TypeError
        If it is no Backend.
    ValueError
        If another one has its name. The same class defined anew, as in a notebook, replaces itself.

    Examples
    --------
    >>> import numpy as np, normkit as nk
    >>> from normkit.backends.reference import Reference
    >>> class Loud(Reference):
    ...     name = "loud"
    ...     def forward(self, x, *args, **options):
    ...         print(f"{x.size} elements")
    ...         return super().forward(x, *args, **options)
    >>> nk.register_backend(Loud)
    >>> with nk.use_backend("loud"):
    ...     y = nk.rms_norm(np.ones((2, 3)))
    6 elements
    """
    backend = _instance(backend)
    if backend.name in _BUILT_IN:
        raise ValueError(f"{_origin(backend)} has the name of a built-in backend: give it another")
    taken = _registered.get(backend.name, backend)
    if _origin(taken) != _origin(backend):
        raise ValueError(f"{_origin(backend)} has the name of {_origin(taken)}: give it another")
    _registered[backend.name] = backend
    load.cache_clear()
    _find.cache_clear()


def backends() -> dict[str, Availability]:
    """The backends there are, and whether each can serve calls here.

    Returns
    -------
    dict of str to Availability
        Name -> ``(available, version, reason)``: built-in ones, registered ones and plug-ins. The
        version is that of what a backend computes with; the reason says in words why one is not
        available. A plug-in that cannot be loaded goes by the name of its entry point.

    Examples
    --------
    >>> import normkit as nk
    >>> nk.backends()["reference"].available
    True
    """
    found = {name: _availability(name) for name in (*_BUILT_IN, *_registered)}
    for entry in _entries():
        try:
            name, reason = _loaded(entry).name, _rivals(entry.name)
        except RuntimeError as error:
            name = entry.name if entry.name not in found else _origin(entry)
            found[name] = Availability(False, "", str(error))
        else:
            known = _availability(name)
            version = known.version or (entry.dist.version if entry.dist else "")
            found[name] = Availability(known.available, version, known.reason or reason)
    return found


def _availability(name: str) -> Availability:
    try:
        about = load(name).about()
    except Exception as error:  # whatever another's code may raise
        return Availability(False, "", str(error))
    return Availability(True, about.get("version", ""), "")
