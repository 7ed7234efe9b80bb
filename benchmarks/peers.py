"""Who is timed: each peer turns a case into a function to call, on inputs of its own kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

import normkit as nk
from benchmarks.cases import Case

Run = Callable[[], Any]


def inputs(case: Case) -> dict[str, np.ndarray]:
    """Fresh random inputs of a case, float32 in NCHW order."""
    rng = np.random.default_rng()
    arrays = {name: rng.normal(size=case.shape).astype("float32") for name in ("x", "dy")}
    for name, low in (("gamma", 0.5), ("beta", -0.5), ("mean", -0.5), ("var", 0.5)):
        arrays[name] = rng.uniform(low, low + 1, case.params).astype("float32")
    return arrays


def normkit(case: Case, arrays: dict[str, np.ndarray]) -> Run:
    """normkit on NumPy arrays."""
    dtype = ml_dtypes.bfloat16 if case.dtype == "bfloat16" else case.dtype
    x, dy = (_layout(arrays[name].astype(dtype), case) for name in ("x", "dy"))
    param_dtype = dtype if case.param_dtype == case.dtype else case.param_dtype
    gamma, beta = (arrays[name].astype(param_dtype) for name in ("gamma", "beta"))
    options: dict[str, Any] = dict(case.options)
    if case.norm in ("batch", "batch_renorm"):
        spread = "running_var" if case.norm == "batch" else "running_std"
        options |= {"running_mean": arrays["mean"].copy(), spread: arrays["var"].copy()}
    if case.direction == "inference":
        if case.norm in ("batch", "batch_renorm"):
            options["training"] = False
        return lambda: nk.normalize(x, case.norm, gamma, beta, **options)
    if case.direction == "forward":
        return lambda: nk.vjp(nk.normalize, x, case.norm, gamma, beta, **options)[0]
    _, pullback = nk.vjp(nk.normalize, x, case.norm, gamma, beta, **options)
    return lambda: tuple(pullback(dy))


def _layout(array: np.ndarray, case: Case) -> np.ndarray:
    if not case.channels_last:
        return array
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(array, 1, -1)), -1, 1)


def torch(case: Case, arrays: dict[str, np.ndarray]) -> Run:
    """PyTorch eager on the CPU; Batch Renormalization, which it lacks, as an expression."""
    import torch
    from torch.nn import functional as F

    form = torch.channels_last if case.channels_last else torch.contiguous_format
    train = case.direction != "inference"

    def tensor(name: str, needs_grad: bool = False) -> torch.Tensor:
        dtype = case.param_dtype if name in ("gamma", "beta") else case.dtype
        found = torch.from_numpy(arrays[name]).to(getattr(torch, dtype))
        if len(case.shape) == 4 and found.ndim == 4:
            found = found.contiguous(memory_format=form)
        return found.detach().clone(memory_format=torch.preserve_format).requires_grad_(needs_grad)

    x, gamma, beta = (tensor(name, train) for name in ("x", "gamma", "beta"))
    mean, var = (torch.from_numpy(arrays[name].copy()) for name in ("mean", "var"))
    dy = tensor("dy")

    def renorm() -> torch.Tensor:
        by_channel = (1, -1, 1, 1)
        if not train:
            scale = gamma / var
            return x * scale.view(by_channel).to(x.dtype) + (beta - mean * scale).view(
                by_channel
            ).to(x.dtype)
        batch_var, batch_mean = torch.var_mean(x.float(), (0, 2, 3), correction=0)
        sigma = (batch_var + 1e-5).sqrt()
        r = (sigma / var).clamp(1 / 3, 3).detach()
        d = ((batch_mean - mean) / var).clamp(-5, 5).detach()
        mean.lerp_(batch_mean.detach(), 0.01)
        var.lerp_(sigma.detach(), 0.01)
        xhat = (x - batch_mean.view(by_channel)) * (r / sigma).view(by_channel)
        y = (xhat + d.view(by_channel)) * gamma.view(by_channel) + beta.view(by_channel)
        return y.to(x.dtype)

    def run() -> torch.Tensor:
        if case.norm == "batch":
            return F.batch_norm(x, mean, var, gamma, beta, train)
        if case.norm == "batch_renorm":
            return renorm()
        if case.norm == "layer":
            return F.layer_norm(x, (case.params,), gamma, beta)
        if case.norm == "instance":
            return F.instance_norm(x, weight=gamma, bias=beta)
        if case.norm == "group":
            return F.group_norm(x, case.options["num_groups"], gamma, beta)
        return F.rms_norm(x, (case.params,), gamma, 1e-5) + beta

    if not train:
        return _without_grad(run)
    if case.direction == "forward":
        return run
    y = run()
    return lambda: torch.autograd.grad(y, (x, gamma, beta), dy, retain_graph=True)


def _without_grad(run: Run) -> Run:
    import torch

    return torch.no_grad()(run)


def outputs(result: Any) -> list[np.ndarray]:
    """A peer's result as float64 NumPy arrays, to be compared."""
    parts = result if isinstance(result, tuple) else (result,)
    arrays = []
    for part in parts:
        if not isinstance(part, np.ndarray):
            part = part.detach().float().numpy()
        arrays.append(part.astype(np.float64))
    return arrays
