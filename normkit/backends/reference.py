"""The executable specification: plain array code in the widest type, for NumPy and CuPy alike."""

from __future__ import annotations

from typing import Any

import numpy as np

from normkit.axes import Axes
from normkit.backends.base import Array, Backend, Stats


def _wide(array: Array) -> Array:
    """`array` in the library's widest type: longdouble on NumPy, float64 elsewhere."""
    wide = array.astype(np.float64)  # bfloat16 knows the way to float64 only
    return wide.astype(np.longdouble) if isinstance(array, np.ndarray) else wide


def _grouped(array: Array, axes: Axes) -> Array:
    return _wide(array).reshape(axes[:4])


def _by_group(values: Array, axes: Axes) -> Array:
    return values.reshape(axes.k0, 1, axes.k1, 1)


def _by_param(values: Array | None, axes: Axes, default: float) -> Any:
    """A (params,) array that broadcasts against x of shape (-1, params, span)."""
    return default if values is None else _wide(values).reshape(1, axes.params, 1)


class Reference(Backend):
    name = "reference"
    arrays = ("numpy", "cupy")

    def moments(self, x: Array, axes: Axes, *, eps: float, center: bool) -> Stats:
        x = _grouped(x, axes)
        mean = x.mean(axis=(1, 3), keepdims=True) * center
        var = ((x - mean) ** 2).mean(axis=(1, 3))
        return Stats(mean.ravel(), 1 / (var.ravel() + eps) ** 0.5, var.ravel())

    def normalize(
        self, x: Array, axes: Axes, stats: Stats, gamma: Array | None, beta: Array | None, y: Array
    ) -> None:
        xhat = (_grouped(x, axes) - _by_group(stats.mean, axes)) * _by_group(stats.rstd, axes)
        xhat = xhat.reshape(-1, axes.params, axes.span)
        result = xhat * _by_param(gamma, axes, 1.0) + _by_param(beta, axes, 0.0)
        y[...] = result.astype(y.dtype).reshape(y.shape)

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
        rstd = _by_group(stats.rstd, axes)
        xhat = (_grouped(x, axes) - _by_group(stats.mean, axes)) * rstd
        wide_dy = _wide(dy).reshape(-1, axes.params, axes.span)
        g = (wide_dy * _by_param(gamma, axes, 1.0)).reshape(axes[:4])
        if not frozen:
            g = g - xhat * (g * xhat).mean(axis=(1, 3), keepdims=True) - (
                g.mean(axis=(1, 3), keepdims=True) * center
            )
        dx[...] = (g * rstd).astype(dx.dtype).reshape(dx.shape)
        if not affine:
            return None
        by_param = xhat.reshape(-1, axes.params, axes.span)
        return (wide_dy * by_param).sum(axis=(0, 2)), wide_dy.sum(axis=(0, 2))


backend = Reference()
