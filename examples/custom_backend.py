"""A backend of one's own: normkit's norms on the arrays of a library that it has never heard of.

It computes with the functions of the array API standard and nothing else, so it serves any library
that follows the standard and whose arrays can be written to: here the standard's own test library.
A backend knows no axes and no norms: x is (k0, r0, k1, r1), kept and reduced in turn, and gamma is
(params,), each repeated over `span` elements (see normkit/axes.py).
"""

from typing import Any

import array_api_strict

import normkit as nk
from normkit.axes import Axes
from normkit.backends.base import Backend, Stats
from normkit.testing import check_backend

Array = Any


class Standard(Backend):
    """Norms in the functions of an array API namespace, computed in float64."""

    def __init__(self, xp: Any = array_api_strict, library: str = "array_api_strict") -> None:
        self.xp, self.name, self.arrays = xp, f"standard-{library}", (library,)

    def moments(self, x: Array, axes: Axes, *, eps: float, center: bool) -> Stats:
        x, mean_of = self.wide(x, axes[:4]), self.xp.mean
        mean = mean_of(x, axis=(1, 3), keepdims=True) if center else 0 * x[:, :1, :, :1]
        var = mean_of((x - mean) ** 2, axis=(1, 3))
        mean, var = (self.xp.reshape(a, (axes.groups,)) for a in (mean, var))
        return Stats(mean, 1 / (var + eps) ** 0.5, var)

    def normalize(
        self, x: Array, axes: Axes, stats: Stats, gamma: Array, beta: Array, y: Array
    ) -> None:
        xhat = self.xp.reshape(self.xhat(x, axes, stats), (-1, axes.params, axes.span))
        scale, shift = self.param(gamma, axes, 1.0), self.param(beta, axes, 0.0)
        self.write(y, xhat * scale + shift)

    def gradients(
        self,
        dy: Array,
        x: Array,
        axes: Axes,
        stats: Stats,
        gamma: Array,
        dx: Array,
        *,
        center: bool,
        frozen: bool,
        affine: Any,
    ) -> tuple[Array, Array] | None:
        xp, by_param = self.xp, (-1, axes.params, axes.span)
        xhat, dy = self.xhat(x, axes, stats), self.wide(dy, by_param)
        g = xp.reshape(dy * self.param(gamma, axes, 1.0), axes[:4])
        if not frozen:
            slope = xp.mean(g * xhat, axis=(1, 3), keepdims=True)
            g = g - (xp.mean(g, axis=(1, 3), keepdims=True) if center else 0) - xhat * slope
        self.write(dx, g * self.by_group(stats.rstd, axes))
        if not affine:
            return None
        xhat = xp.reshape(xhat, by_param)
        return xp.sum(dy * xhat, axis=(0, 2)), xp.sum(dy, axis=(0, 2))

    def wide(self, array: Array, shape: tuple[int, ...]) -> Array:
        return self.xp.reshape(self.xp.astype(array, self.xp.float64), shape)

    def by_group(self, values: Array, axes: Axes) -> Array:
        return self.xp.reshape(values, (axes.k0, 1, axes.k1, 1))

    def xhat(self, x: Array, axes: Axes, stats: Stats) -> Array:
        mean, rstd = (self.by_group(a, axes) for a in (stats.mean, stats.rstd))
        return (self.wide(x, axes[:4]) - mean) * rstd

    def param(self, values: Array, axes: Axes, default: float) -> Array:
        return default if values is None else self.wide(values, (1, axes.params, 1))

    def write(self, target: Array, values: Array) -> None:
        target[...] = self.xp.astype(self.xp.reshape(values, target.shape), target.dtype)


if __name__ == "__main__":
    # A package has this line in its pyproject.toml instead:
    #   [project.entry-points."normkit.backends"]
    #   array_api_strict = "custom_backend:Standard"
    nk.register_backend(Standard)

    xp = array_api_strict
    x = xp.reshape(xp.arange(24, dtype=xp.float32), (2, 4, 3))
    mean, var = xp.zeros(4), xp.ones(4)
    y, pullback = nk.vjp(nk.batch_norm, x, running_mean=mean, running_var=var)
    print(f"batch_norm of {x.dtype}: y of {y.dtype}, running mean {mean}")
    print(f"dx {pullback(y).x[0, 0, :]}")

    results = check_backend("standard-array_api_strict", xp)
    worst = max(result.error for result in results if result.dtype == "float32")
    print(f"{len(results)} checks passed; the largest error in float32 is {worst:.0e}")
