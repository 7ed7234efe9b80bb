"""What to launch for a norm: a pure function of axes, dtypes and alignment.

The statistics of a group come out of one kernel, split and order of summation that depend on
``(r0, k1, r1)`` and the size of an element alone: never on k0, on addresses or on the device. So a
sample has the same bits whatever else is in the batch.

Two walks cover all axes. `Rows`: long runs (r1), a team of threads for each group, from four lanes
of a warp to a block. `Columns`: short runs, the threads of a block side by side over a tile of
columns, down its rows. A tile that fits one block is read once, and one kernel does all; a larger
one is split in parts, whose sums a second kernel merges before a third applies them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from importlib.resources import files
from itertools import product
from math import lcm
from typing import Any, NamedTuple, Protocol

import numpy as np

from normkit.axes import Axes

REDUCE, APPLY = 1, 2  #: halves of a kernel
BOTH = REDUCE | APPLY  #: data are kept on chip between them
CROSS, PARAMS = 4, 8  #: of backward: see kernels/backward.cuh
FIXED, ALONG, ANY = 0, 1, 2  #: how the parameters lie along a walk
ONE_BLOCK = 64 << 10  #: bytes of a tile that one block takes alone
PART = 64 << 10  #: bytes of a part of a larger one
APPLY_PART = 16 << 10  #: the same where nothing is summed
MANY = 64  #: partial sums of a group that are more than a warp should merge
KEEP_PARAMS = 2  #: vectors of a row whose parameters' sums a thread keeps in registers

#: Of the compiler; CuPy adds the architecture and -ftz=true. Only what is written as fma is fused.
OPTIONS = "-std=c++17", "-fmad=false"
CTYPE = {"float16": "nk::half", "bfloat16": "nk::bfloat", "float32": "float", "float64": "double"}
ARITHMETIC = dict.fromkeys(("float16", "bfloat16", "float32"), "float32") | {"float64": "float64"}
ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
THREADS = {8: 128, 4: 256, 2: 256, 1: 256}  #: of a block of Columns, by the values of a vector
MOMENTS = np.dtype([("n", "f8"), ("shift", "f8"), ("offset", "f8"), ("m2", "f8")])
PAIR = np.dtype([("a", "f8"), ("b", "f8")])


@cache
def source() -> str:
    """The kernels' source, one string: the header files in the order that they need."""
    folder = files(__package__) / "kernels"
    names = "common", "walk", "forward", "backward"
    return "".join((folder / f"{name}.cuh").read_text() for name in names)


@dataclass(frozen=True)
class Launch:
    """One kernel launch as pure data; `args` are arrays, NumPy scalars or None (a null pointer)."""

    source: str
    kernel: str  #: C++ name expression
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int  #: bytes of dynamic shared memory
    cooperative: bool
    args: tuple[Any, ...]


@dataclass(frozen=True)
class Prepared:
    """A launch that lacks its arrays."""

    kernel: str
    grid: tuple[int, int, int]
    threads: int
    shared: int
    scalars: tuple[Any, ...]

    def __call__(self, *arrays: Any) -> Launch:
        block = (self.threads, 1, 1)
        return Launch(
            source(), self.kernel, self.grid, block, self.shared, False, (*arrays, *self.scalars)
        )


@dataclass(frozen=True)
class Limits:
    """What the plan takes from a device: how many rows of parameters' sums there are."""

    sms: int


class Device(Protocol):
    """What runs launches: CuPy in life, an emulation on the host in tests."""

    @property
    def limits(self) -> Limits: ...
    def launch(self, launch: Launch) -> None: ...
    def empty(self, shape: int | tuple[int, ...], dtype: Any) -> Any: ...
    def address(self, array: Any) -> int: ...
    def on(self, array: Any) -> Any: ...  # a context: the array's device is the current one


class Geometry(NamedTuple):
    """NK_GEOMETRY of kernels/walk.cuh, in its order."""

    k0: int
    r0: int
    k1: int
    r1: int
    params: int
    span: int
    parts: int
    per: int
    slots: int
    lanes: int
    columns: int
    merge: int

    def scalars(self) -> tuple[Any, ...]:
        return (*map(np.int64, self[:6]), *map(np.uint32, self[6:]))


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
    mode: int  #: FIXED, ALONG or ANY

    @property
    def parts(self) -> int:
        return self.geometry.parts

    @property
    def grid(self) -> tuple[int, int, int]:
        return (-(-self.units * self.parts // self.teams), 1, 1)

    def shared(self, entry: int) -> int:
        """Bytes of a table of `entry` bytes for every column of every row of threads."""
        g = self.geometry
        return 0 if self.walk == "Rows" else self.threads // g.lanes * g.columns * entry

    @property
    def halves(self) -> bool:
        """Whether kernels take gamma and beta in half precision."""
        return self.walk == "Rows" or (self.n > 1 and self.mode == FIXED)

    @property
    def cell(self) -> int:
        """Values of a cell that lie side by side: see kernels/backward.cuh."""
        return self.geometry.r1 if self.walk == "Rows" else 1

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


def param_mode(axes: Axes, short: bool) -> int:
    """How the affine parameters lie along a walk."""
    _, r0, _, r1, params, span = axes
    row = axes.k1 * r1
    steady = r0 == 1 or row % (params * span) == 0 or span % (r0 * row) == 0
    if steady and (short or span % r1 == 0):
        return FIXED
    along = not short and span == 1 and params % r1 == 0 and (r0 == 1 or row % params == 0)
    return ALONG if along else ANY


@lru_cache(maxsize=8192)
def tile(axes: Axes, itemsize: int, aligned: bool, part: int = PART, affine: bool = True) -> Tile:
    """The tile for a reduction over `axes`; `aligned`: all arrays begin at 16-byte boundaries."""
    v = 16 // itemsize
    row = axes.k1 * axes.r1
    short = columnar(axes, itemsize)
    mode = param_mode(axes, short) if affine else FIXED
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
    geometry = Geometry(*axes, _up(work, per), per, slots, lanes, columns, merge)
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


def crossed(axes: Axes) -> Axes:
    """The axes that the gradients of parameters are reduced over."""
    params, span = axes.params, axes.span
    size = axes.groups * axes.group_size
    return Axes(1, size // (params * span), params, span, params, span)


@lru_cache(maxsize=8192)
def with_params(t: Tile) -> Tile | None:
    """The tile, changed so that a team can keep the sums of its rows' parameters in registers."""
    g = t.geometry
    per, few = g.per, KEEP_PARAMS
    if t.mode != ALONG or g.r0 != 1 or g.params != g.r1 or g.parts > 1 or per > 512 * few:
        return None
    wide = per > 32 * few
    lanes = max(64, _up(_up(per, few), 32) * 32) if wide else _power(_up(per, few))
    threads, limit = (lanes, 512) if wide else (128, 128)
    geometry = g._replace(lanes=lanes, slots=_up(per, lanes))
    t = replace(t, wide=wide, threads=threads, limit=limit)
    return replace(t, teams=threads // lanes, geometry=geometry)


# Launches


@lru_cache(maxsize=8192)
def forward(t: Tile, stage: int, dtype: str, param: str, eps: float, center: bool) -> Prepared:
    """Statistics, or y, or both: kernels/forward.cuh."""
    shared = t.shared(MOMENTS.itemsize) if stage & REDUCE else 0
    # float squares below this may have lost digits that eps does not hide
    least = 0.0 if eps > 1e-15 else 1e-25
    scalars = *t.geometry.scalars(), np.float64(eps), np.float64(least), np.int32(center)
    return Prepared(_name("forward", dtype, param, t, stage), t.grid, t.threads, shared, scalars)


@lru_cache(maxsize=8192)
def finish_moments(groups: int, parts: int, eps: float) -> Prepared:
    """Statistics from the moments of parts."""
    scalars = np.int64(groups), np.uint32(parts), np.float64(eps)
    block = parts > MANY
    kernel = f"nk::finish_moments<{block:d}>"
    return Prepared(kernel, (groups if block else _up(groups, 8), 1, 1), 256, 0, scalars)


@lru_cache(maxsize=8192)
def backward(
    t: Tile,
    stage: int,
    dtype: str,
    param: str,
    axes: Axes,
    center: bool,
    frozen: bool,
    blocks: int = 0,
) -> Prepared:
    """Sums, or dx, or both, of groups of `axes`: kernels/backward.cuh."""
    shared = t.shared(PAIR.itemsize) if stage & REDUCE else 0
    if stage & PARAMS:
        shared = axes.params * PAIR.itemsize
    scalars = (
        *t.geometry.scalars(),
        *map(np.int64, (axes.group_size * axes.k1, axes.r1, axes.k1)),
        np.float64(axes.group_size),
        np.uint32(max(1, t.cells // axes.groups)),
        np.int32(center),
        np.int32(frozen),
        np.int64(t.grid[0]),
    )
    grid = (blocks, 1, 1) if blocks else t.grid
    return Prepared(_name("backward", dtype, param, t, stage), grid, t.threads, shared, scalars)


@lru_cache(maxsize=8192)
def finish_gradients(t: Tile, param: str, axes: Axes) -> Prepared:
    """What dx needs of a group, from the sums of its cells."""
    scalars = (
        np.int64(axes.groups),
        np.uint32(t.parts),
        np.uint32(t.cells // axes.groups),
        np.int64(axes.params),
        np.int64(max(1, t.within)),
        np.float64(axes.group_size),
    )
    block = t.parts * t.cells > MANY * axes.groups
    kernel = f"nk::finish_gradients<{CTYPE[param]}, {block:d}>"
    grid = axes.groups if block else _up(axes.groups, 8)
    return Prepared(kernel, (grid, 1, 1), 256, 0, scalars)


@lru_cache(maxsize=8192)
def fold(dtype: str, rows: int, params: int, within: int) -> Prepared:
    """dgamma and dbeta from the sums of cells."""
    scalars = tuple(map(np.int64, (rows, params, within)))
    threads = 32 * min(32, rows)
    return Prepared(f"nk::fold<{CTYPE[dtype]}>", (_up(params, 32), 1, 1), threads, 0, scalars)


# Names


def _keep(kernel: str, stage: int, t: Tile | Shape) -> int:
    """How many vectors a thread keeps in registers, or pairs of them; more would spill."""
    if stage & PARAMS:
        return KEEP_PARAMS
    if stage & BOTH != BOTH:
        return 0
    if kernel == "forward":
        return 8 if t.wide else 4
    easy = t.mode == FIXED or (t.mode == ALONG and t.aligned)  # parameters, to read
    return 4 if easy or t.limit < 512 else 3


def _name(kernel: str, dtype: str, param: str, t: Tile | Shape, stage: int) -> str:
    kept = _keep(kernel, stage, t)
    flags = f"{t.aligned:d}, {t.mode}, {kept}, {t.wide:d}, {t.limit}, {stage}"
    return f"nk::{kernel}<{CTYPE[dtype]}, {CTYPE[param]}, nk::{t.walk}<{t.n}>, {flags}>"


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
    names = ["nk::fold<float>", "nk::fold<double>"]
    names += [f"nk::finish_moments<{block}>" for block in (0, 1)]
    names += [f"nk::finish_gradients<{t}, {block}>" for t in CTYPE.values() for block in (0, 1)]
    for dtype, wide in ARITHMETIC.items():
        v = 16 // ITEMSIZE[dtype]
        teams: list[tuple[str, int, bool, int]] = [("Rows", v, False, 128), ("Rows", v, True, 512)]
        teams += [("Columns", v, True, THREADS[v]), ("Columns", 1, True, THREADS[1])]
        for team, aligned, mode in product(teams, (True, False), (FIXED, ALONG, ANY)):
            shape = Shape(*team, aligned, mode)
            rows = shape.walk == "Rows"
            if (shape.n == 1 and not aligned) or (not rows and mode == ALONG):
                continue
            halves = {dtype} if rows or (shape.n > 1 and mode == FIXED) else set()
            stages = [(kernel, s) for kernel in ("forward", "backward") for s in (APPLY, BOTH)]
            stages += [("backward", BOTH | PARAMS)] * (mode == ALONG)
            stages += [("backward", REDUCE)] * (mode != FIXED and shape.wide)  # of several parts
            plain = [("forward", REDUCE), ("backward", REDUCE), ("backward", REDUCE | CROSS)]
            for kernel, stage in stages:
                names += [_name(kernel, dtype, p, shape, stage) for p in halves | {wide}]
            for kernel, stage in plain * (mode == FIXED):
                names.append(_name(kernel, dtype, wide, shape, stage))
    yield from ((source(), name) for name in names)
