"""Normalization axes: the only place that knows what an axis is.

Every norm is the same sentence: *statistics are kept over some axes and reduced over the others*.
Walk through a dense array in memory order, merge neighbouring axes of one role, drop axes of
size 1, and what is left is at most ``keep, reduce, keep, reduce``::

    batch norm of a C-ordered NCHW array (statistics per channel)

        axis        N        C        H        W
        role      reduce    keep    reduce   reduce
                    |        |        \\________/
        k0 = 1   r0 = N   k1 = C      r1 = H*W

        memory   |<-- r1 -->|<-- r1 -->| ...          one row of k1 runs for each of the r0 steps
                 [ channel 0 | channel 1 | ... ][ channel 0 | channel 1 | ... ] ...
                 gamma[0]    gamma[1]           gamma[0]          ((i // span) % params, span = H*W)

The element at flat memory position ``i`` belongs to group ``(i // (r0*k1*r1), i // r1 % k1)`` and
takes the affine parameter ``(i // span) % params``. These six integers are all that a backend sees:

    ============================  ====================  ============
    norm, memory layout           k0, r0, k1, r1        params, span
    ============================  ====================  ============
    layer, rms: last axis         M, 1, 1, N            N, 1
    instance NCHW                 N*C, 1, 1, HW         C, HW
    group NCHW                    N*G, 1, 1, C/G*HW     C, HW
    batch NCHW                    1, N, C, HW           C, HW
    batch NHWC, or (N, C)         1, N*HW, C, 1         C, 1
    instance NHWC                 N, HW, C, 1           C, 1
    group NHWC                    N, HW, G, C/G         C, 1
    layer over C of NCHW          N, C, HW, 1           C, HW
    ============================  ====================  ============

A channels-last view is thus the same norm with other integers, and nothing is ever transposed.
The rare rest takes one copy: an array with gaps or repeated elements (sliced, broadcast), and an
array whose roles alternate more often than keep, reduce, keep, reduce. Parameters on axes that are
not neighbours in memory are expanded over the axes between them; x stays where it is.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

Ints = tuple[int, ...]
ALTERNATING = "its kept and reduced axes alternate more often than keep-reduce-keep-reduce"


class Axes(NamedTuple):
    """The six integers: all a backend needs to know of a norm's geometry."""

    k0: int
    r0: int
    k1: int
    r1: int
    params: int
    span: int

    @property
    def groups(self) -> int:
        """Number of separately normalised groups."""
        return self.k0 * self.k1

    @property
    def group_size(self) -> int:
        """Elements in a group: the m of the formulas."""
        return self.r0 * self.r1


class Roles(NamedTuple):
    """What a norm does with each axis of x, after a channel axis has been split in groups."""

    shape: Ints  #: shape of x, its channel axis split in (groups, channels of a group) if need be
    reduced: Ints  #: axes that statistics are reduced over, ascending
    params: Ints  #: axes that gamma and beta have, ascending
    split: tuple[int, int] | None = None  #: (axis, groups): how `shape` differs from that of x


Rule = Callable[..., Roles]


def _axis(axis: object, ndim: int, argument: str) -> int:
    if isinstance(axis, bool) or not hasattr(axis, "__index__"):
        raise TypeError(f"{argument}={axis!r} must be an int, not {type(axis).__name__}")
    index = operator.index(axis)
    if not -ndim <= index < ndim:
        raise ValueError(
            f"{argument}={index} is out of range for an array of {ndim} axes: "
            f"expected {-ndim} to {ndim - 1}"
        )
    return index % ndim


def _axis_tuple(axes: object, ndim: int, argument: str) -> Ints:
    if not isinstance(axes, tuple):
        return (_axis(axes, ndim, argument),)
    if not axes:
        raise ValueError(f"{argument}=() is empty: name at least one axis")
    found = [_axis(a, ndim, argument) for a in axes]
    if len(set(found)) < len(found):
        raise ValueError(f"{argument}={axes!r} names an axis twice: name each axis once")
    return tuple(sorted(found))


def over(shape: Ints, axis: object, param_axis: object = None) -> Roles:
    """Reduce over `axis`; parameters along `param_axis` (layer and RMS norm)."""
    reduced = _axis_tuple(axis, len(shape), "axis")
    params = reduced if param_axis is None else _axis_tuple(param_axis, len(shape), "param_axis")
    return Roles(shape, reduced, params)


def per_channel(shape: Ints, channel_axis: object) -> Roles:
    """Reduce over every axis but the channel axes (batch norm and renorm)."""
    if len(shape) == 1:
        raise ValueError(
            f"x has one axis only (shape {shape}), which cannot be both batch and channel: "
            "pass x[:, None] for one channel"
        )
    channels = _axis_tuple(channel_axis, len(shape), "channel_axis")
    return Roles(shape, tuple(a for a in range(len(shape)) if a not in channels), channels)


def per_sample(shape: Ints, channel_axis: object, groups: int | None = None) -> Roles:
    """Reduce over every axis but 0 and the channel axis, or a group of it (instance, group)."""
    if isinstance(channel_axis, tuple):
        raise TypeError(f"channel_axis={channel_axis!r} must be an int, not a tuple")
    if len(shape) < 2:
        raise ValueError(f"x has shape {shape}: expected a batch axis and a channel axis at least")
    axis = _axis(channel_axis, len(shape), "channel_axis")
    if axis == 0:
        raise ValueError(
            f"channel_axis={channel_axis!r} is the batch axis of x (shape {shape}): "
            "name another axis"
        )
    rest = tuple(a for a in range(1, len(shape)) if a != axis)
    if groups is None:
        return Roles(shape, rest, (axis,))
    channels = shape[axis]
    if groups < 1:
        raise ValueError(f"num_groups={groups} must be a positive int")
    if channels % groups:
        raise ValueError(
            f"num_groups={groups} does not divide the {channels} channels of axis {axis} "
            f"(x has shape {shape})"
        )
    split = (*shape[:axis], int(groups), channels // groups, *shape[axis + 1 :])
    rest = tuple(sorted({axis + 1, *(a if a < axis else a + 1 for a in rest)}))
    return Roles(split, rest, (axis, axis + 1), (axis, int(groups)))


def per_channel_of_samples(shape: Ints, channel_axis: object) -> Roles:
    """As `per_channel`, for what `per_sample` accepts (instance norm by given statistics)."""
    per_sample(shape, channel_axis)
    return per_channel(shape, channel_axis)


@dataclass(frozen=True)
class Layout:
    """How the axes of one norm lie in the memory of one array.

    Backends work on C-contiguous arrays in memory order. `view` shows an array that way, and the
    other methods bring parameters and per-group statistics to that order and back.
    """

    axes: Axes
    roles: Roles
    order: Ints  #: axes of `roles.shape` as they lie in memory
    window: Ints  #: the neighbouring axes that the packed parameters span, in memory order
    param_shape: Ints  #: the shape that gamma and beta must have
    kept: Ints  #: axes that statistics are kept over, in memory order
    copies: str  #: why x has to be copied; "" for a layout that fits

    def view(self, array: Any) -> Any:
        """`array` (of x's shape) with its axes in memory order: a view."""
        if self.roles.split:
            array = array.reshape(self.roles.shape)  # one axis cut in two: never a copy
        return array.transpose(self.order)

    def view_param(self, param: Any) -> Any:
        """gamma or beta with its axes in memory order, and one element on axes it lacks: a view."""
        shape, wide = self.roles.shape, [a for a in self.roles.params if self.roles.shape[a] != 1]
        array = param.reshape([shape[a] for a in wide])
        array = array.transpose([wide.index(a) for a in self.window if a in wide])
        return array.reshape([shape[a] if a in wide else 1 for a in self.window])

    def pack_param(self, param: Any, xp: Any) -> Any:
        """gamma or beta as a contiguous (params,) array in memory order."""
        whole = [self.roles.shape[a] for a in self.window]
        array = xp.broadcast_to(self.view_param(param), whole)
        return xp.ascontiguousarray(array).reshape(-1)

    def unpack_param(self, grad: Any) -> Any:
        """The gradient of `pack_param`: sums over axes that it expanded."""
        shape, wide = self.roles.shape, [a for a in self.roles.params if self.roles.shape[a] != 1]
        array = grad.reshape([shape[a] for a in self.window])
        array = array.sum(axis=tuple(i for i, a in enumerate(self.window) if a not in wide))
        inside = [a for a in self.window if a in wide]
        return array.transpose([inside.index(a) for a in wide]).reshape(self.param_shape)

    def pack_groups(self, values: Any, xp: Any) -> Any:
        """One value a group, shaped like x at the kept axes, as a (groups,) array."""
        kept = self.kept
        if len(kept) == 1:
            return xp.ascontiguousarray(values)
        array = values.reshape([self.roles.shape[a] for a in sorted(kept)])
        return xp.ascontiguousarray(array.transpose([sorted(kept).index(a) for a in kept])).ravel()

    def unpack_groups(self, values: Any) -> Any:
        """A (groups,) array shaped like x at the kept axes, ascending."""
        kept = self.kept
        if len(kept) == 1:
            return values
        array = values.reshape([self.roles.shape[a] for a in kept])
        return array.transpose([kept.index(a) for a in sorted(kept)])


def _fold(order: Ints, roles: Roles) -> tuple[int, int, int, int] | None:
    """(k0, r0, k1, r1) of axes in memory order, or None if their roles alternate too often."""
    runs: list[list[int]] = []  # [is reduced, size]
    for a in order:
        if roles.shape[a] != 1:
            if runs and runs[-1][0] == (a in roles.reduced):
                runs[-1][1] *= roles.shape[a]
            else:
                runs.append([a in roles.reduced, roles.shape[a]])
    slots = [1, 1, 1, 1]
    slot = 0
    for i, (reduced, size) in enumerate(runs):
        slot += slot % 2 != reduced
        if reduced and i == len(runs) - 1:
            slot = max(slot, 3)  # a trailing reduction runs along memory: r1
        if slot > 3:
            return None
        slots[slot] = size
        slot += 1
    return slots[0], slots[1], slots[2], slots[3]


@lru_cache(maxsize=8192, typed=True)
def layout(shape: Ints, strides: Ints, itemsize: int, rule: Rule, *args: object) -> Layout:
    """The layout of an array for the norm whose axes `rule(shape, *args)` names."""
    roles = rule(shape, *args)
    sizes = roles.shape
    if roles.split:
        axis, groups = roles.split
        inner = strides[axis] * (shape[axis] // groups)
        strides = (*strides[:axis], inner, strides[axis], *strides[axis + 1 :])

    order = tuple(sorted(range(len(sizes)), key=lambda a: -abs(strides[a])))
    copies, step = "", itemsize
    for a in reversed(order):
        if sizes[a] != 1 and strides[a] != step:
            copies = "its elements do not lie side by side (gaps, repeats or reversed axes)"
            break
        step *= sizes[a]
    folded = _fold(order, roles)
    if folded is None:
        copies = ALTERNATING
        order = tuple(sorted(order, key=lambda a: a in roles.reduced))
        folded = _fold(order, roles)
        assert folded is not None

    at = [i for i, a in enumerate(order) if a in roles.params and sizes[a] != 1]
    window = order[at[0] : at[-1] + 1] if at else ()
    params = prod(sizes[a] for a in window)
    span = prod(sizes[a] for a in order[at[-1] + 1 :]) if at else prod(sizes)
    axes = Axes(*folded, params, span)
    if roles.split:
        param_shape: Ints = (shape[roles.split[0]],)
    else:
        param_shape = tuple(shape[a] for a in roles.params)
    kept = tuple(a for a in order if a not in roles.reduced)
    return Layout(axes, roles, order, window, param_shape, kept, copies)
