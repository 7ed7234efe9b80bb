"""Compile ahead what a program will need."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from normkit.call import ARITHMETIC
from normkit.dispatch import backends, load


def warmup(
    dtypes: Any = tuple(ARITHMETIC),
    *,
    backend: str | None = None,
    progress: Callable[[int, int, str], object] | None = None,
) -> None:
    """Compile every kernel that calls with an x of the given dtypes may need.

    What is compiled is kept on disk, so this is for the first run on a machine, or for an image
    that is to start fast; a kernel is otherwise compiled by the first call that needs it.

    Parameters
    ----------
    dtypes : dtype, or sequence of them
        Of x: float16, bfloat16, float32, float64; all of them by default.
    backend : str, optional
        A name that `use_backend` takes; by default every backend that is available.
    progress : callable, optional
        ``progress(done, total, name)`` is called before each kernel, and once at the end.

    Raises
    ------
    ValueError
        For another dtype, or an unknown backend.
    RuntimeError
        If the backend cannot run here.

    Examples
    --------
    >>> import normkit as nk
    >>> nk.warmup("float32", backend="reference")  # which has nothing to compile
    """
    many = dtypes if isinstance(dtypes, Iterable) and not isinstance(dtypes, str) else (dtypes,)
    names = [d if isinstance(d, str) else np.dtype(d).name for d in many]
    for name in names:
        if name not in ARITHMETIC:
            raise ValueError(f"warmup: dtype {name!r} is none of {', '.join(ARITHMETIC)}")
    chosen = [n for n, found in backends().items() if found.available] if not backend else [backend]
    jobs = [job for one in chosen for name in names for job in load(one).kernels(name)]
    show = progress or (lambda done, total, name: None)
    for done, (name, compile) in enumerate(jobs):
        show(done, len(jobs), name)
        compile()
    show(len(jobs), len(jobs), "")
