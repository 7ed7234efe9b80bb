"""What to launch for a norm: a pure function of axes, dtypes and alignment.

The statistics of a group come out of one kernel, split and order of summation that depend on
``(r0, k1, r1)`` and the size of an element alone: never on k0, on addresses or on the device. So a
sample has the same bits whatever else is in the batch.

Two walks cover all axes. `Rows`: long runs (r1), a team of threads for each group, from four lanes
of a warp to a block. `Columns`: short runs, the threads of a block side by side over a tile of
columns, down its rows. A tile that fits one block is read once, and one kernel does all; a larger
one is split in parts, whose sums a second kernel merges before a third applies them, or (`wave`)
in one launch whose blocks meet. A third walk, `Runs`, serves the gradient of group norm: the sums
of channels are weighted to those of groups.

What comes out is a `Program`, pure data: the arrays to make and the kernels to launch, in order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from importlib.resources import files
from itertools import product
from math import lcm
from typing import Any, NamedTuple, Protocol

import numpy as np

from normkit.axes import Axes
from normkit.backends.base import BATCH_NORM

REDUCE, APPLY = 1, 2  #: halves of a kernel
BOTH = REDUCE | APPLY  #: data are kept on chip between them
CROSS, PARAMS = 4, 8  #: of backward: see kernels/backward.cuh
WAVE = 16  #: of kernels that do both for a tile of several parts: see kernels/wave.cuh
FIXED, ALONG, EACH, ANY = range(4)  #: how the parameters lie along a walk
ONE_BLOCK = 64 << 10  #: bytes of a tile that one block takes alone
PART = 64 << 10  #: bytes of a part of a larger one
APPLY_PART = 16 << 10  #: the same where nothing is summed
MANY = 64  #: partial sums of a group that are more than a warp should merge
RUN_SLOTS = 16  #: vectors of a thread that walks over runs, at most
KEEP_PARAMS = {8: 2, 4: 4, 2: 4}  #: vectors whose parameters' sums a thread keeps, by length

#: Of the compiler; CuPy adds the architecture and -ftz=true. Only what is written as fma is fused.
OPTIONS = "-std=c++17", "-fmad=false"
CTYPE = {"float16": "nk::half", "bfloat16": "nk::bfloat", "float32": "float", "float64": "double"}
ARITHMETIC = dict.fromkeys(("float16", "bfloat16", "float32"), "float32") | {"float64": "float64"}
ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
THREADS = {8: 128, 4: 256, 2: 256, 1: 256}  #: of a block of Columns, by the values of a vector
WAVE_THREADS = 256  #: that a multiprocessor surely holds, whatever registers a kernel takes
WAVE_RESERVED = 4 << 10  #: bytes of shared memory of one that are not for its data
RESIDENT = 512  #: threads that a multiprocessor surely holds of kernels that keep parameters' sums

# What kernels take by value and what they write, as in kernels/*.cuh.


def _struct(**fields: Any) -> np.dtype[np.void]:
    return np.dtype(list(fields.items()), align=True)


MOMENTS = _struct(n="f8", shift="f8", offset="f8", m2="f8")
PAIRS = {dtype: _struct(a=dtype, b=dtype) for dtype in ("float32", "float64")}
PAIR = PAIRS["float64"]
GEOMETRY = _struct(
    **dict.fromkeys(("k0", "r0", "k1", "r1", "params", "span"), "i8"),
    **dict.fromkeys(("parts", "per", "slots", "staged", "lanes", "columns", "merge"), "u4"),
)
UPDATE = _struct(
    mean_kind="i4", spread_kind="i4", **dict.fromkeys(("factor", "momentum"), "f8"),
    **dict.fromkeys(("r_min", "r_max", "d_max"), "f8"),
)  # fmt: skip
FORWARD = _struct(
    geometry=GEOMETRY,
    groups="i8",
    blocks="i8",
    eps="f8",
    least="f8",
    center="i4",
    kind="i4",
    update=UPDATE,
)
FINISH_MOMENTS = _struct(geometry=GEOMETRY, groups="i8", eps="f8", center="i4", update=UPDATE)
CELLS = _struct(
    groups="i8", params="i8", within="i8", members="f8", parts="u4", of_group="u4",
    gamma_kind="i4", grad_kind="i4",
)  # fmt: skip
BACKWARD = _struct(
    geometry=GEOMETRY,
    cells=CELLS,
    **dict.fromkeys(("outer", "inner", "count", "blocks"), "i8"),
    center="i4",
    frozen="i4",
)
FOLD = _struct(rows="i8", params="i8", within="i8", grad_kind="i4")
CHANNELS = _struct(count="i8", eps="f8", update=UPDATE, gamma_kind="i4", beta_kind="i4", kind="i4")
KINDS = "float32", "float64", "float16", "bfloat16"  #: by their numbers in kernels/common.cuh

Clip = tuple[float, float]  #: r_max and d_max of Batch Renormalization


class Update(NamedTuple):
    """`base.Update`, by the dtypes of its arrays; or statistics that are given."""

    mean: str
    spread: str
    factor: float | None = None
    momentum: float = 0.0
    clip: Clip | None = None

    @property
    def renorm(self) -> bool:
        """Whether r and d are any but 1 and 0."""
        return self.clip not in (None, BATCH_NORM)

    @property
    def values(self) -> tuple[Any, ...]:
        """Those of UPDATE."""
        kinds = KINDS.index(self.mean), KINDS.index(self.spread)
        r_max, d_max = self.clip if self.clip and self.renorm else (0.0, 0.0)
        r_min = 1 / r_max if r_max else 0.0
        return (*kinds, self.factor or 0.0, self.momentum, r_min, r_max, d_max)


NO_UPDATE = 0, 0, 0.0, 0.0, 0.0, 0.0, 0.0


@cache
def source() -> str:
    """The kernels' source, one string: the header files in the order that they need."""
    folder = files(__package__) / "kernels"
    names = "common", "walk", "wave", "forward", "backward", "channels"
    return "".join((folder / f"{name}.cuh").read_text() for name in names)


@dataclass(frozen=True)
class Launch:
    """One kernel launch as pure data."""

    kernel: str  #: C++ name expression
    grid: tuple[int, int, int]
    threads: int  #: of a block
    shared: int  #: bytes of dynamic shared memory
    arrays: tuple[str | None, ...]  #: of the program, by name; None is a null pointer
    values: np.void  #: the struct that comes last

    @property
    def cooperative(self) -> bool:
        """Whether blocks wait for each other, so that all must be on the device at a time."""
        return "arrivals" in self.arrays


@dataclass(frozen=True)
class Program:
    """What one operation of the backend does on a device."""

    given: tuple[str, ...]  #: the arrays that it is run with
    new: dict[str, tuple[Any, Any]]  #: arrays to make: shape and dtype
    results: int  #: how many of the new arrays, the first, are what is wanted
    launches: tuple[Launch, ...]
    casts: dict[str, str]  #: given arrays that kernels want in another dtype
    zeros: frozenset[str] = frozenset({"arrivals"})  #: new arrays that are to begin as zeros


class Limits(NamedTuple):
    """What the plan takes from a device. No statistics depend on it."""

    sms: int  #: multiprocessors
    shared: int = 0  #: bytes of shared memory that one has
    waves: bool = False  #: whether to plan any `wave`: unproven until they are measured


class Device(Protocol):
    """What runs launches: CuPy in life, an emulation on the host in tests."""

    null: Any  #: what a null pointer is passed as

    @property
    def limits(self) -> Limits: ...
    def bind(self, launch: Launch) -> Callable[[tuple[Any, ...]], None]: ...  # ready for arrays
    def empty(self, shape: Any, dtype: Any) -> Any: ...
    def zeros(self, shape: Any, dtype: Any) -> Any: ...
    def address(self, array: Any) -> int: ...
    def current(self) -> int: ...  # number of the device that all of these concern
    def elsewhere(self, array: Any) -> AbstractContextManager[Any] | None: ...  # as in Backend


class Geometry(NamedTuple):
    """Of kernels/walk.cuh, in its order."""

    k0: int
    r0: int
    k1: int
    r1: int
    params: int
    span: int
    parts: int
    per: int
    slots: int
    staged: int
    lanes: int
    columns: int
    merge: int


@dataclass(frozen=True, eq=False)
class Tile:
    """How threads share the data of a group, or of a few neighbouring ones."""

    walk: str  #: "Rows" or "Columns"
    n: int  #: values of a vector
    wide: bool  #: a team is a whole block
    threads: int  #: of a block
    limit: int  #: most threads of a block that the kernel is compiled for
    units: int  #: teams or blocks there are
    teams: int  #: of them in a block
    geometry: Geometry
    aligned: bool
    mode: int  #: FIXED, ALONG, EACH or ANY

    @property
    def parts(self) -> int:
        return self.geometry.parts

    @property
    def grid(self) -> tuple[int, int, int]:
        return (-(-self.units * self.parts // self.teams), 1, 1)

    def shared(self, entry: int) -> int:
        """Bytes of a table of `entry` bytes for every column of every row of threads."""
        g = self.geometry
        return self.threads // g.lanes * g.columns * entry if self.walk == "Columns" else 0

    @property
    def staged_bytes(self) -> int:
        """Of shared memory for the vectors of one array."""
        return self.geometry.staged * self.threads * 16

    @property
    def cell(self) -> int:
        """Values of a cell that lie side by side: see kernels/backward.cuh."""
        return 1 if self.walk == "Columns" else self.geometry.r1

    @property
    def cells(self) -> int:
        g = self.geometry
        return g.k0 * g.k1 * g.r1 // self.cell

    @property
    def within(self) -> int:
        """How many neighbouring cells have one parameter."""
        g = self.geometry
        slabs = g.r0 if g.span % (g.r0 * g.k1 * g.r1) == 0 else 1
        return g.span // (slabs * self.cell)


def _up(a: int, b: int) -> int:
    return -(-a // b)


def _power(a: int) -> int:
    """The least power of two that is no less than `a`."""
    return 1 << max(0, a - 1).bit_length()


def columnar(axes: Axes, itemsize: int) -> bool:
    """Whether runs are so short that threads should stand across groups."""
    v = 16 // itemsize
    fits = axes.k1 * axes.r1 % v == 0
    return axes.r0 > 1 and (axes.r1 < v or (fits and axes.r1 * itemsize < 256))


def param_mode(axes: Axes, short: bool, n: int) -> int:
    """How the affine parameters lie along a walk of vectors of n."""
    _, r0, _, r1, params, span = axes
    row = axes.k1 * r1
    steady = r0 == 1 or row % (params * span) == 0 or span % (r0 * row) == 0
    if steady and (short or span % r1 == 0):
        return FIXED
    if short:
        return ANY
    if span == 1 and params % r1 == 0 and (r0 == 1 or row % params == 0):
        return ALONG
    return EACH if span % n == 0 and r1 % span == 0 else ANY


@lru_cache(maxsize=8192)
def tile(axes: Axes, itemsize: int, aligned: bool, part: int = PART, affine: bool = True) -> Tile:
    """The tile for a reduction over `axes`; `aligned`: all arrays begin at 16-byte boundaries."""
    v = 16 // itemsize
    row = axes.k1 * axes.r1
    short = columnar(axes, itemsize)
    mode = param_mode(axes, short, v) if affine else FIXED
    if short:
        n = v if row % v == 0 else 1
        unit = lcm(axes.r1, n)
        columns = min(unit * max(1, 128 // itemsize // unit), _up(row, unit) * unit)
        lanes, threads = _up(columns, n), THREADS[n]
        work, size = axes.r0, columns * itemsize
        merge = min(32, _power(max(1, threads * axes.r1 // columns) + 1) // 2)
        units, wide = axes.k0 * _up(row, columns), True
    else:
        n, columns, merge = v, 0, 0
        work, size = axes.r0 * _up(axes.r1, v), 16
        units = axes.groups
    whole = work * size
    parts = 1 if whole <= ONE_BLOCK and part == PART else _up(whole, part)
    per = _up(work, parts)
    if short:
        slots = _up(per, threads // lanes)
        teams, limit = 1, threads
    else:
        wide = per > 128
        lanes = min(512, max(64, _up(_up(per, 4), 32) * 32)) if wide else min(32, _power(per))
        threads, limit = (lanes, 512) if wide else (128, 128)
        slots, teams = _up(per, lanes), threads // lanes
    geometry = Geometry(*axes, _up(work, per), per, slots, 0, lanes, columns, merge)
    aligned = n == 1 or (aligned and (short or axes.r1 % n == 0))
    walk = "Columns" if short else "Rows"
    return Tile(walk, n, wide, threads, limit, units, teams, geometry, aligned, mode)


@cache
def bare(t: Tile) -> Tile:
    """The tile for a kernel that reads no parameters."""
    return replace(t, mode=FIXED)


def pieces(axes: Axes) -> Axes | None:
    """Cells of runs that have several parameters, each for a while: a group norm's channels."""
    fits = axes.r0 == 1 and axes.span < axes.r1 and axes.span >= 16
    if not fits or (axes.params * axes.span) % axes.r1:
        return None
    return Axes(axes.k0 * axes.k1 * axes.r1 // axes.span, 1, 1, *axes[3:])._replace(r1=axes.span)


def runs(axes: Axes, t: Tile) -> Tile | None:
    """The tile `t` of a group of runs with a parameter each, changed so that each has its sums."""
    count, n = axes.r1 // axes.span, t.n
    if t.parts > 1 or t.walk != "Rows":
        return None
    vectors = _up(axes.span, n)
    lanes = min(32, _power(vectors))
    threads = min(512, _up(count * lanes, 32) * 32)
    per = _up(vectors, lanes)
    slots = per * _up(count, threads // lanes)
    if slots > RUN_SLOTS:
        return None
    geometry = t.geometry._replace(
        k0=axes.groups, r0=count, k1=1, r1=axes.span, per=per, slots=slots, lanes=lanes
    )
    aligned = t.aligned and axes.span % n == 0
    return Tile("Runs", n, True, threads, 512, axes.groups, 1, geometry, aligned, EACH)


def crossed(axes: Axes) -> Axes:
    """The axes that the gradients of parameters are reduced over."""
    params, span = axes.params, axes.span
    size = axes.groups * axes.group_size
    return Axes(1, size // (params * span), params, span, params, span)


@lru_cache(maxsize=8192)
def with_params(t: Tile) -> Tile | None:
    """The tile, changed so that a team can keep the sums of its rows' parameters in registers."""
    g = t.geometry
    if t.mode != ALONG or g.r0 != 1 or g.params != g.r1 or g.parts > 1:
        return None
    per, few = g.per, KEEP_PARAMS[t.n]
    if per > 512 * few:
        return None
    wide = per > 32 * few
    lanes = max(64, _up(_up(per, few), 32) * 32) if wide else _power(_up(per, few))
    limit = 512 if wide else 128
    threads = limit // lanes * lanes
    geometry = g._replace(lanes=lanes, slots=_up(per, lanes))
    t = replace(t, wide=wide, threads=threads, limit=limit)
    return replace(t, teams=threads // lanes, geometry=geometry)


def wave(t: Tile, kernel: str, dtype: str, limits: Limits) -> tuple[Tile, int] | None:
    """The tile `t` of several parts, for one launch whose blocks meet, and the blocks of its grid.

    Not in float64, whose groups may have to be read once more when blocks write already.
    """
    together = max(1, WAVE_THREADS // t.threads)  # blocks of a multiprocessor
    resident = together * limits.sms
    if not (limits.waves and 1 < t.parts <= min(MANY, resident)) or t.n == 1 or dtype == "float64":
        return None
    arrays, entry = (1, MOMENTS) if kernel == "forward" else (2, PAIR)
    room = limits.shared // together - WAVE_RESERVED - t.shared(entry.itemsize)
    if room < 0:
        return None
    kept = _keep(kernel, BOTH | WAVE, t)
    staged = min(max(0, t.geometry.slots - kept), room // (t.threads * 16 * arrays))
    blocks = min(t.units * t.parts, resident // t.parts * t.parts)
    return replace(t, geometry=t.geometry._replace(staged=staged)), blocks


# Programs


class _Writer:
    """Collects a program."""

    def __init__(self, *given: str) -> None:
        self.given = given
        self.new: dict[str, tuple[Any, Any]] = {}
        self.casts: dict[str, str] = {}
        self.launches: list[Launch] = []

    def make(self, name: str, shape: Any, dtype: Any) -> str:
        self.new[name] = shape, dtype
        return name

    def launch(
        self,
        kernel: str,
        grid: int,
        threads: int,
        shared: int,
        arrays: tuple[str | None, ...],
        struct: np.dtype[np.void],
        *values: Any,
    ) -> None:
        value = np.array([values], struct)[0]
        self.launches.append(Launch(kernel, (grid, 1, 1), threads, shared, arrays, value))

    def parameters(self, dtype: str, **given: str | None) -> str:
        """The dtype that a kernel takes parameters in: that of x, or of the arithmetic."""
        found = {name: of for name, of in given.items() if of}
        wanted = dtype if set(found.values()) == {dtype} else ARITHMETIC[dtype]
        self.casts = {name: wanted for name, of in found.items() if of != wanted}
        return wanted

    def exchange(self, name: str, count: int, of: Any, t: Tile) -> tuple[str, str]:
        """Where the blocks of a wave leave what they have for each other, and where they meet."""
        return self.make(name, t.parts * count, of), self.make("arrivals", t.units, "uint32")

    def program(self, results: int = 0) -> Program:
        return Program(self.given, self.new, results, tuple(self.launches), self.casts)


def _stats(w: _Writer, axes: Axes, update: Update | None = None) -> str:
    """A table of statistics, with r and d if they are asked for: see kernels/forward.cuh."""
    return w.make("stats", (6 if update and update.renorm else 4, axes.groups), "float64")


def moments(axes: Axes, dtype: str, aligned: bool, eps: float, center: bool) -> Program:
    """x -> stats"""
    w = _Writer("x")
    _moments(w, axes, dtype, bare(tile(axes, ITEMSIZE[dtype], aligned)), eps, center)
    return w.program(results=1)


def normalize(
    axes: Axes, dtype: str, gamma: str | None, beta: str | None, aligned: bool
) -> Program:
    """x, y, gamma, beta, stats ->"""
    w = _Writer("x", "y", "gamma", "beta", "stats")
    _normalize(w, axes, dtype, gamma, beta, aligned, "stats")
    return w.program()


def infer(
    axes: Axes,
    dtype: str,
    gamma: str | None,
    beta: str | None,
    aligned: bool,
    given: Update,
    eps: float | None,
) -> Program:
    """x, y, gamma, beta, mean, spread ->"""
    w = _Writer("x", "y", "gamma", "beta", "mean", "spread")
    _normalize(w, axes, dtype, gamma, beta, aligned, None, given, eps)
    return w.program()


def forward(
    axes: Axes,
    dtype: str,
    gamma: str | None,
    beta: str | None,
    aligned: bool,
    eps: float,
    center: bool,
    keep: bool,
    limits: Limits,
    update: Update | None = None,
) -> Program:
    """x, y, gamma, beta, mean, spread -> stats; one launch, if a block can have all of a group"""
    w = _Writer("x", "y", "gamma", "beta", "mean", "spread")
    t = tile(axes, ITEMSIZE[dtype], aligned, PART, bool(gamma or beta))
    renorm = update is not None and update.renorm
    # no wave for r and d, which all blocks would take from what one of them changes
    found = None if renorm else wave(t, "forward", dtype, limits)
    if t.parts > 1 and found is None:
        _moments(w, axes, dtype, bare(t), eps, center, update)
        _normalize(w, axes, dtype, gamma, beta, aligned, "stats", update)
        return w.program(results=1)
    # where threads read what others wrote
    needed = keep or renorm or (t.walk == "Columns" and not found)
    stats = _stats(w, axes, update) if needed else None
    param = w.parameters(dtype, gamma=gamma, beta=beta)
    stage, (t, blocks) = (BOTH | WAVE, found) if found else (BOTH, (t, t.grid[0]))
    partials, arrivals = w.exchange("partials", axes.groups, MOMENTS, t) if found else (None, None)
    arrays = "x", "y", gamma and "gamma", beta and "beta", stats, partials, arrivals
    _forward(w, t, stage, axes, dtype, param, arrays, eps, center, update, blocks)
    return w.program(results=bool(stats))


def _values(update: Update | None) -> tuple[Any, ...]:
    return update.values if update else NO_UPDATE


def _running(update: Update | None) -> tuple[str | None, str | None]:
    return ("mean", "spread") if update else (None, None)


def _moments(
    w: _Writer,
    axes: Axes,
    dtype: str,
    t: Tile,
    eps: float,
    center: bool,
    update: Update | None = None,
) -> None:
    """The statistics, by a kernel that does nothing else, and another for several parts."""
    stats, split = _stats(w, axes, update), t.parts > 1
    partials = w.make("partials", axes.groups * t.parts, MOMENTS) if split else None
    arrays = "x", None, None, None, stats, partials, None
    at_once = None if split else update
    _forward(w, t, REDUCE, axes, dtype, ARITHMETIC[dtype], arrays, eps, center, at_once)
    if split:
        block = t.parts > MANY
        grid = axes.groups if block else _up(axes.groups, 8)
        values = tuple(t.geometry), axes.groups, eps, center, _values(update)
        again = "x" if dtype == "float64" else None  # where sums may overflow
        tables = again, partials, stats, *_running(update)
        kernel = f"nk::finish_moments<{CTYPE[ARITHMETIC[dtype]]}, {block:d}>"
        w.launch(kernel, grid, 256, 0, tables, FINISH_MOMENTS, *values)


def _normalize(
    w: _Writer,
    axes: Axes,
    dtype: str,
    gamma: str | None,
    beta: str | None,
    aligned: bool,
    stats: str | None,
    update: Update | None = None,
    eps: float | None = 0.0,
) -> None:
    """y from a table of statistics, or without one from given ones."""
    t = tile(axes, ITEMSIZE[dtype], aligned, APPLY_PART, bool(gamma or beta))
    param = w.parameters(dtype, gamma=gamma, beta=beta)
    arrays = "x", "y", gamma and "gamma", beta and "beta", stats, None, None
    _forward(w, t, APPLY, axes, dtype, param, arrays, _spread(eps), True, update)


def _spread(eps: float | None) -> float:
    """What kernels add to a given spread: less than 0 for a standard deviation."""
    return -1.0 if eps is None else eps


def _forward(
    w: _Writer,
    t: Tile,
    stage: int,
    axes: Axes,
    dtype: str,
    param: str,
    arrays: tuple[str | None, ...],
    eps: float,
    center: bool,
    update: Update | None = None,
    blocks: int | None = None,
) -> None:
    """Statistics, or y, or both: kernels/forward.cuh."""
    shared = t.shared(MOMENTS.itemsize) + t.staged_bytes if stage & REDUCE else 0
    # float squares below this may have lost digits that eps does not hide
    least = 0.0 if eps > 1e-15 else 1e-25
    kind = KINDS.index(param)
    values = tuple(t.geometry), axes.groups, t.grid[0], eps, least, center, kind, _values(update)
    name, arrays = _name("forward", dtype, t, stage), (*arrays, *_running(update))
    w.launch(name, blocks or t.grid[0], t.threads, shared, arrays, FORWARD, *values)


def gradients(*key: Any) -> Program:
    """x, dy, dx, gamma, stats -> dgamma, dbeta, if wanted; `key` are the fields of `_Gradients`"""
    return _Gradients(*key).program()


@dataclass
class _Gradients:
    """One program of `gradients` in the making."""

    axes: Axes
    dtype: str
    given: str | None  #: the dtype of gamma
    wanted: str | None  #: that of dgamma and dbeta, if they are wanted
    aligned: bool
    center: bool
    frozen: bool
    limits: Limits

    def __post_init__(self) -> None:
        self.w = _Writer("x", "dy", "dx", "gamma", "stats")
        self.gamma = "gamma" if self.given else None
        self.tile = self.choose(self.axes, PART, bool(self.wanted or self.given))
        self.split = self.choose(self.axes, APPLY_PART, bool(self.given))
        self.param = self.w.parameters(self.dtype, gamma=self.given)

    def choose(self, axes: Axes, part: int, affine: bool) -> Tile:
        return tile(axes, ITEMSIZE[self.dtype], self.aligned, part, affine)

    def program(self) -> Program:
        results = ("dgamma", "dbeta") if self.wanted else ()
        for name in results:
            self.w.make(name, self.axes.params, self.wanted)
        self.write()
        return self.w.program(len(results))

    def write(self) -> None:
        if self.frozen and not self.wanted:
            self.launch(self.split, APPLY)
            return
        cells = self.tile if self.tile.mode == FIXED else None
        if cells is None and (pieces_ := pieces(self.axes)) is not None:
            if (by_run := runs(self.axes, self.tile)) is not None:
                count = self.axes.groups * by_run.geometry.r0
                table = self.w.make("cells", count, PAIR) if self.wanted else None
                self.launch(by_run, BOTH, cells=table)
                if self.wanted:
                    self.fold("float64", table, count // self.axes.params, 1)
                return
            cells = self.choose(pieces_, PART, True)
        if cells is not None:  # their sums serve both dx and the parameters
            self.by_cells(cells, bool(self.wanted))
            return
        rows = with_params(self.tile) if self.wanted and not self.frozen else None
        if rows is not None:
            blocks = min(rows.grid[0], self.limits.sms * (RESIDENT // rows.threads))
            wide = ARITHMETIC[self.dtype]
            table = self.w.make("rows", blocks * self.axes.params, PAIRS[wide])
            self.launch(rows, BOTH | PARAMS, rows=table, blocks=blocks)
            self.fold(wide, table, blocks, 1)
            return
        if self.frozen:
            self.launch(self.split, APPLY)
        else:
            self.by_cells(self.tile, False)
        if self.wanted:
            cross = self.choose(crossed(self.axes), PART, False)
            table = self.w.make("cross", cross.parts * cross.cells, PAIR)
            self.launch(cross, REDUCE | CROSS, cells=table)
            self.fold_cells(table, cross)

    def by_cells(self, t: Tile, sums: bool) -> None:
        """dx by way of the sums of cells, and if `sums` the parameters' gradients."""
        axes, w, same = self.axes, self.w, t.geometry[:4] == self.axes[:4]
        group_cells, whole = t.cells // axes.groups, t.parts == 1 and same
        # a group, or in one block a cell, is all that a parameter has
        alone = axes.params == t.cells and group_cells == t.within == 1
        in_wave = same and not self.frozen and wave(t, "backward", self.dtype, self.limits)
        own = sums and alone
        table = (
            w.make("cells", t.parts * t.cells, PAIR) if (sums and not own) or not whole else None
        )
        if in_wave:
            t, blocks = in_wave
            arrivals = w.make("arrivals", t.units, "uint32")
            self.launch(t, BOTH | WAVE, cells=table, own=own, blocks=blocks, arrivals=arrivals)
        elif whole:
            self.launch(t, BOTH, cells=table, own=own)
        else:
            self.launch(t, REDUCE, cells=table)
            means = None
            if not self.frozen:
                gamma = self.gamma if t.mode == FIXED else None  # else the sums have it
                block = t.parts * t.cells > MANY * axes.groups
                means = w.make("means", axes.groups, PAIR)
                kernel = f"nk::finish_gradients<{block:d}>"
                w.launch(
                    kernel,
                    axes.groups if block else _up(axes.groups, 8),
                    256,
                    0,
                    (table, means, gamma, *(("dgamma", "dbeta") if own else (None, None))),
                    CELLS,
                    *self.cells(t),
                )
            self.launch(self.split, APPLY, means=means)
            own = own and not self.frozen
        if sums and not own:
            self.fold_cells(table, t)

    def launch(
        self,
        t: Tile,
        stage: int,
        *,
        cells: str | None = None,
        means: str | None = None,
        rows: str | None = None,
        own: bool = False,
        blocks: int = 0,
        arrivals: str | None = None,
    ) -> None:
        """Sums, or dx, or both: kernels/backward.cuh."""
        axes, g = self.axes, t.geometry
        shared = t.shared(PAIR.itemsize) + 2 * t.staged_bytes if stage & REDUCE else 0
        if stage & PARAMS:
            shared = axes.params * PAIR.itemsize
        fixed = t.mode == FIXED and stage & BOTH == REDUCE  # gamma comes in with `finish`
        gamma = None if fixed else self.gamma
        grads = ("dgamma", "dbeta") if own else (None, None)
        self.w.launch(
            _name("backward", self.dtype, t, stage),
            blocks or t.grid[0],
            t.threads,
            shared,
            ("x", "dy", "dx", gamma, "stats", cells, means, rows, *grads, arrivals),
            BACKWARD,
            *(tuple(g), self.cells(t, of_params=bool(stage & CROSS))),
            *(axes.group_size * axes.k1, axes.r1, axes.k1, t.grid[0]),
            *(self.center, self.frozen),
        )

    def cells(self, t: Tile, of_params: bool = False) -> tuple[int, ...]:
        """The values of CELLS; cells `of_params` are no group's."""
        axes = self.axes
        of_group = 1 if of_params else max(1, t.cells // axes.groups)
        within, kinds = max(1, t.within), map(KINDS.index, (self.param, self.wanted or self.param))
        return axes.groups, axes.params, within, axes.group_size, t.parts, of_group, *kinds

    def fold_cells(self, table: str | None, t: Tile) -> None:
        rows = t.parts * t.cells // (self.axes.params * t.within)
        self.fold("float64", table, rows, t.within)

    def fold(self, wide: str, table: str | None, rows: int, within: int) -> None:
        """dgamma and dbeta from the sums of cells."""
        assert self.wanted
        kernel = f"nk::fold<{CTYPE[wide]}>"
        params, arrays = self.axes.params, (table, "dgamma", "dbeta")
        values = rows, params, within, KINDS.index(self.wanted)
        threads = 32 * min(32, rows)
        self.w.launch(kernel, _up(params, 32), threads, 0, arrays, FOLD, *values)


def _per_channel(
    kernel: str,
    given: str,
    new: dict[str, tuple[Any, Any]],
    count: int,
    update: Update | None = None,
    eps: float | None = 0.0,
    kinds: tuple[str | None, ...] = (None, None, None),
) -> Program:
    """A kernel of kernels/channels.cuh, whose arguments are the given arrays, then the new ones."""
    w = _Writer(*given.split())
    for name, (shape, dtype) in new.items():
        w.make(name, shape, dtype)
    absent = {name for name, kind in zip(("gamma", "beta"), kinds, strict=False) if not kind}
    arrays = tuple(None if name in absent else name for name in (*w.given, *new))
    values = count, _spread(eps), _values(update), *(KINDS.index(k) if k else 0 for k in kinds)
    w.launch(f"nk::{kernel}", _up(count, 128), 128, 0, arrays, CHANNELS, *values)
    return w.program(len(new))


def given(count: int, of: Update, eps: float | None) -> Program:
    """mean, spread -> stats"""
    return _per_channel("given", "mean spread", {"stats": ((4, count), "float64")}, count, of, eps)


def average(count: int, update: Update) -> Program:
    """mean, spread, new_mean, new_spread -> : the first two change"""
    return _per_channel("average", "mean spread new_mean new_spread", {}, count, update)


def renorm(count: int, update: Update) -> Program:
    """stats, mean, std -> r and d"""
    new = dict.fromkeys(("r", "d"), (count, "float64"))
    return _per_channel("renorm", "stats mean std", new, count, update)


def affine(count: int, gamma: str | None, beta: str | None, dtype: str) -> Program:
    """gamma, beta, r, d -> scaled, shifted"""
    new = dict.fromkeys(("scaled", "shifted"), (count, dtype))
    return _per_channel("affine", "gamma beta r d", new, count, kinds=(gamma, beta, dtype))


# Names


def _keep(kernel: str, stage: int, t: Tile | Shape) -> int:
    """How many vectors a thread keeps in registers, or pairs of them; more would spill."""
    if stage & PARAMS:
        return KEEP_PARAMS[t.n]
    if stage & BOTH != BOTH:
        return 0
    if stage & WAVE:  # the others wait in shared memory
        return 6 if kernel == "forward" else 2
    if kernel == "forward":
        return 8 if t.wide else 4
    easy = t.mode == FIXED or t.walk == "Runs" or (t.mode == ALONG and t.aligned)
    if easy or t.limit < 512:
        return 4
    return 3 if t.mode == EACH and t.aligned else 2


def _name(kernel: str, dtype: str, t: Tile | Shape, stage: int) -> str:
    kept = _keep(kernel, stage, t)
    flags = f"{t.aligned:d}, {t.mode}, {kept}, {t.wide:d}, {t.limit}, {stage}"
    return f"nk::{kernel}<{CTYPE[dtype]}, nk::{t.walk}<{t.n}>, {flags}>"


class Shape(NamedTuple):
    """What a kernel is compiled for, of a tile."""

    walk: str
    n: int
    wide: bool
    limit: int
    aligned: bool
    mode: int


def specialisations() -> Iterator[tuple[str, str]]:
    """(source, C++ name) of every kernel that a plan can ask for."""
    names = [f"nk::{name}" for name in ("given", "average", "renorm", "affine")]
    names += [f"nk::fold<{t}>" for t in ("float", "double")]
    names += [f"nk::finish_moments<{t}, {block}>" for t in ("float", "double") for block in (0, 1)]
    names += [f"nk::finish_gradients<{block}>" for block in (0, 1)]
    for dtype in CTYPE:
        v = 16 // ITEMSIZE[dtype]
        teams: list[tuple[str, int, bool, int]] = [("Rows", v, False, 128), ("Rows", v, True, 512)]
        teams += [("Columns", v, True, THREADS[v]), ("Columns", 1, True, THREADS[1])]
        for team, aligned, mode in product(teams, (True, False), (FIXED, ALONG, EACH, ANY)):
            shape = Shape(*team, aligned, mode)
            rows = shape.walk == "Rows"
            if (shape.n == 1 and not aligned) or (not rows and mode in (ALONG, EACH)):
                continue
            stages = [(kernel, s) for kernel in ("forward", "backward") for s in (APPLY, BOTH)]
            stages += [("backward", BOTH | PARAMS)] * (mode == ALONG)
            waves = shape.wide and shape.n > 1 and dtype != "float64"
            stages += [(kernel, BOTH | WAVE) for kernel in ("forward", "backward") if waves]
            stages += [("backward", REDUCE)] * (mode != FIXED and shape.wide)  # of several parts
            plain = [("forward", REDUCE), ("backward", REDUCE), ("backward", REDUCE | CROSS)]
            if shape.walk == "Rows" and shape.wide and mode == EACH:  # a group norm's gradient
                by_run = shape._replace(walk="Runs")
                names.append(_name("backward", dtype, by_run, BOTH))
            stages += plain * (mode == FIXED)
            names += [_name(kernel, dtype, shape, stage) for kernel, stage in stages]
    yield from ((source(), name) for name in names)


def needed(dtype: str) -> Iterator[str]:
    """The kernels that calls with an x of `dtype` can ask for."""
    others = tuple(
        f"nk::{walk}<{other},"
        for walk in ("forward", "backward")
        for name, other in CTYPE.items()
        if name != dtype
    )
    yield from (kernel for _, kernel in specialisations() if not kernel.startswith(others))
