"""JAX: the expression, jitted; on channels-last memory, as an NHWC array."""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
from jax import numpy as jnp

from benchmarks.cases import Array, Case
from benchmarks.peers import Contestant
from benchmarks.peers.expression import forward

jax.config.update("jax_enable_x64", True)


def contestant(case: Case, given: dict[str, Array]) -> Contestant:
    channel = len(case.shape) - 1 if case.layout == "NHWC" else 1

    def in_memory(array: Array) -> Any:
        return jnp.asarray(np.moveaxis(array, 1, channel) if array.ndim > 1 else array)

    def arrays(result: Any) -> tuple[Array, ...]:
        parts = (np.asarray(part) for part in jax.tree.leaves(result))
        return tuple(np.moveaxis(p, channel, 1) if p.ndim > 1 else p for p in parts)

    moved = {name: in_memory(array) for name, array in given.items()}
    dy = moved.pop("dy")

    def norm(given: dict[str, Any]) -> Any:
        y, after, _ = forward(jnp, case, given, channel, jax.lax.stop_gradient)
        return y, after

    if case.direction != "backward":
        jitted = jax.jit(norm)
        return Contestant(lambda: jax.block_until_ready(jitted(moved)), lambda got: arrays(got[0]))

    rest = {name: array for name, array in moved.items() if name not in ("x", "gamma", "beta")}

    def y(x: Any, gamma: Any, beta: Any) -> Any:
        return norm({"x": x, "gamma": gamma, "beta": beta} | rest)

    @jax.jit
    def both(*leaves: Any) -> Any:
        return jax.vjp(y, *leaves, has_aux=True)

    _, pullback, _ = both(moved["x"], moved["gamma"], moved["beta"])
    back = jax.jit(lambda pullback, dy: pullback(dy))
    return Contestant(lambda: jax.block_until_ready(back(pullback, dy)), arrays)
