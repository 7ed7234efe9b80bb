"""What a call would do, without doing it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from normkit.axes import ALTERNATING, Axes, Layout
from normkit.backends.base import BATCH_NORM, Array, Backend, Step, Update
from normkit.call import Call, declared
from normkit.dispatch import library, namespace
from normkit.portable import Adapted, unwrap

MOST_TIMED = 1 << 28  #: bytes of a copy that is timed


class Axis(NamedTuple):
    """An axis of x, or one of the two that group norm makes of the channel axis."""

    axis: str
    size: int
    reduced: bool  #: statistics are reduced over it, not kept
    affine: bool  #: gamma and beta have it


@dataclass(frozen=True)
class Explanation:
    """What a call would do. Prints as a table."""

    norm: str
    array: str  #: library, dtype and shape of x
    axes: tuple[Axis, ...]  #: in memory order
    geometry: Axes  #: the six integers that the axes fold into: see `normkit.axes`
    backend: str
    steps: tuple[Step, ...]  #: launches of kernels, in order
    copies: tuple[str, ...]  #: what has to be copied first or last, and why
    bytes: int  #: that have to be read and written at the least
    seconds: float | None  #: what a copy that moves as many takes here, where the backend knows

    @property
    def kernel(self) -> str:
        """The kernels, joined."""
        return ", ".join(step.kernel for step in self.steps)

    @property
    def launch(self) -> str:
        """How they are split or launched, joined."""
        return ", ".join(step.launch for step in self.steps)

    def __str__(self) -> str:
        role = {True: "over", False: "keep"}
        rows = [
            ("axis", *(a.axis for a in self.axes)),
            ("size", *(str(a.size) for a in self.axes)),
            ("statistics", *(role[a.reduced] for a in self.axes)),
            ("gamma, beta", *("yes" if a.affine else "-" for a in self.axes)),
        ]
        folded = ", ".join(f"{k}={v}" for k, v in self.geometry._asdict().items())
        moves = f"{in_bytes(self.bytes)} to move"
        if self.seconds is not None:
            moves += f", at least {1e3 * self.seconds:.3g} ms here"
        facts = [("in memory as", folded), ("backend", self.backend)]
        facts += [("kernel", f"{step.kernel}  {step.launch}".rstrip()) for step in self.steps]
        facts += [("copy", copy) for copy in self.copies or ("none",)]
        facts += [("bytes", moves)]
        return "\n".join([f"{self.norm} of {self.array}", *table(rows), *table(facts)])


def table(rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Lines with aligned columns."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def explain(norm: Callable[..., Array], x: Array, *args: Any, **options: Any) -> Explanation:
    """What ``norm(x, *args, **options)`` would do, without doing it.

    Neither x nor anything else is read or changed. The first time, copies of the same size are
    timed.

    Parameters
    ----------
    norm : callable
        A norm of normkit, one made with `normkit.norm`, or a `functools.partial` of one.
    x : array
        What would be normalised.
    *args, **options
        The norm's other arguments.

    Returns
    -------
    Explanation
        A frozen object with fields, which prints as a table.

    Raises
    ------
    TypeError, ValueError
        As the call itself.

    Examples
    --------
    >>> import numpy as np, normkit as nk
    >>> x = np.zeros((8, 6, 14, 14), "float32")
    >>> print(nk.explain(nk.group_norm, x, np.ones(6), num_groups=2))  # doctest: +SKIP
    group_norm of numpy float32 (8, 6, 14, 14)
    axis         0     1 (groups)  1 (within)  2     3
    size         8     2           3           14    14
    statistics   keep  keep        over        over  over
    gamma, beta  -     yes         yes         -     -
    in memory as  k0=16, r0=1, k1=1, r1=588, params=6, span=196
    backend       numba
    kernel        rows_forward  statistics and result, group by group: 16 groups
    copy          none
    bytes         75.3 kB to move, at least 0.004 ms here
    """
    call = declared("explain", norm)(x, *args, **options)
    backend = call.backend.own if isinstance(call.backend, Adapted) else call.backend
    moved = _moved(call)
    return Explanation(
        norm=getattr(norm, "func", norm).__name__,
        array=f"{library(type(x))} {call.x.dtype} {call.x.shape}",
        axes=tuple(_axes(call.plan.layout)),
        geometry=call.plan.layout.axes,
        backend=backend.name,
        steps=tuple(_steps(call, backend)),
        copies=tuple(_copies(call)),
        bytes=moved,
        seconds=_seconds(backend, moved),
    )


def _axes(layout: Layout) -> Iterator[Axis]:
    roles = layout.roles
    names = [str(axis) for axis in range(len(roles.shape))]
    if roles.split:
        at = roles.split[0]
        names[at:] = [f"{at} (groups)", f"{at} (within)", *names[at + 1 : -1]]
    for a in layout.order:
        yield Axis(names[a], roles.shape[a], a in roles.reduced, a in roles.params)


def _steps(call: Call, backend: Backend) -> Iterator[Step]:
    """The operations that `Call` asks for, each as the backend explains it."""
    if call.plan.empty:
        return
    given, affine = call.running, (call.gamma, call.beta)
    operations: list[tuple[str, Update | None]] = [("forward", None)]
    if given is not None:
        factor, fused = None if given.clip else 1.0, call.plan.direct_running
        update = Update(given.mean, given.spread, factor, given.momentum, given.clip)
        if call.frozen:
            operations = [("infer", update)]
        elif given.clip and not (backend.renormalizes and fused):
            corrected = [("renorm", update), ("affine", None)] * (given.clip != BATCH_NORM)
            operations = [("moments", None), *corrected, ("normalize", None), ("average", update)]
        elif fused:
            operations = [("forward", update)]
        else:
            operations = [("forward", None), ("average", update)]
    options = {"center": call.center, "keep": given is not None}
    for operation, running in operations:
        x, gamma, beta, running = (unwrap(a) for a in (call.x, *affine, running))
        axes = call.plan.layout.axes
        yield from backend.steps(operation, x, axes, gamma, beta, running, **options)
        if operation == "affine":  # whose results those of an empty array stand for
            affine = (namespace(call.x).empty(0, call.plan.arithmetic),) * 2


def _copies(call: Call) -> Iterator[str]:
    layout, native = call.plan.layout, call.plan.native
    if not call.x.size:
        return
    view = layout.view(call.x)
    if view.dtype != native:
        yield f"x, {in_bytes(view.nbytes)}: its byte order is not the machine's"
    elif not view.flags.c_contiguous:
        yield f"x, {in_bytes(view.nbytes)}: {layout.copies}"
    if call.out is not None:
        view = layout.view(call.out)
        if view.dtype != native or not view.flags.c_contiguous:
            yield f"out, {in_bytes(view.nbytes)}: it does not lie in memory as x does, without gaps"
    elif layout.copies == ALTERNATING:
        yield f"y, {in_bytes(view.nbytes)}: {layout.copies}"
    for name, param in ("gamma", call.gamma), ("beta", call.beta):
        if param is None:
            continue
        if layout.axes.params != param.size:
            yield f"{name}, {layout.axes.params} elements: repeated over the axes between its own"
        elif not (layout.view_param(param).flags.c_contiguous and param.dtype.isnative):
            yield f"{name}, {param.size} elements: it does not lie in memory as x does"


def _moved(call: Call) -> int:
    """Bytes to read and to write: x, y, parameters and running statistics, each once."""
    found = 2 * call.x.nbytes + sum(p.nbytes for p in (call.gamma, call.beta) if p is not None)
    if call.running is not None:
        both = call.running.mean.nbytes + call.running.spread.nbytes
        found += both if call.frozen else 2 * both
    return int(found)


def _seconds(backend: Backend, size: int) -> float | None:
    """The time of a copy of `size` bytes, from that of one of about as many."""
    timed = min(1 << size.bit_length(), MOST_TIMED)
    seconds = _copy_seconds(backend, timed)
    return None if seconds is None else seconds * size / timed


@lru_cache
def _copy_seconds(backend: Backend, size: int) -> float | None:
    return backend.copy_seconds(size)


def in_bytes(count: int) -> str:
    """A number of bytes, for people."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}"
