"""PyTorch, eager and compiled; what it lacks, as an expression."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from benchmarks.cases import ROWS, Array, Case
from benchmarks.peers import Contestant

Tensor = torch.Tensor
EPS = 1e-5


def _norm(case: Case) -> Callable[..., Any]:
    """y of (x, gamma, beta, mean, spread); renorm's training gives the new mean and spread too."""
    shape, groups, train = (case.channels,), case.groups, case.training
    if case.norm == "batch_renorm":
        return _renorm if train else _frozen_renorm
    norms: dict[str, Callable[..., Tensor]] = {
        "batch_norm": lambda x, g, b, *running: functional.batch_norm(x, *running, g, b, train),
        "layer_norm": lambda x, g, b: functional.layer_norm(x, shape, g, b),
        "rms_norm": lambda x, g, b: functional.rms_norm(x, shape, g, EPS) + b,
        "instance_norm": lambda x, g, b: functional.instance_norm(x, weight=g, bias=b),
        "group_norm": lambda x, g, b: functional.group_norm(x, groups, g, b),
    }
    norm = norms[case.norm]
    if case.norm in ROWS and len(case.shape) > 2:
        return lambda x, g, b: norm(x.movedim(1, -1), g, b).movedim(-1, 1)
    return norm


def _by_channel(x: Tensor, *values: Tensor) -> Iterator[Tensor]:
    return (value.view(1, -1, *[1] * (x.ndim - 2)) for value in values)


def _renorm(x: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, spread: Tensor) -> Any:
    wide = x.to(mean.dtype)
    var, centre = torch.var_mean(wide, [0, *range(2, x.ndim)], correction=0)
    sigma = (var + EPS).sqrt()
    with torch.no_grad():
        r = (sigma / spread).clamp(1 / 3, 3)
        d = ((centre - mean) / spread).clamp(-5, 5)
        # not in place: a compiled backward pass computes r and d again
        after = mean.lerp(centre, 0.01), spread.lerp(sigma, 0.01)
    centre, scale, d, gamma, beta = _by_channel(x, centre, r / sigma, d, gamma, beta)
    return (((wide - centre) * scale + d) * gamma + beta).to(x.dtype), *after


def _frozen_renorm(x: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, spread: Tensor) -> Tensor:
    mean, scale, beta = _by_channel(x, mean, gamma / spread, beta)
    return ((x.to(mean.dtype) - mean) * scale + beta).to(x.dtype)


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
        return norm(*leaves, *running)

    def run_renorm() -> Tensor:
        y, *running[:] = norm(*leaves, *running)
        return y

    if case.norm == "batch_renorm" and case.training:
        run = run_renorm
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
