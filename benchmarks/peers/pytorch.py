"""PyTorch, eager and compiled; what it lacks, as an expression."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from benchmarks.cases import ROWS, Array, Case
from benchmarks.peers import Contestant

Tensor = torch.Tensor
EPS = 1e-5


def _norm(case: Case) -> Callable[..., Tensor]:
    """y of (x, gamma, beta, mean, spread); renorm's training gives the new mean and spread too."""

    def over_channels(x: Tensor, gamma: Tensor, beta: Tensor, *_: Any) -> Tensor:
        x = x.movedim(1, -1)
        if case.norm == "layer_norm":
            y = functional.layer_norm(x, (case.channels,), gamma, beta)
        else:
            y = functional.rms_norm(x, (case.channels,), gamma, EPS) + beta
        return y.movedim(-1, 1)

    def renorm(x: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, spread: Tensor) -> Any:
        axes, by_channel = [0, *range(2, x.ndim)], (1, -1, *[1] * (x.ndim - 2))
        wide = x.to(mean.dtype)
        if not case.training:
            y = (wide - mean.view(by_channel)) * (gamma / spread).view(by_channel)
            return (y + beta.view(by_channel)).to(x.dtype)
        var, centre = torch.var_mean(wide, axes, correction=0)
        sigma = (var + EPS).sqrt()
        with torch.no_grad():
            r = (sigma / spread).clamp(1 / 3, 3)
            d = ((centre - mean) / spread).clamp(-5, 5)
            # not in place: a compiled backward pass computes r and d again
            after = mean.lerp(centre, 0.01), spread.lerp(sigma, 0.01)
        xhat = (wide - centre.view(by_channel)) * (r / sigma).view(by_channel) + d.view(by_channel)
        return (xhat * gamma.view(by_channel) + beta.view(by_channel)).to(x.dtype), *after

    def native(x: Tensor, gamma: Tensor, beta: Tensor, *running: Tensor) -> Tensor:
        if case.norm == "batch_norm":
            return functional.batch_norm(x, *running, gamma, beta, case.training)
        if case.norm == "instance_norm":
            return functional.instance_norm(x, weight=gamma, bias=beta)
        return functional.group_norm(x, case.groups, gamma, beta)

    return over_channels if case.norm in ROWS else renorm if "renorm" in case.norm else native


def _tensor(array: Array) -> Tensor:
    """The same memory as a tensor."""
    if array.dtype.name == "bfloat16":  # which not every exchange of arrays knows
        return torch.from_dlpack(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_dlpack(array)


def _contestant(
    case: Case, given: dict[str, Array], wrap: Callable[[Any], Any] = lambda norm: norm
) -> Contestant:
    norm = wrap(_norm(case))
    tensors = {name: _tensor(array) for name, array in given.items()}
    leaves = [tensors[name] for name in ("x", "gamma", "beta")]
    running = [tensors[name].clone() for name in ("mean", "spread") if name in tensors]

    def arrays(result: Tensor | tuple[Tensor, ...]) -> tuple[Array, ...]:
        parts = result if isinstance(result, tuple) else (result,)
        from_dlpack = np.from_dlpack
        if leaves[0].is_cuda:
            import cupy

            from_dlpack = cupy.from_dlpack
        return tuple(from_dlpack(part.detach().double()) for part in parts)

    def run() -> Tensor:
        if case.norm != "batch_renorm" or not case.training:
            return norm(*leaves, *running)
        y, *running[:] = norm(*leaves, *running)
        return y

    if not case.training:
        return Contestant(torch.no_grad()(run), arrays)
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    if case.direction == "forward":
        return Contestant(run, arrays)
    y, dy = run(), tensors["dy"]
    return Contestant(lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True), arrays)


def eager(case: Case, given: dict[str, Array]) -> Contestant:
    return _contestant(case, given)


def compiled(case: Case, given: dict[str, Array]) -> Contestant:
    """Compiled afresh, for this very shape."""
    import torch._functorch.config as config

    torch._dynamo.reset()
    config.donated_buffer = False  # else a graph can be walked only once
    return _contestant(case, given, lambda norm: torch.compile(norm, dynamic=False))
