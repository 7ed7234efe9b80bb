"""The CUDA backend's plans and kernels, run on the host, against the reference backend."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from itertools import product
from math import prod
from typing import Any
from unittest import mock

import ml_dtypes  # noqa: F401  (makes np.dtype("bfloat16") known)
import numpy as np
import oracles
import pytest
import test_oracles
from cuda_host import HostDevice, Launch, unavailable

import normkit as nk
from normkit.axes import Axes
from normkit.backends.cuda import Cuda, planner
from normkit.backends.cuda.planner import Limits
from normkit.dispatch import load
from normkit.testing import check_backend

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))


@dataclass(frozen=True)
class Call:
    norm: Callable[..., Any]
    shape: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        options = "".join(f"-{k}{v}" for k, v in self.options.items())
        return f"{self.norm.__name__}{self.shape}{options}".replace(" ", "")


LAST = {"channel_axis": -1}
CALLS = [
    # rows: several teams a warp, a warp, a block, several blocks; even and odd
    Call(nk.layer_norm, (9, 64)),
    Call(nk.layer_norm, (5, 37)),
    Call(nk.layer_norm, (6, 3)),
    Call(nk.rms_norm, (3, 513)),
    Call(nk.rms_norm, (2, 2048)),
    Call(nk.layer_norm, (3, 4099)),
    Call(nk.layer_norm, (2, 33000)),
    Call(nk.layer_norm, (2, 40001)),
    # parameters of other axes than those reduced over
    Call(nk.layer_norm, (3, 4, 640), {"axis": (1, 2), "param_axis": 2}),
    Call(nk.layer_norm, (6, 40), {"axis": 1, "param_axis": 0}),
    Call(nk.layer_norm, (2, 12, 5, 16), {"axis": 1}),
    Call(nk.layer_norm, (2, 12, 5, 3), {"axis": 1, "param_axis": (1, 2)}),
    Call(nk.layer_norm, (2, 4, 40, 40), {"axis": 1}),
    Call(nk.layer_norm, (2, 700, 72), {"axis": 1}),
    Call(nk.layer_norm, (1, 700, 71), {"axis": 1}),
    Call(nk.layer_norm, (2, 2, 6, 3), {"axis": (1, 2), "param_axis": (0, 1)}),
    Call(nk.layer_norm, (2, 6, 4000), {"axis": (1, 2), "param_axis": 2}),
    Call(nk.layer_norm, (3, 16, 8), {"axis": (1, 2), "param_axis": 1}),
    Call(nk.layer_norm, (2, 300, 8), {"axis": (1, 2), "param_axis": 1}),
    Call(nk.layer_norm, (2, 5000, 8), {"axis": (1, 2), "param_axis": 1}),
    # long runs and short ones, in one block and in several
    Call(nk.instance_norm, (2, 5, 9, 9)),
    Call(nk.instance_norm, (2, 3, 200, 201)),
    Call(nk.instance_norm, (2, 9, 9, 16), LAST),
    Call(nk.group_norm, (3, 32, 8, 8), {"num_groups": 4}),
    Call(nk.group_norm, (2, 8, 100, 101), {"num_groups": 2}),
    Call(nk.group_norm, (3, 8, 3, 3), {"num_groups": 2}),
    Call(nk.group_norm, (2, 16, 24, 24), {"num_groups": 2}),
    Call(nk.group_norm, (1, 2048, 4, 5), {"num_groups": 1}),
    Call(nk.group_norm, (2, 8, 8, 32), {"num_groups": 4, "channel_axis": -1}),
    Call(nk.group_norm, (2, 8, 8, 512), {"num_groups": 2, "channel_axis": -1}),
    Call(nk.group_norm, (5, 32), {"num_groups": 4}),
    Call(nk.batch_norm, (4, 6, 30, 31)),
    Call(nk.batch_norm, (4, 3, 90, 91)),
    Call(nk.batch_norm, (8, 16, 7, 7)),
    Call(nk.batch_norm, (8, 5, 7, 7)),
    Call(nk.batch_norm, (64, 40)),
    Call(nk.batch_norm, (70, 3)),
    Call(nk.batch_norm, (1500, 64)),
    Call(nk.batch_norm, (40000, 3)),
]
# x's dtype, and how many elements off alignment its data are; half data meet float32 parameters
# in half of the calls. Every eighth call runs in all variants, the others in two; with
# NORMKIT_FULL=1 all do.
VARIANTS = list(product(["float32", "bfloat16", "float64", "float16"], [0, 1]))
FEW = [("float32", 0), ("bfloat16", 1)]
FULL = os.environ.get("NORMKIT_FULL") == "1"
RUNS = [
    (call, *variant)
    for i, call in enumerate(CALLS)
    for variant in (VARIANTS if FULL or i % 8 == 0 else FEW)
]
#: error over the largest value: a few units in the last place
TOLERANCE = {"float32": 2e-6, "float64": 4e-15, "float16": 2e-3, "bfloat16": 1.6e-2}


class Host(HostDevice):
    """The emulation as the backend sees a device; `moved` arrays lie `shift` elements off."""

    def __init__(self, shift: int = 0, **options: Any) -> None:
        super().__init__(limits=Limits(sms=2), **options)
        self.shift = shift

    @classmethod
    def of(cls, dtype: str) -> "Host":
        """For data of a dtype: the emulation's flush to zero reaches float64, a GPU's does not."""
        return cls(ftz=dtype != "float64")

    def moved(self, array: np.ndarray) -> np.ndarray:
        return self.array(array, self.shift)

    def bind(self, launch: planner.Launch) -> Callable[[tuple[Any, ...]], None]:
        """Sees that parameters and their gradients, untyped pointers, are what kernels are told."""
        start, told = super().bind(launch), kinds(launch.values)

        def checked(arrays: tuple[Any, ...]) -> None:
            for name, array in zip(launch.arrays, arrays, strict=True):
                if name in told and array is not None:
                    assert array.dtype.name == told[name], (launch.kernel, name)
            start(arrays)

        return checked


def kinds(values: np.void) -> dict[str, str]:
    """The dtypes of parameters and their gradients that a launch's values tell."""
    fields = dict(zip(values.dtype.names or (), values, strict=True))
    if "cells" in fields:
        return kinds(fields["cells"])
    of = {"gamma": "gamma_kind", "dgamma": "grad_kind", "dbeta": "grad_kind"}
    if values.dtype == planner.FORWARD:
        of = {"gamma": "kind", "beta": "kind"}
    return {name: planner.KINDS[fields[kind]] for name, kind in of.items() if kind in fields}


H200 = Limits(sms=132, shared=228 << 10)


class Waves(Host):
    """A device that plans launches whose blocks meet, for as many as there can be."""

    def __init__(self, shift: int = 0, sms: int = 8, kilobytes: int = 228, **options: Any) -> None:
        super().__init__(shift, resident=2 * sms, **options)
        self.limits = Limits(sms, kilobytes << 10, waves=True)


class Unrun(Host):
    """Notes which kernels it is asked for."""

    def __init__(self, shift: int = 0, limits: Limits | None = None) -> None:
        super().__init__(shift)
        self.limits = limits or self.limits

    def launch(self, launch: Launch) -> None:
        self.launched.append(launch.kernel)


@contextmanager
def serving(device: Host) -> Iterator[Host]:
    """NumPy arrays are the device's."""
    backend = Cuda(device)
    with (
        mock.patch("normkit.call.backend_for", return_value=backend),
        mock.patch("normkit.call.chosen_backend", return_value=backend),
    ):
        yield device


def inputs(call: Call, dtype: str, params: str | None = None) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(sum(call.shape))
    x = (3 + 2 * rng.standard_normal(call.shape)).astype(dtype)
    shape = call.norm.declare(x, **call.options).plan.layout.param_shape
    gamma = 1 + rng.standard_normal(shape) / 2
    beta, dy = (rng.standard_normal(s) for s in (shape, call.shape))
    gamma, beta = (a.astype(dtype).astype(params or dtype) for a in (gamma, beta))
    return x, gamma, beta, dy.astype(dtype)


def run_inputs(call: Call, dtype: str, shift: int) -> tuple[np.ndarray, ...]:
    mixed = (shift + sum(call.shape)) % 2 and dtype in ("bfloat16", "float16")
    return inputs(call, dtype, "float32" if mixed else None)


def results(call: Call, x: Any, gamma: Any, beta: Any, dy: Any) -> list[Any]:
    """y twice, and gradients; the same without parameters."""
    plain = call.norm(x, gamma, beta, **call.options)
    y, pullback = nk.vjp(call.norm, x, gamma, beta, **call.options)
    bare, bare_pullback = nk.vjp(call.norm, x, **call.options)
    return [plain, y, *pullback(dy), bare, bare_pullback(dy).x]


def close(got: Any, want: Any, dtype: str) -> None:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert np.max(np.abs(got - want)) <= TOLERANCE[dtype] * max(1.0, np.max(np.abs(want)))


@pytest.mark.parametrize(("call", "dtype", "shift"), RUNS, ids=str)
def test_agrees_with_the_reference(call: Call, dtype: str, shift: int) -> None:
    given = run_inputs(call, dtype, shift)
    with nk.use_backend("reference"):
        want = results(call, *given)
    with serving(Host(shift)) as device:
        got = results(call, *map(device.moved, given))
    assert got[0].tobytes() == got[1].tobytes()
    for g, w in zip(got, want, strict=True):
        close(g, w, dtype)


def operations(call: Call, backend: Any, move: Callable[[Any], Any]) -> list[Any]:
    """What a backend's operations give when used one by one, as merged statistics need them."""
    x, gamma, beta, dy = inputs(call, "float32")
    declared = call.norm.declare(x, gamma, beta, **call.options)
    axes, center = declared.plan.layout.axes, declared.center
    x, dy = (move(declared.plan.layout.view(a).copy()) for a in (x, dy))
    gamma, beta = map(move, declared.params())
    y, again = (np.empty_like(x) for _ in range(2))
    backend.forward(x, axes, gamma, beta, y, eps=1e-5, center=center, keep=True)
    stats = backend.moments(x, axes, eps=1e-5, center=center)
    backend.normalize(x, axes, stats, gamma, beta, again)
    found = [y, again]
    for affine, weight in product(((gamma.dtype,) * 2, None), (gamma, None)):
        dx, options = np.empty_like(x), {"center": center, "frozen": True, "affine": affine}
        sums = backend.gradients(dy, x, axes, stats, weight, dx, **options)
        found += [dx, *(sums or ())]
    return found


@pytest.mark.parametrize("call", CALLS, ids=repr)
def test_the_operations_one_by_one(call: Call) -> None:
    device = Host()
    got = operations(call, Cuda(device), device.moved)
    want = operations(call, load("reference"), np.array)
    assert got[0].tobytes() == got[1].tobytes()
    for g, w in zip(got, want, strict=True):
        close(g, w, "float32")


# Few and small, as every access is watched.
WATCHED = [
    Call(nk.layer_norm, (3, 37)),
    Call(nk.layer_norm, (2, 700)),
    Call(nk.rms_norm, (1, 20000)),
    Call(nk.batch_norm, (5, 8, 7, 7)),
    Call(nk.batch_norm, (2, 2, 110, 111)),
    Call(nk.batch_norm, (64, 16)),
    Call(nk.batch_norm, (1100, 17)),
    Call(nk.group_norm, (2, 8, 6, 6), {"num_groups": 2}),
]


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("call", WATCHED, ids=repr)
def test_no_races_and_any_order(call: Call, shift: int) -> None:
    given = inputs(call, "float32")
    orders: list[dict[str, Any]] = [
        {"check": True, "order": "random", "seed": 3},
        {"order": "ascending"},
        {"order": "descending"},
    ]
    seen = set()
    for options in orders:
        with serving(Host(shift, **options)) as device:
            found = results(call, *map(device.moved, given))
        seen.add(tuple(a.tobytes() for a in found))
    assert len(seen) == 1


# Of several parts, with parameters in all modes.
IN_WAVES = [
    Call(nk.rms_norm, (3, 33000)),
    Call(nk.layer_norm, (2, 40001)),
    Call(nk.layer_norm, (2, 9, 4000), {"axis": (1, 2), "param_axis": 2}),
    Call(nk.layer_norm, (2, 700, 72), {"axis": 1}),
    Call(nk.layer_norm, (2, 5000, 8), {"axis": (1, 2), "param_axis": 1}),
    Call(nk.instance_norm, (2, 3, 200, 201)),
    Call(nk.batch_norm, (6, 3, 90, 91)),
    Call(nk.batch_norm, (1500, 64)),
    Call(nk.group_norm, (2, 40, 40, 64), {"num_groups": 4, "channel_axis": -1}),
]
NOT_IN_WAVES = [
    (Call(nk.batch_norm, (9000, 3)), "float32"),  # no vectors
    (Call(nk.layer_norm, (2, 33000)), "float64"),
    (Call(nk.layer_norm, (1, 600000)), "float32"),  # more parts than blocks
]


def is_wave(kernel: str) -> bool:
    return kernel.endswith(f", {planner.BOTH | planner.WAVE}>")


def wave_results(call: Call, given: tuple[Any, ...]) -> Any:
    """As `results`, with running statistics where batch norm has them, which it returns too."""
    running: list[Any] = []
    if call.norm is nk.batch_norm:
        running = [np.zeros(given[1].shape, "float32"), np.ones(given[1].shape)]
        names = zip(("running_mean", "running_var"), running, strict=True)
        call = Call(call.norm, call.shape, {**call.options, **dict(names)})
    return [*results(call, *given), *running]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("call", IN_WAVES, ids=repr)
def test_a_wave_has_the_bits_of_several_launches(call: Call, dtype: str) -> None:
    """In any order of blocks, with no race, from tile to tile; all kept on chip, or not."""
    for shift in (0, 1):
        given = run_inputs(call, dtype, shift)
        with serving(Host(shift)) as device:
            want = wave_results(call, tuple(map(device.moved, given)))
        kernels = " ".join(device.launched)
        for waves in (
            Waves(shift, sms=4, check=True, order="random", seed=shift),
            Waves(shift, kilobytes=80 if "Columns" in kernels else 12, order="descending"),
        ):
            with serving(waves):
                got = wave_results(call, tuple(map(waves.moved, given)))
            assert any(map(is_wave, waves.launched))
            for g, w in zip(got, want, strict=True):
                assert g.tobytes() == w.tobytes()


@pytest.mark.parametrize("call", IN_WAVES[:2] + IN_WAVES[-3:-1], ids=repr)
def test_a_wave_in_place(call: Call) -> None:
    given = inputs(call, "float32")[:3]
    with serving(Waves(check=True)) as device:
        x, gamma, beta = map(device.moved, given)
        y = call.norm(x, gamma, beta, **call.options)
        call.norm(x, gamma, beta, out=x, **call.options)
    assert x.tobytes() == y.tobytes()


@pytest.mark.parametrize(("call", "dtype"), NOT_IN_WAVES, ids=str)
def test_what_no_wave_takes(call: Call, dtype: str) -> None:
    with serving(Unrun(limits=Waves().limits)) as device, np.errstate(all="ignore"):
        results(call, *map(device.moved, inputs(call, dtype)))
    assert not any(map(is_wave, device.launched))


def test_renorm_and_no_wave() -> None:
    """Whose r and d all blocks would read where one of them writes."""
    x = np.zeros((32, 64, 56, 56), "float32")
    running = {"running_mean": np.zeros(64), "running_std": np.ones(64)}
    with serving(Unrun(limits=H200._replace(waves=True))) as device:
        nk.batch_renorm(x, **running)
    assert len(device.launched) == 3


def test_waves_are_off_unless_asked_for() -> None:
    axes = Call(nk.batch_norm, (256, 64, 56, 56)).norm.declare(np.empty((256, 64, 56, 56), "f2"))
    key = axes.plan.layout.axes, "float16", None, None, True, 1e-5, True, True
    assert len(planner.forward(*key, H200).launches) == 3
    (launch,) = planner.forward(*key, H200._replace(waves=True)).launches
    assert launch.cooperative
    assert launch.grid[0] <= H200.sms
    backward = *key[:2], None, "float16", True, True, False
    assert len(planner.gradients(*backward, H200).launches) == 3
    assert len(planner.gradients(*backward, H200._replace(waves=True)).launches) == 1


# Of more elements, groups, members or parameters than 32 bits count.
HUGE = [
    Axes(1, 1, 1, 1 << 33, 1 << 33, 1),
    Axes(1, 1 << 33, 1, 1, 1, 1 << 33),
    Axes(1, 2, 1 << 33, 1, 1 << 33, 1),
    Axes(1 << 33, 1, 1, 8, 8, 1),
    Axes(1, 1 << 20, 1 << 13, 1, 1 << 13, 1),
]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("axes", HUGE, ids=str)
def test_plans_of_more_than_32_bits(axes: Axes, dtype: str) -> None:
    programs = [planner.forward(axes, dtype, dtype, dtype, True, 1e-5, True, True, H200)]
    for frozen in (False, True):
        programs.append(planner.gradients(axes, dtype, dtype, dtype, True, True, frozen, H200))
    for program in programs:
        assert all(max(launch.grid) < 1 << 31 for launch in program.launches)


BATCHES = [
    Call(nk.layer_norm, (6, 37)),
    Call(nk.rms_norm, (3, 5001)),
    Call(nk.layer_norm, (3, 40001)),
    Call(nk.instance_norm, (4, 3, 9, 9)),
    Call(nk.instance_norm, (4, 9, 9, 24), LAST),
    Call(nk.group_norm, (3, 8, 7, 7), {"num_groups": 2}),
    Call(nk.group_norm, (3, 7, 7, 24), {"num_groups": 2, "channel_axis": -1}),
]


@pytest.mark.parametrize("call", BATCHES, ids=repr)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sample_has_the_same_bits_in_any_batch(call: Call, dtype: str) -> None:
    x, gamma, beta, dy = inputs(call, dtype)

    def run(part: slice, shift: int) -> tuple[Any, Any]:
        with serving(Host(shift)) as device:
            args = map(device.moved, (x[part], gamma, beta))
            y, pullback = nk.vjp(call.norm, *args, **call.options)
            return y, pullback(device.moved(dy[part])).x

    y, dx = run(slice(None), 0)
    for i in range(len(x)):
        for shift in (0, 1):
            one_y, one_dx = run(slice(i, i + 1), shift)
            assert one_y.tobytes() == y[i : i + 1].tobytes()
            assert one_dx.tobytes() == dx[i : i + 1].tobytes()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("value", [1e31, np.inf])
def test_a_column_keeps_its_bits_beside_one_that_overflows(dtype: str, value: float) -> None:
    """A vector holds columns of several groups."""
    x = np.random.default_rng(0).standard_normal((1500, 8)).astype(dtype)
    with serving(Host()) as device:
        want = nk.layer_norm(device.moved(x), axis=0)
        x[:, 3] *= np.array(value, dtype)
        got = nk.layer_norm(device.moved(x), axis=0)
    assert np.delete(got, 3, 1).tobytes() == np.delete(want, 3, 1).tobytes()


SHAPES = [(6, 8, 5, 5), (6, 5, 7, 7), (2, 3, 110, 111), (40, 24), (1100, 24)]


def steps(shape: tuple[int, ...], move: Callable[[Any], Any]) -> list[Any]:
    """A few steps of the norms that keep running statistics, of either dtype."""
    rng, seen = np.random.default_rng(1), []
    x, dy = (move(rng.standard_normal(shape).astype("float32")) for _ in range(2))
    gamma, beta = (move(rng.standard_normal(shape[1]).astype("float32")) for _ in range(2))
    for norm, name, step in (
        (nk.batch_norm, "running_var", 1),
        (nk.batch_renorm, "running_std", 1),
        (nk.batch_renorm, "running_std", 2),  # r and d by a kernel of their own
        (nk.instance_norm, "running_var", 1),
    ):
        if norm is nk.instance_norm and len(shape) == 2:
            continue
        size = step * shape[1]
        mean, spread = move(np.zeros(size, "float32"))[::step], move(np.ones(size))[::step]
        for training in (True, False):
            options = {"running_mean": mean, name: spread, "training": training}
            seen.append(norm(x, gamma, beta, **options))
            y, pullback = nk.vjp(norm, x, gamma, beta, **options)
            seen += [y, *pullback(dy), mean.copy(), spread.copy()]
            seen.append(nk.vjp(norm, x, **options)[1](dy).x)
    return seen


@pytest.mark.parametrize("shape", SHAPES)
def test_running_statistics(shape: tuple[int, ...]) -> None:
    with nk.use_backend("reference"):
        want = steps(shape, np.array)
    with serving(Host()) as device:
        got = steps(shape, device.moved)
    for g, w in zip(got, want, strict=True):
        close(g, w, "float32")


@pytest.mark.parametrize("shape", SHAPES)
def test_renorm_without_corrections_is_batch_norm(shape: tuple[int, ...]) -> None:
    x, gamma, beta, _ = inputs(Call(nk.batch_norm, shape), "float32")
    with serving(Host()) as device:
        args = [device.moved(a) for a in (x, gamma, beta)]
        mean, std = (device.moved(a) for a in (beta, abs(gamma)))
        renorm = nk.batch_renorm(*args, running_mean=mean, running_std=std, r_max=1.0, d_max=0.0)
        assert renorm.tobytes() == nk.batch_norm(*args).tobytes()


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("call", WATCHED, ids=repr)
def test_in_place(call: Call, shift: int) -> None:
    given = inputs(call, "bfloat16")[:3]
    with serving(Host(shift, check=True)) as device:
        x, gamma, beta = map(device.moved, given)
        y = call.norm(x, gamma, beta, **call.options)
        call.norm(x, gamma, beta, out=x, **call.options)
    assert x.tobytes() == y.tobytes()


@pytest.mark.parametrize("call", WATCHED, ids=repr)
def test_gradients_keep_the_precision_of_a_wider_dy(call: Call) -> None:
    x, gamma, beta, _ = inputs(call, "float16")
    dy = np.random.default_rng(7).standard_normal(call.shape).astype("float32")
    with nk.use_backend("reference"):
        want = nk.vjp(call.norm, x, gamma, beta, **call.options)[1](dy)
    with serving(Host()) as device:
        args = map(device.moved, (x, gamma, beta))
        got = nk.vjp(call.norm, *args, **call.options)[1](device.moved(dy))
    for g, w in zip(got, want, strict=True):
        assert g.dtype == np.float16
        close(g, w, "float16")


SCALES = [("float32", s) for s in (1e-31, 1e-18, 1e18, 1e31)]
SCALES += [("float64", s) for s in (1e-290, 1e-170, 1e160, 1e306)]


@pytest.mark.parametrize(("dtype", "scale"), SCALES)
@pytest.mark.parametrize("call", [CALLS[1], CALLS[5], *WATCHED[3:7]], ids=repr)
def test_data_of_any_size(call: Call, dtype: str, scale: float) -> None:
    x, gamma, beta, dy = inputs(call, dtype)
    x = x * x.dtype.type(scale)
    options = {**call.options, "eps": 0.0}
    with nk.use_backend("reference"):
        y, pullback = nk.vjp(call.norm, x, gamma, beta, **options)
        want = y, *pullback(dy)
    with serving(Host.of(dtype)) as device:
        y, pullback = nk.vjp(call.norm, *map(device.moved, (x, gamma, beta)), **options)
        got = y, *pullback(device.moved(dy))
    for g, w in zip(got, want, strict=True):
        largest = max(float(np.max(np.abs(w))), float(np.finfo(dtype).tiny))
        close(g / largest, w / largest, dtype)


class HostCuda(Cuda):
    """The backend for NumPy arrays, as the emulation computes."""

    arrays = ("numpy",)


def test_it_conforms() -> None:
    check_backend(HostCuda(Host()), np, ["float32"])


# Cases (a pattern of names) that the kernels do not hold, and why: of all 2,024, 31.
DENORMAL = "the data or the gradients are denormal in float32, which -ftz=true makes zeros"
EXCEPTIONS = {
    "adv.const1.401e-45_*": DENORMAL,
    "adv.const9.184e-41_*": DENORMAL,
    "adv.huge_max_uniform.*.bfloat16": DENORMAL,
    "adv.huge_max_uniform.*.float32": DENORMAL,
    "adv.huge_positive.*.bfloat16": DENORMAL,
    "adv.pm_max.*.float32": DENORMAL,
    "adv.std1e-39_*": DENORMAL,
}


def excepted(case: oracles.Case) -> bool:
    return any(fnmatch(case.name, pattern) for pattern in EXCEPTIONS)


def judge(case: oracles.Case) -> list[str]:
    """What is wrong with a case on the emulation."""
    with serving(Host.of(case.dtype)) as device:

        def make(case: oracles.Case) -> oracles.Arrays:
            return {name: device.moved(a) for name, a in oracles.arrays(case).items()}

        return test_oracles.judge(case, make)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("norm", oracles.NORMS)
def test_oracles_hold(norm: str, dtype: str) -> None:
    cases = [c for c in test_oracles.VALUES if (c.op, c.dtype) == (norm, dtype)]
    test_oracles.report(
        line
        for case in cases
        if not excepted(case) and prod(case.shape) < 200_000
        for line in judge(case)
    )


@pytest.mark.parametrize("pattern", EXCEPTIONS)
def test_exceptions_are_needed(pattern: str) -> None:
    cases = [case for case in test_oracles.VALUES if fnmatch(case.name, pattern)]
    assert any(map(judge, cases)) or not (cases or oracles.FOLDER)


# How many kernels y takes, and dx with the parameters' gradients.
LAUNCHES = [
    (Call(nk.layer_norm, (64, 512)), 1, 2),
    (Call(nk.rms_norm, (3, 4096)), 1, 2),
    (Call(nk.rms_norm, (3, 65536)), 3, 5),
    (Call(nk.batch_norm, (32, 64, 14, 14)), 1, 1),
    (Call(nk.batch_norm, (64, 40)), 1, 1),
    (Call(nk.batch_norm, (32, 64, 56, 56)), 3, 3),
    (Call(nk.batch_norm, (32, 56, 56, 64), LAST), 3, 3),
    (Call(nk.instance_norm, (8, 64, 28, 28)), 1, 2),
    (Call(nk.instance_norm, (8, 14, 14, 64), LAST), 1, 2),
    (Call(nk.group_norm, (8, 64, 28, 28), {"num_groups": 8}), 1, 2),
    (Call(nk.group_norm, (8, 64, 112, 112), {"num_groups": 2}), 3, 4),
]


@pytest.mark.parametrize(("call", "forward", "backward"), LAUNCHES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_launches(call: Call, forward: int, backward: int, dtype: str) -> None:
    x, gamma, beta, dy = inputs(call, dtype)
    running = {}
    if call.norm is nk.batch_norm:
        running = {"running_mean": np.zeros(gamma.shape), "running_var": np.ones(gamma.shape)}
    with serving(Unrun()) as device:
        call.norm(x, gamma, beta, **call.options, **running)
        assert len(device.launched) == forward
        _, pullback = nk.vjp(call.norm, x, gamma, beta, **call.options, **running)
        device.launched.clear()
        pullback(dy)
        assert len(device.launched) == backward


# How many kernels y takes where there are running statistics: in training and in inference.
WITH_RUNNING = [
    (nk.batch_norm, "running_var", (32, 64, 14, 14), 1, 1),
    (nk.batch_norm, "running_var", (32, 64, 56, 56), 3, 1),
    (nk.batch_renorm, "running_std", (32, 64, 14, 14), 1, 1),
    (nk.batch_renorm, "running_std", (64, 40), 1, 1),
    (nk.batch_renorm, "running_std", (32, 64, 56, 56), 3, 1),
    (nk.instance_norm, "running_var", (8, 64, 28, 28), 2, 1),
]


@pytest.mark.parametrize(("norm", "spread", "shape", "training", "inference"), WITH_RUNNING)
def test_launches_with_running_statistics(
    norm: Any, spread: str, shape: tuple[int, ...], training: int, inference: int
) -> None:
    x = np.zeros(shape, "float32")
    running = {"running_mean": np.zeros(shape[1]), spread: np.ones(shape[1])}
    for train, launches in ((True, training), (False, inference)):
        with serving(Unrun()) as device, np.errstate(all="ignore"):
            norm(x, **running, training=train)
            assert len(device.launched) == launches


def regime(kernel: str) -> tuple[str, ...]:
    """A kernel's name without dtypes and alignment."""
    pattern = r"nk::(\w+)<.*, nk::(\w+)<(\d+)>, \d, (\d), \d+, (\d), \d+, (\d+)>"
    found = re.fullmatch(pattern, kernel)
    if found is None:
        return (kernel.partition("<")[0],)
    name, walk, n, mode, wide, stage = found.groups()
    return name, walk, "single" if n == "1" else "vector", mode, wide, stage


def reached() -> set[str]:
    """The kernels that the tests above run."""
    launched: list[str] = []
    for call, dtype, shift in RUNS:
        with serving(Unrun(shift)) as device:
            results(call, *map(device.moved, run_inputs(call, dtype, shift)))
        launched += device.launched
    for call in CALLS:
        device = Unrun()
        operations(call, Cuda(device), device.moved)
        launched += device.launched
    for call, dtype, shift in product(IN_WAVES, ["float32", "bfloat16", "float16"], [0, 1]):
        with serving(Unrun(shift, Waves().limits)) as device:
            results(call, *map(device.moved, run_inputs(call, dtype, shift)))
        launched += device.launched
    with serving(Unrun()) as device, np.errstate(all="ignore"):
        steps(SHAPES[0], device.moved)
    return {*launched, *device.launched}


def test_every_regime_is_reached() -> None:
    known = {regime(kernel) for _, kernel in planner.specialisations()}
    assert sorted(known - {regime(kernel) for kernel in reached()}) == []


def test_parameters_of_both_dtypes_in_every_walk() -> None:
    """That are read in half precision, and in single beside data in half."""
    seen: set[tuple[str, ...]] = set()

    class Noting(Unrun):
        def bind(self, launch: planner.Launch) -> Callable[[tuple[Any, ...]], None]:
            told = kinds(launch.values).get("gamma")
            if told and launch.kernel.startswith(("nk::forward<nk::", "nk::backward<nk::")):
                name, walk, _, mode, *_ = regime(launch.kernel)
                seen.add((name, walk, mode, told.removeprefix("b")))
            return super().bind(launch)

    for call, dtype, shift in RUNS:
        with serving(Noting(shift)) as device:
            results(call, *map(device.moved, run_inputs(call, dtype, shift)))
    known = [regime(kernel) for _, kernel in planner.specialisations()]
    walks = {tuple(r[i] for i in (0, 1, 3)) for r in known if len(r) > 1}
    assert seen == {(*walk, kind) for walk in walks for kind in ("float16", "float32")}


def test_every_kernel_is_known() -> None:
    """What is launched, test_cuda_compile.py compiles."""
    assert reached() <= {kernel for _, kernel in planner.specialisations()}
