"""The CUDA backend: kernels of our own (kernels/*.cuh), compiled and launched through CuPy."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from normkit.axes import Axes
from normkit.backends.base import Array, Backend, Stats, Update
from normkit.backends.cuda import planner
from normkit.backends.cuda.planner import (
    APPLY,
    APPLY_PART,
    ARITHMETIC,
    BOTH,
    CROSS,
    FIXED,
    MOMENTS,
    PAIR,
    PARAMS,
    PART,
    REDUCE,
    Device,
    Tile,
)


class Cuda(Backend):
    """Plans launches and gives them to a device."""

    name = "cuda"
    arrays = ("cupy",)

    def __init__(self, device: Device) -> None:
        self.device = device

    def moments(self, x: Array, axes: Axes, *, eps: float, center: bool) -> Stats:
        with self.device.on(x):
            return self._moments(x, axes, self._tile(axes, PART, False, x), eps, center)

    def normalize(
        self, x: Array, axes: Axes, stats: Stats, gamma: Array | None, beta: Array | None, y: Array
    ) -> None:
        with self.device.on(x):
            tile = self._tile(axes, APPLY_PART, _any(gamma, beta), x, y, gamma, beta)
            params = _params(tile, x, gamma, beta)
            prepared = planner.forward(tile, APPLY, _dtype(x), _dtype(x, *params), 0.0, True)
            self.device.launch(prepared(x, y, *params, *_order(stats), None))

    def forward(
        self,
        x: Array,
        axes: Axes,
        gamma: Array | None,
        beta: Array | None,
        y: Array,
        *,
        eps: float,
        center: bool,
        keep: bool,
        update: Update | None = None,
    ) -> Stats | None:
        if update is not None:
            return super().forward(
                x, axes, gamma, beta, y, eps=eps, center=center, keep=keep, update=update
            )
        with self.device.on(x):
            tile = self._tile(axes, PART, _any(gamma, beta), x, y, gamma, beta)
            if tile.parts > 1:
                found = self._moments(x, axes, tile, eps, center)
                self.normalize(x, axes, found, gamma, beta, y)
                return found
            needed = keep or tile.walk == "Columns"  # whose threads read what others wrote
            stats = self._stats(x, axes) if needed else None
            params = _params(tile, x, gamma, beta)
            prepared = planner.forward(tile, BOTH, _dtype(x), _dtype(x, *params), eps, center)
            self.device.launch(prepared(x, y, *params, *_order(stats), None))
            return stats

    def gradients(
        self,
        dy: Array,
        x: Array,
        axes: Axes,
        stats: Stats,
        gamma: Array | None,
        dx: Array,
        *,
        center: bool,
        frozen: bool,
        affine: bool,
    ) -> tuple[Array, Array] | None:
        with self.device.on(x):
            if dy.dtype != x.dtype:  # float32 for half data: as if x and dx were float32 too
                wide = self.device.empty(x.shape, dy.dtype)
                options = {"center": center, "frozen": frozen, "affine": affine}
                x = x.astype(dy.dtype)
                sums = self.gradients(dy, x, axes, stats, gamma, wide, **options)
                dx[...] = wide
                return sums
            tile = self._tile(axes, PART, affine or gamma is not None, x, dy, dx, gamma)
            (gamma,) = _params(tile, x, gamma)
            call = _Gradients(self.device, axes, stats, dy, x, dx, gamma, center, frozen)
            return call.run(tile, affine, self._tile)

    def _moments(self, x: Array, axes: Axes, tile: Tile, eps: float, center: bool) -> Stats:
        """The statistics, by a kernel that does nothing else, and another for several parts."""
        stats, split = self._stats(x, axes), tile.parts > 1
        partials = self.device.empty(axes.groups * tile.parts, MOMENTS) if split else None
        wide = ARITHMETIC[_dtype(x)]
        prepared = planner.forward(planner.bare(tile), REDUCE, _dtype(x), wide, eps, center)
        self.device.launch(prepared(x, None, None, None, *_order(stats), partials))
        if partials is not None:
            prepared = planner.finish_moments(axes.groups, tile.parts, eps)
            self.device.launch(prepared(partials, *_order(stats)))
        return stats

    def _tile(self, axes: Axes, part: int, affine: bool, x: Array, *others: Array | None) -> Tile:
        address = self.device.address
        aligned = not any(address(a) % 16 for a in (x, *others) if a is not None)
        return planner.tile(axes, x.dtype.itemsize, aligned, part, affine)

    def _stats(self, x: Array, axes: Axes) -> Stats:
        empty, groups, wide = self.device.empty, axes.groups, x.dtype == np.float64
        mean, rstd, var = (empty(groups, np.float64) for _ in range(3))
        return Stats(mean, rstd, var, empty(groups, np.float64) if wide else None)


@dataclass(frozen=True)
class _Gradients:
    """One call of `gradients`, with dy of x's dtype and gamma of one that the kernels take."""

    device: Device
    axes: Axes
    stats: Stats
    dy: Array
    x: Array
    dx: Array
    gamma: Array | None
    center: bool
    frozen: bool

    def run(self, tile: Tile, affine: bool, choose: Any) -> tuple[Array, Array] | None:
        axes, arrays = self.axes, (self.x, self.dy, self.dx, self.gamma)
        split = choose(axes, APPLY_PART, self.gamma is not None, *arrays)
        if self.frozen and not affine:
            self.launch(split, APPLY, None, None)
            return None
        cells = tile if tile.mode == FIXED else None
        if cells is None and (pieces := planner.pieces(axes)) is not None:
            cells = choose(pieces, PART, True, *arrays)
        if cells is not None:  # the sums of cells serve both dx and the parameters
            table = self.by_cells(cells, split, affine)
            return self.fold_cells(table, cells) if affine else None
        rows = planner.with_params(tile) if affine and not self.frozen else None
        if rows is not None:
            blocks = min(rows.grid[0], 2 * self.device.limits.sms)
            table = self.device.empty(blocks * axes.params, PAIR)
            self.launch(rows, BOTH | PARAMS, table, None, blocks)
            return self.fold(table, blocks, axes.params, 1)
        if self.frozen:
            self.launch(split, APPLY, None, None)
        else:
            self.by_cells(tile, split, False)
        if not affine:
            return None
        cross = choose(planner.crossed(axes), PART, False, self.x, self.dy)
        table = self.device.empty(cross.parts * cross.cells, PAIR)
        self.launch(cross, REDUCE | CROSS, table, None)
        return self.fold_cells(table, cross)

    def by_cells(self, tile: Tile, split: Tile, keep: bool) -> Array | None:
        """Write dx by way of the sums of cells, which are returned."""
        axes, whole = self.axes, tile.parts == 1 and tile.geometry[:4] == self.axes[:4]
        table = self.device.empty(tile.parts * tile.cells, PAIR) if keep or not whole else None
        self.launch(tile, BOTH if whole else REDUCE, table, None)
        if not whole:
            means = None
            if not self.frozen:
                gamma = self.gamma if tile.mode == FIXED else None  # else the sums have it
                means = self.device.empty(axes.groups, PAIR)
                prepared = planner.finish_gradients(tile, _dtype(self.x, gamma), axes)
                self.device.launch(prepared(table, means, gamma))
            self.launch(split, APPLY, None, means)
        return table

    def launch(
        self, tile: Tile, stage: int, cells: Array | None, means: Array | None, blocks: int = 0
    ) -> None:
        fixed = tile.mode == FIXED and stage & BOTH == REDUCE  # gamma comes in with `finish`
        gamma = None if fixed else self.gamma
        dtype, param = _dtype(self.x), _dtype(self.x, gamma)
        prepared = planner.backward(
            tile, stage, dtype, param, self.axes, self.center, self.frozen, blocks
        )
        arrays = self.x, self.dy, self.dx, gamma
        self.device.launch(prepared(*arrays, *_order(self.stats), cells, means))

    def fold_cells(self, table: Array, tile: Tile) -> tuple[Array, Array]:
        params = tile.geometry.params
        rows = tile.parts * tile.cells // (params * tile.within)
        return self.fold(table, rows, params, tile.within)

    def fold(self, table: Array, rows: int, params: int, within: int) -> tuple[Array, Array]:
        """dgamma and dbeta from the sums of cells."""
        dtype = ARITHMETIC[_dtype(self.x)]
        dgamma, dbeta = (self.device.empty(params, dtype) for _ in range(2))
        self.device.launch(planner.fold(dtype, rows, params, within)(table, dgamma, dbeta))
        return dgamma, dbeta


def _any(*arrays: Array | None) -> bool:
    return any(a is not None for a in arrays)


@cache
def _name(dtype: Any) -> str:  # NumPy spells it out anew each time
    return str(dtype.name)


def _dtype(x: Array, *params: Array | None) -> str:
    """x's dtype; given parameters, theirs, or where all are None that of the arithmetic."""
    for param in params:
        if param is not None:
            return _name(param.dtype)
    return ARITHMETIC[_name(x.dtype)] if params else _name(x.dtype)


def _params(tile: Tile, x: Array, *params: Array | None) -> tuple[Array | None, ...]:
    """gamma and beta in one dtype that the kernels take: that of x, or of the arithmetic."""
    given = {p.dtype for p in params if p is not None}
    if not given or (given == {x.dtype} and (tile.halves or x.dtype.itemsize > 2)):
        return params
    wide = ARITHMETIC[_name(x.dtype)]
    return tuple(None if p is None else p.astype(wide, copy=False) for p in params)


def _order(stats: Stats | None) -> tuple[Array | None, ...]:
    """NK_STATISTICS of kernels/forward.cuh."""
    if stats is None:
        return (None,) * 4
    return stats.mean, stats.residual, stats.rstd, stats.var


def __getattr__(attribute: str) -> Cuda:
    """`backend`, once it is asked for: plans can be read without CuPy."""
    if attribute != "backend":
        raise AttributeError(f"module {__name__!r} has no attribute {attribute!r}")
    from normkit.backends.cuda.device import CuPyDevice  # imports cupy

    globals()["backend"] = found = Cuda(CuPyDevice())
    return found
