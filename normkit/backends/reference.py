"""The executable specification: plain array code in the widest type, for NumPy and CuPy alike."""

from __future__ import annotations

from typing import Any

import numpy as np

from normkit.axes import Axes
from normkit.backends.base import Array, Backend, Stats

_quiet = np.errstate(all="ignore")  # an inf or NaN in x is no news


def _wide(array: Array) -> Array:
    """`array` in the library's widest type: longdouble on NumPy, float64 elsewhere."""
    wide = array.astype(np.float64)  # bfloat16 knows the way to float64 only
    return wide.astype(np.longdouble) if isinstance(array, np.ndarray) else wide


def _grouped(array: Array, axes: Axes) -> Array:
    return _wide(array).reshape(axes[:4])


def _by_group(values: Array, axes: Axes) -> Array:
    return values.reshape(axes.k0, 1, axes.k1, 1)


def _xhat(x: Array, axes: Axes, stats: Stats) -> Array:
    centred = _grouped(x, axes) - _by_group(stats.mean, axes)
    if stats.residual is not None:
        centred = centred - _by_group(stats.residual, axes)
    return centred * _by_group(stats.rstd, axes)


def _by_param(values: Array | None, axes: Axes, default: float) -> Any:
    """A (params,) array that broadcasts against x of shape (-1, params, span)."""
    return default if values is None else _wide(values).reshape(1, axes.params, 1)


class Reference(Backend):
    name = "reference"
    arrays = ("numpy", "cupy")

    @_quiet
    def moments(self, x: Array, axes: Axes, *, eps: float, center: bool) -> Stats:
        x = _grouped(x, axes)
        residual = mean = np.zeros_like(x[:, :1, :, :1])
        if center:
            mean = x.mean(axis=(1, 3), keepdims=True)
            residual = (x - mean).mean(axis=(1, 3), keepdims=True)  # what rounding left out
        var = ((x - mean - residual) ** 2).mean(axis=(1, 3)).ravel()
        return Stats(mean.ravel(), 1 / (var + eps) ** 0.5, var, residual.ravel())

    @_quiet
    def normalize(
        self, x: Array, axes: Axes, stats: Stats, gamma: Array | None, beta: Array | None, y: Array
    ) -> None:
        xhat = _xhat(x, axes, stats).reshape(-1, axes.params, axes.span)
        result = xhat * _by_param(gamma, axes, 1.0) + _by_param(beta, axes, 0.0)
        y[...] = result.astype(y.dtype).reshape(y.shape)

    @_quiet
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
        affine: tuple[Any, Any] | None,
    ) -> tuple[Array, Array] | None:
        xhat = _xhat(x, axes, stats)
        wide_dy = _wide(dy).reshape(-1, axes.params, axes.span)
        g = (wide_dy * _by_param(gamma, axes, 1.0)).reshape(axes[:4])
        if not frozen:
            mean = g.mean(axis=(1, 3), keepdims=True) if center else 0
            g = g - mean - xhat * (g * xhat).mean(axis=(1, 3), keepdims=True)
        dx[...] = (g * _by_group(stats.rstd, axes)).astype(dx.dtype).reshape(dx.shape)
        if not affine:
            return None
        by_param = xhat.reshape(-1, axes.params, axes.span)
        return (wide_dy * by_param).sum(axis=(0, 2)), wide_dy.sum(axis=(0, 2))

    def about(self) -> dict[str, str]:
        return {"version": np.__version__}


backend = Reference()
