"""The calls that the tests share: norms, shapes, options, their inputs and their meaning."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.util import find_spec
from typing import Any

import cuda_host
import ml_dtypes  # makes np.dtype("bfloat16") known
import numpy as np
import pytest

import normkit as nk

#: the backends with kernels of their own, here; the reference has none
KERNELS = ["numba"]
if find_spec("cupy"):
    KERNELS.append(pytest.param("cuda", marks=pytest.mark.gpu))
if os.environ.get("NORMKIT_FULL") == "1" and not cuda_host.unavailable():
    KERNELS.append("emulation")  # of the CUDA backend, on NumPy arrays: an hour or two
DTYPES = ["float16", "bfloat16", "float32", "float64"]
#: the norms that keep running statistics -> what the second of them is called
SPREAD = {
    "batch_norm": "running_var",
    "batch_renorm": "running_std",
    "instance_norm": "running_var",
}


@dataclass(frozen=True, eq=False)
class Case:
    """One call: a norm, the shape of x and options; `running` says whether statistics are kept."""

    norm: Callable[..., Any]
    shape: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)
    running: bool = True

    @property
    def name(self) -> str:
        return self.norm.__name__

    def __str__(self) -> str:
        options = [f"{k}={v}" for k, v in self.options.items()]
        options += ["no statistics"] * (self.name in SPREAD and not self.running)
        return f"{self.name}({', '.join([str(self.shape), *options])})".replace(" ", "")

    @property
    def training(self) -> bool:
        return self.options.get("training", True)

    @property
    def frozen(self) -> bool:
        """Whether the running statistics take the place of x's own."""
        return self.name in SPREAD and self.running and not self.training

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def axes(self, option: str, default: Any) -> tuple[int, ...]:
        """An option that names axes, as ascending non-negative ints."""
        given = self.options.get(option, default)
        given = given if isinstance(given, tuple) else (given,)
        return tuple(sorted(axis % len(self.shape) for axis in given))

    @cached_property
    def param_axes(self) -> tuple[int, ...]:
        if self.name in ("layer_norm", "rms_norm"):
            return self.axes("param_axis", self.options.get("axis", -1))
        return self.axes("channel_axis", 1)

    @property
    def param_shape(self) -> tuple[int, ...]:
        return tuple(self.shape[a] for a in self.param_axes)

    @property
    def kept(self) -> dict[int, int]:
        """The axes with more than one group, and how many neighbours along them share a group."""
        if self.name in ("layer_norm", "rms_norm"):
            reduced = self.axes("axis", -1)
            return {a: 1 for a in range(len(self.shape)) if a not in reduced}
        if self.name in ("batch_norm", "batch_renorm") or self.frozen:
            return dict.fromkeys(self.param_axes, 1)
        (axis,) = self.param_axes
        channels = self.shape[axis]
        return {0: 1, axis: channels // self.options.get("num_groups", channels)}

    @cached_property
    def groups(self) -> np.ndarray:
        """The number of the normalised group for every element of x, in the order of kept axes."""
        return self._number(self.kept)

    @cached_property
    def params(self) -> np.ndarray:
        """The index into the flat gamma and beta for every element of x."""
        return self._number(dict.fromkeys(self.param_axes, 1))

    def _number(self, kept: dict[int, int]) -> np.ndarray:
        number = np.zeros(self.shape, int)
        for axis, together in sorted(kept.items()):
            index = np.arange(self.shape[axis]) // together
            index = index.reshape([-1 if a == axis else 1 for a in range(len(self.shape))])
            number = number * (self.shape[axis] // together) + index
        return number

    def inputs(self, dtype: str) -> dict[str, np.ndarray]:
        """x, gamma, beta and dy, and the running statistics where they are kept."""
        rng = np.random.default_rng(self.size)
        made = {
            "x": (3 + 2 * rng.standard_normal(self.shape)).astype(dtype),
            "dy": rng.standard_normal(self.shape).astype(dtype),
            "gamma": (1 + rng.standard_normal(self.param_shape) / 2).astype(dtype),
            "beta": rng.standard_normal(self.param_shape).astype(dtype),
        }
        if self.name in SPREAD and self.running:
            wide = "float64" if dtype == "float64" else "float32"
            mean, spread = rng.uniform(1, 4, (2, *self.param_shape)).astype(wide)
            made |= {"running_mean": mean, SPREAD[self.name]: spread}
        return made

    def call(self, inputs: dict[str, Any], **options: Any) -> Any:
        """y; running statistics in `inputs` are updated in place."""
        x, gamma, beta, given = split(inputs)
        return self.norm(x, gamma, beta, **given, **self.options, **options)

    def vjp(self, inputs: dict[str, Any], **options: Any) -> Any:
        """y and the pullback."""
        x, gamma, beta, given = split(inputs)
        return nk.vjp(self.norm, x, gamma, beta, **given, **self.options, **options)

    def run(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Everything that forward and backward give."""
        y, pullback = self.vjp(inputs)
        dx, dgamma, dbeta = pullback(inputs["dy"])
        statistics = {k: v for k, v in inputs.items() if k.startswith("running")}
        return {"y": y, "dx": dx, "dgamma": dgamma, "dbeta": dbeta} | statistics


def split(inputs: dict[str, Any]) -> tuple[Any, Any, Any, dict[str, Any]]:
    given = {k: v for k, v in inputs.items() if k.startswith("running")}
    return inputs["x"], inputs.get("gamma"), inputs.get("beta"), given


def moments(case: Case, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(mean, biased variance, number of elements) of every group, from the definition."""
    groups = case.groups.ravel()
    count = np.bincount(groups)
    mean = np.bincount(groups, x.ravel()) / count * (case.name != "rms_norm")
    return mean, np.bincount(groups, (x.ravel() - mean[groups]) ** 2) / count, count


def formula(case: Case, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """y and the new running statistics, from the definition, in float64."""
    given = {k: v.astype(np.float64) for k, v in inputs.items()}
    eps, clip = case.options.get("eps", 1e-5), (1.0, 0.0)
    mean, var, m = moments(case, given["x"])
    std = np.sqrt(var + eps)
    new = {}
    if case.name in SPREAD and case.running:
        old_mean, old_spread = given["running_mean"].ravel(), given[SPREAD[case.name]].ravel()
        renorm = case.name == "batch_renorm"
        if not case.training:
            mean, std = old_mean, old_spread if renorm else np.sqrt(old_spread + eps)
        else:
            if renorm:
                clip = renorm_constants(case, mean, std, old_mean, old_spread)
            spread = std if renorm else var * m / (m - 1)
            momentum = case.options.get("momentum", 0.01 if renorm else 0.1)
            for name, old, value in (
                ("running_mean", old_mean, mean),
                (SPREAD[case.name], old_spread, spread),
            ):
                value = value.reshape(-1, old.size).mean(axis=0)  # instance norm: over samples
                new[name] = (old + momentum * (value - old)).reshape(case.param_shape)
    groups = case.groups
    r, d = (np.broadcast_to(v, mean.shape)[groups] for v in clip)
    xhat = (given["x"] - mean[groups]) / std[groups] * r + d
    y = xhat * given["gamma"].ravel()[case.params] + given["beta"].ravel()[case.params]
    return {"y": y} | new


def renorm_constants(
    case: Case, mean: np.ndarray, std: np.ndarray, old_mean: np.ndarray, old_std: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """r and d of Batch Renormalization, Algorithm 1."""
    r_max, d_max = case.options.get("r_max", 3.0), case.options.get("d_max", 5.0)
    return (
        np.clip(std / old_std, 1 / r_max, r_max),
        np.clip((mean - old_mean) / old_std, -d_max, d_max),
    )


def numpy(array: Any) -> np.ndarray:
    """On the host, whatever library it is of."""
    return array.get() if hasattr(array, "get") else array


def same_bits(a: Any, b: Any) -> bool:
    a, b = numpy(a), numpy(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def finfo(dtype: Any) -> Any:
    return ml_dtypes.finfo(dtype)


def _table() -> list[Case]:
    batch, renorm, layer = nk.batch_norm, nk.batch_renorm, nk.layer_norm
    instance, group, rms = nk.instance_norm, nk.group_norm, nk.rms_norm
    cases = []
    for norm in (batch, renorm):
        cases += [
            Case(norm, (17, 5)),
            Case(norm, (7, 1)),
            Case(norm, (2, 3, 49)),
            Case(norm, (3, 7, 5, 3)),
            Case(norm, (2, 3, 2, 3, 3)),
            Case(norm, (9, 4, 1, 1)),
            Case(norm, (1, 3, 1023)),
            Case(norm, (3, 1, 7, 7)),
            Case(norm, (3, 5, 3, 7), {"channel_axis": -1}),
            Case(norm, (5, 17), {"channel_axis": 0}),
            Case(norm, (4, 3, 5, 2), {"channel_axis": (1, 3)}),
            Case(norm, (4, 3, 2, 5), {"channel_axis": (0, 2)}),
            Case(norm, (6, 3, 2, 2), {"channel_axis": (1, 2, 3)}),
            Case(norm, (5, 9, 7, 7)),
            Case(norm, (5, 8, 6, 10)),
            Case(norm, (9, 9, 3, 21)),
            Case(norm, (3001, 17)),
            Case(norm, (17, 33, 9, 9)),
            Case(norm, (2, 3, 9001)),
        ]
    cases += [
        Case(batch, (3, 5, 2), {"eps": 0.25, "momentum": 0.75}),
        Case(batch, (3, 7, 5, 3), running=False),
        Case(batch, (1, 5), running=False),
        Case(renorm, (1, 5)),  # groups of one element
        Case(renorm, (3, 5, 2), {"r_max": 1.0, "d_max": 0.0, "eps": 0.25, "momentum": 0.75}),
        Case(renorm, (3, 5, 2), {"r_max": math.inf, "d_max": math.inf}),
        Case(renorm, (3, 5, 2), {"r_max": 1.25, "d_max": 0.5}),
    ]
    for norm in (layer, rms):
        cases += [
            Case(norm, (5, 7)),
            Case(norm, (1, 1023)),
            Case(norm, (7,)),
            Case(norm, (3, 4, 5), {"axis": (-2, -1)}),
            Case(norm, (4, 5, 3), {"axis": 0}),
            Case(norm, (3, 7, 4, 3), {"axis": 1}),
            Case(norm, (3, 4, 5, 2), {"axis": (1, 3)}),
            Case(norm, (3, 4, 5, 2), {"axis": (0, 2)}),
            Case(norm, (2, 3, 2, 3, 2), {"axis": (1, 3)}),
            Case(norm, (2, 3, 2, 3, 2), {"axis": (0, 2, 4)}),
            Case(norm, (3, 4, 5), {"axis": (0, 1, 2)}),
            Case(norm, (3, 4, 5), {"axis": (1, 2), "param_axis": 1}),
            Case(norm, (3, 4, 5), {"axis": (1, 2), "param_axis": 2}),
            Case(norm, (3, 4, 5), {"axis": 2, "param_axis": 1}),
            Case(norm, (3, 4, 5), {"axis": 2, "param_axis": 0}),
            Case(norm, (3, 4, 5), {"axis": 1, "param_axis": (0, 2)}),
            Case(norm, (3, 4, 5), {"axis": 2, "param_axis": (0, 1, 2)}),
            Case(norm, (3, 2, 4, 3), {"axis": (1, 2), "param_axis": (0, 3)}),
            Case(norm, (3, 4, 1), {"axis": (1, 2), "param_axis": 2}),
            Case(norm, (3, 1, 5), {"axis": (1, 2), "param_axis": (0, 1)}),
            Case(norm, (2, 70001)),
            Case(norm, (5000, 8)),
            Case(norm, (19, 16_389)),
            Case(norm, (3, 64, 300), {"axis": (1, 2), "param_axis": 2}),
            Case(norm, (3, 64, 500), {"axis": (1, 2), "param_axis": 2}),
            Case(norm, (70, 513), {"eps": 0.25}),
            Case(norm, (40, 33, 7), {"axis": 1}),
        ]
    cases += [
        Case(instance, (2, 3, 49)),
        Case(instance, (3, 2, 5, 3)),
        Case(instance, (2, 3, 2, 3, 3)),
        Case(instance, (3, 5, 3, 7), {"channel_axis": -1}),
        Case(instance, (3, 5, 3, 7), {"channel_axis": 2, "momentum": 0.75}),
        Case(instance, (3, 1, 17)),
        Case(instance, (1, 3, 1023)),
        Case(instance, (17, 33, 9, 9)),
        Case(instance, (2, 3, 9001)),
        Case(instance, (3, 5, 1, 1), running=False),
        Case(instance, (3, 5), running=False),
        Case(instance, (3, 2, 5, 3), running=False),
        Case(instance, (3, 2, 5, 3), {"training": False}, running=False),
    ]
    cases += [
        Case(group, (7, 6), {"num_groups": 2}),
        Case(group, (2, 6, 7), {"num_groups": 3}),
        Case(group, (3, 6, 5, 3), {"num_groups": 1}),
        Case(group, (3, 6, 5, 3), {"num_groups": 2}),
        Case(group, (3, 6, 5, 3), {"num_groups": 6}),
        Case(group, (2, 4, 2, 3, 3), {"num_groups": 2}),
        Case(group, (3, 5, 3, 6), {"num_groups": 3, "channel_axis": -1}),
        Case(group, (3, 5, 6, 2), {"num_groups": 2, "channel_axis": 2}),
        Case(group, (3, 1, 7), {"num_groups": 1}),
        Case(group, (3, 6), {"num_groups": 6}),
        Case(group, (9, 32, 9, 9), {"num_groups": 4}),
        Case(group, (2, 4, 9001), {"num_groups": 2}),
    ]
    return cases + [
        replace(case, options=case.options | {"training": False})
        for case in cases
        if case.name in SPREAD and case.running and not {"r_max", "momentum"} & set(case.options)
    ]


CASES = _table()
SMALL = [case for case in CASES if case.size <= 400]
