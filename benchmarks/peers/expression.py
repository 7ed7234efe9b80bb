"""The formulas as one writes them in array code: NumPy's and CuPy's contestant, and JAX's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.cases import BATCH, ROWS, Array, Case
from benchmarks.peers import Contestant, plain

EPS = 1e-5


def _axes(case: Case, channel: int) -> tuple[int, ...]:
    """What is reduced over, once a group norm's channels are split in two axes."""
    ndim = len(case.shape)
    if case.norm in ROWS:
        return (channel,)
    if case.norm == "group_norm":
        return tuple(a for a in range(1, ndim + 1) if a != channel)
    first = 0 if case.norm in BATCH else 1
    return tuple(a for a in range(first, ndim) if a != channel)


def _split(case: Case, array: Array, channel: int) -> Array:
    if case.norm != "group_norm":
        return array
    groups, shape = case.groups, array.shape
    inner = shape[channel] // groups
    return array.reshape(*shape[:channel], groups, inner, *shape[channel + 1 :])


def _by_channel(array: Array, ndim: int, channel: int) -> Array:
    return array.reshape([-1 if a == channel else 1 for a in range(ndim)])


def forward(
    xp: Any,
    case: Case,
    given: dict[str, Array],
    channel: int = 1,
    constant: Callable[[Array], Array] = lambda array: array,
) -> tuple[Any, ...]:
    """y, the running statistics after it, and what a gradient needs: (xhat, rstd, r, d).

    `constant` hides Batch Renormalization's r and d from a differentiation.
    """
    x, ndim = given["x"].astype(case.wide), len(case.shape)
    gamma, beta = (_by_channel(given[name], ndim, channel) for name in ("gamma", "beta"))
    old = [_by_channel(given[name], ndim, channel) for name in ("mean", "spread") if name in given]
    if case.running and not case.training:
        std = xp.sqrt(old[1] + EPS) if case.norm == "batch_norm" else old[1]
        y = (x - old[0]) * (gamma / std) + beta
        return y.astype(case.dtype), (), ()

    axes, whole = _axes(case, channel), x.shape
    x = _split(case, x, channel)
    mean = 0 if case.norm == "rms_norm" else x.mean(axis=axes, keepdims=True)
    centred = x - mean
    var = (centred * centred).mean(axis=axes, keepdims=True)
    std = xp.sqrt(var + EPS)
    rstd = 1 / std
    xhat = (centred * rstd).reshape(whole)
    r, d, after = 1, 0, ()
    if case.norm == "batch_norm":
        m = x.size // case.channels
        after = tuple(
            (a + 0.1 * (b - a)).ravel()
            for a, b in zip(old, (mean, var * (m / (m - 1))), strict=True)
        )
    if case.norm == "batch_renorm":
        r = constant(xp.clip(std / old[1], 1 / 3, 3))
        d = constant(xp.clip((mean - old[0]) / old[1], -5, 5))
        after = tuple((a + 0.01 * (b - a)).ravel() for a, b in zip(old, (mean, std), strict=True))
    shifted = xhat * r + d if case.norm == "batch_renorm" else xhat
    y = shifted * gamma + beta
    return y.astype(case.dtype), after, (xhat, rstd, r, d)


def backward(case: Case, given: dict[str, Array], saved: tuple[Any, ...]) -> tuple[Array, ...]:
    """dx, dgamma, dbeta."""
    xhat, rstd, r, d = saved
    dy, gamma = given["dy"].astype(case.wide), given["gamma"]
    g = dy * _by_channel(gamma, dy.ndim, 1)
    axes = _axes(case, 1)
    g, split = _split(case, g, 1), _split(case, xhat, 1)
    mean = 0 if case.norm == "rms_norm" else g.mean(axis=axes, keepdims=True)
    dx = (g - mean - split * (g * split).mean(axis=axes, keepdims=True)) * (rstd * r)
    rest = tuple(a for a in range(dy.ndim) if a != 1)
    shifted = xhat * r + d if case.norm == "batch_renorm" else xhat
    dgamma, dbeta = (dy * shifted).sum(axis=rest), dy.sum(axis=rest)
    return (
        dx.reshape(dy.shape).astype(case.dtype),
        dgamma.astype(gamma.dtype),
        dbeta.astype(gamma.dtype),
    )


def contestant(case: Case, given: dict[str, Array]) -> Contestant:
    """By NumPy, or by CuPy where the arrays are its own."""
    import numpy

    xp = numpy
    if not isinstance(given["x"], numpy.ndarray):
        import cupy

        xp = cupy
    if case.direction == "backward":
        saved = forward(xp, case, given)[2]
        return Contestant(lambda: backward(case, given, saved), plain)
    return Contestant(lambda: forward(xp, case, given)[0], plain)
