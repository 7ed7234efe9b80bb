"""Every norm, forward and backward, in every dtype and layout, against its definition."""

import functools
import itertools
import math
import os
import pickle
import platform
import subprocess
import sys
import threading
from typing import Any, NamedTuple

import numpy as np
import pytest
from cases import (
    CASES,
    DTYPES,
    KERNELS,
    SMALL,
    SPREAD,
    Case,
    finfo,
    formula,
    moments,
    numpy,
    same_bits,
)
from cases import renorm_constants as constants_of
from layouts import ANY_DEVICE, axis_to, layouts, read_only

import normkit as nk
from normkit.axes import Axes, per_channel
from normkit.dispatch import load

EPS = 1e-5  #: everyone's default
NORMS = {
    "batch_norm": nk.batch_norm,
    "batch_renorm": nk.batch_renorm,
    "layer_norm": nk.layer_norm,
    "instance_norm": nk.instance_norm,
    "group_norm": nk.group_norm,
    "rms_norm": nk.rms_norm,
}

kernels = pytest.mark.parametrize("backend", KERNELS, indirect=True)


class Want(NamedTuple):
    values: np.ndarray
    off: float  #: what they may be off by, beside a rounding of their own


def reference(case: Case, inputs: dict[str, np.ndarray]) -> dict[str, Want]:
    """What the reference backend makes of the inputs in float64."""
    wide = {k: v.astype(np.float64) for k, v in inputs.items()}
    with nk.use_backend("reference"):
        results = case.run(wide)
    largest = {k: 1 + np.abs(v).max(initial=0) for k, v in results.items()}
    if not case.frozen:  # in groups of few elements the terms of dx cancel
        _, var, _ = moments(case, wide["x"])
        g = wide["dy"] * wide["gamma"].ravel()[case.params]
        largest["dx"] = (1 + np.abs(g).max()) / math.sqrt(var.min() + EPS)
    arithmetic = 1e-14 if inputs["x"].dtype == np.float64 else 4e-6
    return {k: Want(v, arithmetic * largest[k]) for k, v in results.items()}


@functools.cache
def exact(case: Case, dtype: str) -> dict[str, Want]:
    return reference(case, case.inputs(dtype))


def mismatch(got: Any, want: Want) -> str:
    """What is wrong with `got`, "" if it is right to the accuracy of its own dtype."""
    got, values = numpy(got), want.values
    if got.shape != values.shape:
        return f"shape {got.shape} for {values.shape}"
    error = np.abs(got.astype(np.float64) - values)
    excess = error - finfo(got.dtype).eps * np.abs(values) - want.off
    if (excess <= 0).all():
        return ""
    worst = tuple(map(int, np.unravel_index(np.nan_to_num(excess, nan=np.inf).argmax(), got.shape)))
    return f"{got[worst]} for {values[worst]} at {worst}"


def mismatches(got: dict[str, Any], want: dict[str, Want]) -> list[str]:
    return [f"{name}: {m}" for name in want if (m := mismatch(got[name], want[name]))]


def to_device(inputs: dict[str, np.ndarray], xp: Any) -> dict[str, Any]:
    return {k: xp.array(v) for k, v in inputs.items()}


def copied(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same arrays, but running statistics of their own."""
    return inputs | {k: v.copy() for k, v in inputs.items() if k.startswith("running")}


def problems(case: Case, dtype: str, xp: Any, want: dict[str, Want]) -> list[str]:
    """What is wrong with a case in a dtype, whatever the layouts; a line each."""
    lines = []
    known = layouts(xp)
    anywhere = list(ANY_DEVICE.values())
    for i, (layout, lay_out) in enumerate(known.items()):

        def arguments(i: int = i, lay_out: Any = lay_out) -> dict[str, Any]:
            """New arrays, each in another layout."""
            others = itertools.islice(itertools.cycle(known.values()), i + 1, None)
            given = {}
            for name, values in to_device(case.inputs(dtype), xp).items():
                if name.startswith("running"):
                    given[name] = anywhere[i % len(anywhere)](values)
                else:
                    given[name] = lay_out(values) if name == "x" else next(others)(values)
            return given

        plain_given, given = arguments(), arguments()
        plain = case.call(plain_given)
        got = case.run(given)

        wrong = mismatches(got, want)
        for name, like in (("y", "x"), ("dx", "x"), ("dgamma", "gamma"), ("dbeta", "beta")):
            if got[name].dtype != given[like].dtype.newbyteorder("="):
                wrong.append(f"{name} has dtype {got[name].dtype}")
            if like == "x" and got[name].strides != xp.empty_like(given["x"]).strides:
                wrong.append(f"{name} has strides {got[name].strides}")
        bits = [("y", plain)] + [(k, v) for k, v in plain_given.items() if k.startswith("running")]
        wrong += [f"vjp's {name} has other bits" for name, v in bits if not same_bits(got[name], v)]
        lines += [f"x {layout}: {line}" for line in wrong]
    return lines


def report(lines: list[str]) -> None:
    if lines:
        pytest.fail("\n".join(lines), pytrace=False)


# Values


@pytest.mark.gpu
def test_with_a_gpu_the_tests_below_run_on_it_too(cupy: Any) -> None:
    assert len(KERNELS) == 2


@pytest.mark.parametrize("case", CASES, ids=str)
def test_definition(case: Case, backend: str, xp: Any) -> None:
    want = formula(case, case.inputs("float64"))
    given = to_device(case.inputs("float64"), xp)
    got = {"y": case.call(given)} | given
    for name, values in want.items():
        np.testing.assert_allclose(numpy(got[name]), values, rtol=1e-11, atol=1e-11, err_msg=name)


@kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_layout(case: Case, dtype: str, backend: str, xp: Any) -> None:
    report(problems(case, dtype, xp, exact(case, dtype)))


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_every_layout_by_the_reference(case: Case) -> None:
    with nk.use_backend("reference"):
        report(problems(case, "float32", np, exact(case, "float32")))


# Short runs whose rows are cut in the middle of a group where nothing is summed: parameters of
# groups, of columns, of both, and of rows.
CUT = [
    Axes(1, 5, 9, 49, 9, 49),
    Axes(1, 5, 8, 60, 8, 60),
    Axes(3, 9, 9, 63, 9, 63),
    Axes(3, 5, 30, 12, 360, 1),
    Axes(3, 5, 45, 12, 540, 1),
    Axes(3, 5, 45, 12, 135, 4),
    Axes(3, 4, 500, 1, 500, 1),
    Axes(3, 4, 500, 1, 4, 500),
]


@pytest.mark.parametrize("scale", [1.0, 2.0**-60], ids=str)  # of one group, to be widened
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axes", CUT, ids=str)
def test_a_result_from_given_statistics_has_the_same_bits(
    axes: Axes, dtype: str, scale: float
) -> None:
    backend, rng = load("numba"), np.random.default_rng(0)
    x = rng.standard_normal(axes[:4])
    x[:, :, axes.k1 // 2] *= scale
    x = x.astype(dtype)
    gamma, beta = (rng.standard_normal(axes.params) for _ in range(2))
    want, got = np.empty_like(x), np.empty_like(x)
    stats = backend.forward(x, axes, gamma, beta, want, eps=1e-30, center=True, keep=True)
    backend.normalize(x, axes, stats, gamma, beta, got)
    assert np.isfinite(want.astype("float32")).all()
    assert same_bits(got, want)


@pytest.mark.parametrize("case", [case for case in SMALL if case.size <= 200], ids=str)
def test_gradients_by_finite_differences(case: Case, backend: str, xp: Any) -> None:
    inputs = case.inputs("float64")
    call = case.call
    if case.name == "batch_renorm" and case.training:  # r and d are constants
        mean, var, _ = moments(case, inputs["x"])
        std = np.sqrt(var + case.options.get("eps", 1e-5))
        old_mean, old_std = (inputs[k].ravel() for k in ("running_mean", "running_std"))
        r, d = (
            xp.asarray(v.reshape(case.param_shape))
            for v in constants_of(case, mean, std, old_mean, old_std)
        )
        options = {k: v for k, v in case.options.items() if k in ("eps", "channel_axis")}

        def call(given: dict[str, Any]) -> Any:
            gamma, beta = given["gamma"], given["beta"]
            return nk.batch_norm(given["x"], gamma * r, gamma * d + beta, **options)

    def loss(name: str, array: np.ndarray) -> float:
        y = call(copied(to_device(inputs | {name: array}, xp)))
        return float((numpy(y) * inputs["dy"]).sum())

    got = case.run(copied(to_device(inputs, xp)))
    step = 1e-5
    for name in ("x", "gamma", "beta"):
        numeric = np.empty_like(inputs[name])
        for i in np.ndindex(numeric.shape):
            plus, minus = inputs[name].copy(), inputs[name].copy()
            plus[i] += step
            minus[i] -= step
            numeric[i] = (loss(name, plus) - loss(name, minus)) / (2 * step)
        np.testing.assert_allclose(
            numpy(got["d" + name]), numeric, rtol=1e-7, atol=1e-7, err_msg=name
        )


BROADCAST = [case for case in SMALL if case.shape[0] > 1 and len(case.shape) > 1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", BROADCAST, ids=str)
def test_broadcast_arrays(case: Case, dtype: str, backend: str, xp: Any) -> None:
    per_channel_group = case.name not in ("layer_norm", "rms_norm") and not case.frozen
    axis = case.param_axes[0] if per_channel_group else 0  # groups are no constants
    inputs = case.inputs(dtype)
    given = to_device(inputs, xp)
    for name, along in (("x", axis), ("dy", axis), ("gamma", 0)):
        first = np.take(inputs[name], [0], along)
        given[name] = xp.broadcast_to(xp.asarray(first), inputs[name].shape)
        inputs[name] = np.broadcast_to(first, inputs[name].shape)
    got = case.run(given)
    report(mismatches(got, reference(case, inputs)))
    assert got["y"].strides == got["dx"].strides == xp.empty_like(given["x"]).strides


MIXED = [case for case in SMALL if case.size > 60][::4]
MIXED.append(Case(nk.instance_norm, (2, 3, 49)))


@pytest.mark.parametrize("case", MIXED, ids=str)
def test_dtypes_mix(case: Case, backend: str, xp: Any) -> None:
    """gamma, beta and dy may each have another dtype than x; only x decides that of y."""
    for i, (dtype, gamma_dtype) in enumerate(itertools.product(DTYPES, DTYPES)):
        inputs = case.inputs(dtype)
        inputs["gamma"] = inputs["gamma"].astype(gamma_dtype)
        inputs["beta"] = inputs["beta"].astype(DTYPES[(i + 1) % 4])
        inputs["dy"] = inputs["dy"].astype(DTYPES[(i // 2) % 4])
        want = reference(case, inputs)
        got = case.run(to_device(inputs, xp))
        for name in ("x", "gamma", "beta"):
            assert got["d" + name].dtype == inputs[name].dtype
        assert got["y"].dtype == inputs["x"].dtype
        dtypes = {k: v.dtype.name for k, v in inputs.items()}
        report([f"{dtypes}: {line}" for line in mismatches(got, want)])


ONE_OF_EACH = [
    next(c for c in SMALL if c.name == name and len(c.shape) > 2 and c.size > 60) for name in NORMS
]
each_norm = pytest.mark.parametrize("case", ONE_OF_EACH, ids=lambda case: case.name)
INFERENCE = [case for case in SMALL if case.frozen and len(case.shape) == 4]


@pytest.mark.parametrize("size", [5000, 17_000])
def test_absent_parameters_of_long_rows_are_ones_and_zeros(size: int) -> None:
    x, dy = np.random.default_rng(4).standard_normal((2, 3, size))
    _, pullback = nk.vjp(nk.layer_norm, x, np.ones(size), np.zeros(size))
    _, absent = nk.vjp(nk.layer_norm, x)
    np.testing.assert_array_equal(absent(dy).x, pullback(dy).x)


def test_long_rows_take_little_stack() -> None:
    x, dy = np.random.default_rng(5).standard_normal((2, 3, 17_000))
    ones = np.ones(17_000)
    expected = nk.vjp(nk.layer_norm, x, ones, ones)[1](dy)  # and compiled
    found: list[Any] = []
    size = threading.stack_size(1 << 18)
    try:
        thread = threading.Thread(
            target=lambda: found.extend(nk.vjp(nk.layer_norm, x, ones, ones)[1](dy))
        )
        thread.start()
        thread.join()
    finally:
        threading.stack_size(size)
    for got, want in zip(found, expected, strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="compiles for an x86 processor")
def test_processors_that_cannot_mask_halves() -> None:
    script = """if True:
        import ml_dtypes, numpy as np, normkit as nk
        for size in (5, 77):
            x = np.random.default_rng(0).standard_normal((5, size), "float32").astype("bfloat16")
            with nk.use_backend("reference"):
                want = nk.layer_norm(x).astype("float64")
            np.testing.assert_allclose(nk.layer_norm(x).astype("float64"), want, 1e-2, 1e-3)
    """
    older = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": ""}
    subprocess.run([sys.executable, "-c", script], env=os.environ | older, check=True)


@each_norm
@pytest.mark.parametrize("absent", [("gamma",), ("beta",), ("gamma", "beta")], ids="-".join)
def test_absent_parameters_are_ones_and_zeros(
    case: Case, absent: set[str], backend: str, xp: Any
) -> None:
    inputs = case.inputs("float32")
    inputs["gamma"] = inputs["gamma"] if "gamma" not in absent else np.ones_like(inputs["gamma"])
    inputs["beta"] = inputs["beta"] if "beta" not in absent else np.zeros_like(inputs["beta"])
    inputs = to_device(inputs, xp)
    want = case.run(copied(inputs))
    got = case.run({k: v for k, v in copied(inputs).items() if k not in absent})
    for name in absent:
        assert got.pop("d" + name) is None
    for name, values in got.items():
        np.testing.assert_array_equal(numpy(values), numpy(want[name]), err_msg=name)


# Where the result goes


@each_norm
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_out(case: Case, dtype: str, backend: str, xp: Any) -> None:
    writeable = {k: v for k, v in layouts(xp).items() if k != "read-only"}
    inputs = to_device(case.inputs(dtype), xp)
    for layout, lay_out in writeable.items():
        given = inputs | {"x": lay_out(inputs["x"])}
        want = case.call(copied(given))
        for out_layout, lay_out_out in writeable.items():
            where = f"x {layout}, out {out_layout}"
            out = lay_out_out(xp.zeros_like(inputs["x"]))
            if out.dtype != given["x"].dtype:
                continue  # byte order is part of the dtype
            assert case.call(copied(given), out=out) is out, where
            assert same_bits(out.astype(want.dtype), want), where
            if out_layout in ("every second", "cropped"):  # between its elements nothing is written
                assert int(np.isnan(out.base).sum()) == out.base.size - out.size, where
            out[...] = 0
            y, pullback = case.vjp(copied(given), out=out)
            assert y is out, where
            assert same_bits(y.astype(want.dtype), want), where
            assert pullback(inputs["dy"]).x.strides == want.strides, where
        x, again = given["x"], lay_out(inputs["x"])
        assert case.call(copied(given), out=x) is x
        case.call(copied(given) | {"x": again}, out=again[...])  # a view of the same elements
        for in_place in (x, again):
            assert same_bits(in_place.astype(want.dtype), want), f"{layout}, in place"


@each_norm
def test_inputs_are_left_alone(case: Case, backend: str, xp: Any) -> None:
    inputs = to_device(case.inputs("float32"), xp)
    before = {k: v.copy() for k, v in inputs.items()}
    case.run(copied(inputs))
    assert all(same_bits(inputs[k], before[k]) for k in before)


def test_subclasses_are_seen_through() -> None:
    class Labelled(np.ndarray):
        pass

    x = np.arange(12.0).reshape(3, 4).view(Labelled)
    y, pullback = nk.vjp(nk.layer_norm, x, np.ones(4).view(Labelled))
    assert {type(a) for a in (y, *pullback(x)[:2])} == {np.ndarray}
    assert same_bits(y, nk.layer_norm(np.asarray(x)))


# The same bits


@pytest.mark.parametrize("case", ONE_OF_EACH + INFERENCE, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_pullback_may_be_called_again(case: Case, dtype: str, backend: str, xp: Any) -> None:
    given = to_device(case.inputs(dtype), xp)
    _, pullback = case.vjp(given)
    first = pullback(given["dy"])
    for name in given:
        if name.startswith("running"):  # kept by value
            given[name][...] = math.nan
    pullback(-given["dy"])
    assert all(map(same_bits, pullback(given["dy"]), first))


ALONE = [
    case
    for case in CASES
    if case.name in ("layer_norm", "rms_norm", "instance_norm", "group_norm")
    and not case.frozen
    and 0 in case.kept
    and 0 not in case.param_axes
    and case.shape[0] > 1
] + [
    Case(nk.layer_norm, (40_000, 17)),
    Case(nk.rms_norm, (600, 1023)),
    Case(nk.layer_norm, (300, 5, 7, 33), {"axis": (1, 3)}),
    Case(nk.rms_norm, (200, 1)),
    Case(nk.instance_norm, (40, 1, 3)),
    Case(nk.instance_norm, (70, 30, 17, 17)),
    Case(nk.group_norm, (70, 30, 17, 17), {"num_groups": 5}),
]


@kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ALONE, ids=str)
def test_a_sample_has_the_same_bits_alone(case: Case, dtype: str, backend: str, xp: Any) -> None:
    inputs = to_device(case.inputs(dtype), xp)
    inputs = {k: v for k, v in inputs.items() if not k.startswith("running")}
    for layout in ("C", "channels last"):
        x, dy = (ANY_DEVICE[layout](inputs[k]) for k in ("x", "dy"))
        y, pullback = case.vjp(inputs | {"x": x})
        dx = pullback(dy).x
        for i in {0, 1, len(x) // 2, len(x) - 1}:
            for cut in (lambda a, i=i: a[i : i + 1], lambda a, i=i: a[i : i + 1].copy()):
                if layout != "C" and cut(x).strides[1:] != x.strides[1:]:
                    continue  # another layout may add in another order
                y_alone, pullback = case.vjp(inputs | {"x": cut(x)})
                assert same_bits(y_alone[0], y[i]), (layout, i)
                assert same_bits(pullback(cut(dy)).x[0], dx[i]), (layout, i)


@kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_short_rows(norm: str, dtype: str, backend: str, xp: Any) -> None:
    """Of which kernels may take several at once, unless one among them is extreme: as many as there
    are, or fewer.
    """
    rng, run, eps = np.random.default_rng(0), NORMS[norm], finfo(dtype).eps
    for size, count in itertools.product((1, 2, 3, 7, 8, 9, 16, 23, 31, 33), (1, 5, 8, 9, 270)):
        x, first = rng.normal(1, 2, (count, size)).astype(dtype), count // 9
        extreme = x[first : first + 99]
        extreme[1::7], extreme[3::7, 0], extreme[4::7] = 300, np.inf, np.nan
        x, gamma = xp.asarray(x), xp.asarray(rng.normal(size=size).astype(dtype))
        y = run(x, gamma)
        out = x.copy()
        assert same_bits(run(out, gamma, out=out), y), (size, count)
        with nk.use_backend("reference"):
            want = run(numpy(x).astype("float64"), numpy(gamma).astype("float64"))
        got = numpy(y).astype("float64")
        assert (np.isnan(got) == np.isnan(want)).all(), (size, count)
        off = np.nanmax(abs(got - want), initial=0)
        assert off <= 8 * eps * (1 + np.nanmax(abs(want), initial=0)), (size, count)
        dy, x = (rng.normal(1, 2, (count, size)).astype(dtype) for _ in range(2))
        if dtype != "float16":  # some whose arithmetic is wider than their neighbours'
            x[first + 6 : first + 99 : 7] *= 1e15
        dy, x = xp.asarray(dy), xp.asarray(x)
        grads = nk.vjp(run, x, gamma, eps=1.0)[1](dy)  # else few elements may have a huge rstd
        with nk.use_backend("reference"):
            wide = [numpy(a).astype("float64") for a in (x, gamma, dy)]
            wants = nk.vjp(run, *wide[:2], eps=1.0)[1](wide[2])
        for grad, want in zip(grads[:2], wants[:2], strict=True):
            off = abs(numpy(grad).astype("float64") - want).max()
            assert off <= 16 * eps * (1 + abs(want).max()), (size, count)
        for i in {0, min(first + 9, count - 1), count // 2, count - 1}:
            some = slice(i, i + 1)
            assert same_bits(run(x[some], gamma), run(x, gamma)[some]), (size, count, i)
            alone = nk.vjp(run, x[some], gamma, eps=1.0)[1](dy[some])
            assert same_bits(alone.x, grads.x[some]), (size, count, i)


@kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("name", "extreme"),
    [
        *itertools.product(["instance_norm", "group_norm"], ["nothing", "a parameter", "a sample"]),
        ("batch_norm", "nothing"),  # by given statistics, whatever the sample
        ("batch_norm", "a parameter"),
    ],
)
def test_runs_of_elements_that_share_a_parameter(
    name: str, extreme: str, dtype: str, backend: str, xp: Any
) -> None:
    """Of which a line of memory may have parts of two: whole lines, more, or less than one."""
    rng, norm = np.random.default_rng(0), getattr(nk, name)
    options: dict[str, Any] = {"num_groups": 2} if name == "group_norm" else {}
    for run in (1, 8, 15, 16, 17, 33, 49, 64, 100, 196):
        x, dy = (rng.normal(1, 2, (7, 6, run)).astype(dtype) for _ in range(2))
        gamma, beta, mean, var = rng.uniform(0.5, 2, (4, 6)).astype("float32")
        # Some are computed in wider arithmetic than their neighbours.
        if extreme == "a sample" and dtype != "float16":
            x[3] *= x.dtype.type(2.0 ** (910 if dtype == "float64" else 45))
        elif extreme == "a parameter":
            gamma[2], x[3, 4], x[5, 1] = 1e-35, 0 if name == "batch_norm" else np.nan, 0
        x, dy, gamma, beta, mean, var = map(xp.asarray, (x, dy, gamma, beta, mean, var))
        if name == "batch_norm":
            options = {"training": False, "running_mean": mean, "running_var": var}
        y, pullback = nk.vjp(norm, x, gamma, beta, eps=1.0, **options)
        got = y, *pullback(dy)[:3]
        with nk.use_backend("reference"):
            wide = {k: numpy(v).astype("float64") for k, v in options.items() if k[0] == "r"}
            args = (numpy(a).astype("float64") for a in (x, gamma, beta))
            y_exact, pullback = nk.vjp(norm, *args, eps=1.0, **options | wide)
            want = y_exact, *pullback(numpy(dy).astype("float64"))[:3]
        for one, exact in zip(got, want, strict=True):
            eps, one = finfo(str(one.dtype)).eps, numpy(one).astype("float64")
            assert (np.isnan(one) == np.isnan(exact)).all(), run
            off = np.nanmax(abs(one - exact), initial=0)
            assert off <= 16 * eps * (1 + np.nanmax(abs(exact), initial=0)), run
        out = x.copy()
        assert same_bits(norm(out, gamma, beta, eps=1.0, out=out, **options), y), run
        for i in () if name == "batch_norm" else (0, 3, 6):
            alone, pullback = nk.vjp(norm, x[i : i + 1], gamma, beta, eps=1.0, **options)
            assert same_bits(alone[0], y[i]), (run, i)
            assert same_bits(pullback(dy[i : i + 1]).x[0], got[1][i]), (run, i)


@kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 40), (3, 40, 99)], ids=str)
def test_a_sample_is_inferred_alone_as_in_a_batch(
    shape: tuple[int, ...], dtype: str, backend: str, xp: Any
) -> None:
    """Beside a parameter that takes wider arithmetic, too."""
    rng = np.random.default_rng(0)
    x = xp.asarray(rng.normal(size=shape).astype(dtype))
    gamma, beta, mean, var = (rng.uniform(0.5, 2, 40).astype("float32") for _ in range(4))
    gamma[7] = 1e-35
    params = xp.asarray(gamma), xp.asarray(beta)
    given = {"running_mean": xp.asarray(mean), "running_var": xp.asarray(var), "training": False}
    alone, together = (nk.batch_norm(some, *params, **given) for some in (x[:1], x))
    assert same_bits(alone, together[:1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [case for case in ALONE if case.size <= 400], ids=str)
def test_a_sample_has_the_same_bits_whatever_the_others_hold(
    case: Case, dtype: str, backend: str, xp: Any
) -> None:
    inputs = to_device(case.inputs(dtype), xp)
    inputs = {k: v for k, v in inputs.items() if not k.startswith("running")}
    large = float(finfo(dtype).max) / 16  # x stays finite
    for layout, lay_out in ANY_DEVICE.items():
        y, pullback = case.vjp(inputs | {"x": lay_out(inputs["x"])})
        dx = pullback(lay_out(inputs["dy"])).x
        for value in (0.0, 1e-7, large, math.inf, math.nan):
            factor = xp.asarray([value]).astype(dtype)
            x, dy = inputs["x"].copy(), inputs["dy"].copy()
            x[1:] *= factor
            dy[1:] *= factor
            y_then, pullback = case.vjp(inputs | {"x": lay_out(x)})
            dx_then = pullback(lay_out(dy)).x
            assert same_bits(y_then[0], y[0]), (layout, value)
            assert same_bits(dx_then[0], dx[0]), (layout, value)


@kernels
def test_gradients_of_dy_whose_sums_leave_float32(backend: str, xp: Any) -> None:
    """On the way, that is: in the end they do not."""
    x = 2.0**-12 * np.random.default_rng(0).normal(size=(1, 1, 64)).astype("bfloat16")
    dy = 2.0**127 * np.tile(np.repeat([1.0, -1.0], 8), 4).reshape(x.shape).astype("bfloat16")
    ones = np.ones(1, "float32")
    _, pullback = nk.vjp(nk.instance_norm, *map(xp.asarray, (x, ones, ones)), eps=1e-5)
    dgamma, dbeta = map(numpy, pullback(xp.asarray(dy))[1:])
    wide = x.astype("float64")
    xhat = (wide - wide.mean()) / np.sqrt(wide.var() + 1e-5)
    assert dbeta == 0
    np.testing.assert_allclose(dgamma, [(dy * xhat).sum()], rtol=1e-6)


@kernels
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("shape", [(1030, 6), (5, 6), (2, 6, 3), (9, 6, 700)], ids=str)
def test_halves_far_from_zero_have_exact_statistics(
    shape: tuple[int, ...], dtype: str, backend: str, xp: Any
) -> None:
    """Whose squares float32 could not add up; and those beside them keep their bits."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape)
    means = [0.0, 3.0, 4.5, 100.0, 0.0, 1e-30 if dtype == "bfloat16" else 1e-5]
    scales = [1.0, 1.0, 1.0, 0.5, 0.0, means[-1]]
    channels = (6, *[1] * (x.ndim - 2))
    x = (x * np.reshape(scales, channels) + np.reshape(means, channels)).astype(dtype)

    def statistics(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        mean, var = xp.zeros(x.shape[1]), xp.zeros(x.shape[1])
        nk.batch_norm(xp.asarray(x), running_mean=mean, running_var=var, momentum=1.0)
        return numpy(mean), numpy(var)

    mean, var = statistics(x)
    wide, axes = x.astype("float64"), (0, *range(2, x.ndim))
    np.testing.assert_allclose(mean, wide.mean(axes), rtol=2e-6, atol=1e-300)
    np.testing.assert_allclose(var, wide.var(axes, ddof=1), rtol=2e-6)
    for i in range(6):
        others = rng.normal(size=shape).astype(dtype)
        others[:, i] = x[:, i]
        mean_then, var_then = statistics(others)
        assert same_bits(mean_then[i], mean[i]), i
        assert same_bits(var_then[i], var[i]), i


@kernels
def test_parameters_that_repeat_along_a_row_have_exact_gradients(backend: str, xp: Any) -> None:
    x = np.random.default_rng(0).normal(size=(4, 256, 511)).astype("float32")
    dy, ones = np.full_like(x, 0.1), np.ones(511, "float32")
    options = {"axis": (1, 2), "param_axis": 2}
    _, pullback = nk.vjp(nk.layer_norm, *map(xp.asarray, (x, ones, ones)), **options)
    got = numpy(pullback(xp.asarray(dy)).beta)
    np.testing.assert_allclose(got, dy.sum(axis=(0, 1), dtype="float64"), rtol=1.2e-7)


@each_norm
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [7, 64, 1023])
def test_the_address_does_not_matter(
    case: Case, dtype: str, width: int, backend: str, xp: Any
) -> None:
    wide = Case(case.norm, (6, width) if case.name != "instance_norm" else (2, 3, width))
    if case.name == "group_norm":
        wide = Case(case.norm, (2, 6, width), {"num_groups": 3})
    inputs = to_device(wide.inputs(dtype), xp)
    want = wide.run(copied(inputs))
    for shift in range(1, 9):
        moved = {}
        for name in ("x", "dy"):
            buffer = xp.empty(wide.size + shift, dtype)
            moved[name] = buffer[shift:].reshape(wide.shape)
            moved[name][...] = inputs[name]
        got = wide.run(copied(inputs) | moved)
        assert all(same_bits(got[k], want[k]) for k in want), shift


# Values that are not finite


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_nan_and_inf_stay_in_their_group(case: Case, dtype: str, backend: str, xp: Any) -> None:
    inputs = case.inputs(dtype)
    statistics = {k for k in inputs if k.startswith("running")}
    at = np.unravel_index(case.size // 2, case.shape)
    hit = case.groups == case.groups[at]
    if case.frozen:
        hit = np.zeros(case.shape, bool)
        hit[at] = True
    clean = case.run(copied(to_device(inputs, xp)))
    for value in (math.nan, math.inf, -math.inf):
        dirty = copied(inputs)
        dirty["x"] = inputs["x"].copy()
        dirty["x"][at] = value
        got = case.run(to_device(dirty, xp))
        for name in ("y", "dx"):
            a, b = numpy(got[name]), numpy(clean[name])
            assert a[~hit].tobytes() == b[~hit].tobytes(), (name, value)
        assert not np.isfinite(numpy(got["y"])[at]), value
        if math.isnan(value):
            assert np.isnan(numpy(got["y"])[hit]).all()
            assert np.isnan(numpy(got["dx"])[hit]).all() or case.frozen
        for name in statistics if case.training else ():
            touched = np.zeros(math.prod(case.param_shape), bool)
            touched[case.params[hit]] = True
            a, b = numpy(got[name]).ravel(), numpy(clean[name]).ravel()
            assert a[~touched].tobytes() == b[~touched].tobytes(), (name, value)
            assert not np.isfinite(a[touched]).all(), (name, value)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("value", [0.0, 2.0**-70, 2.0**70, math.inf, math.nan])
def test_sums_of_halves_that_float32_loses(value: float, dtype: str, backend: str, xp: Any) -> None:
    """They are made again in float64, and those of other channels are not."""
    rng = np.random.default_rng(3)
    wide = rng.standard_normal((2, 70, 21), "float32")
    x, dy = wide.astype(dtype)
    _, pullback = nk.vjp(nk.batch_norm, xp.asarray(x), eps=0.0)
    clean = numpy(pullback(xp.asarray(dy)).x)
    others = np.arange(21) != 5
    scaled = dtype == "bfloat16" and 0 < value < math.inf  # products beyond float32, unlike dx
    with np.errstate(all="ignore"):
        if scaled:
            x[:, 5], dy[:, 5] = value * wide[:, :, 5]
        else:
            dy[:, 5] = value
        _, pullback = nk.vjp(nk.batch_norm, xp.asarray(x), eps=0.0)
        dx = numpy(pullback(xp.asarray(dy)).x)
    assert dx[:, others].tobytes() == clean[:, others].tobytes()
    if scaled:
        with nk.use_backend("reference"):
            want = nk.vjp(nk.batch_norm, x.astype("float64"), eps=0.0)[1](dy.astype("float64")).x
        np.testing.assert_allclose(dx[:, 5].astype("float64"), want[:, 5], 2.0**-7, 2.0**-9)
    else:
        assert (np.isfinite(dx[:, 5]) == np.isfinite(dy[:, 5])).all()


@pytest.mark.parametrize("case", [c for c in ONE_OF_EACH if c.name != "batch_renorm"], ids=str)
def test_nan_in_dy_stays_in_its_group(case: Case, backend: str, xp: Any) -> None:
    inputs = case.inputs("float32")
    at = np.unravel_index(case.size // 2, case.shape)
    _, pullback = case.vjp(to_device(inputs, xp))
    clean = numpy(pullback(xp.asarray(inputs["dy"])).x)
    inputs["dy"][at] = math.nan
    dx, dgamma, dbeta = map(numpy, pullback(xp.asarray(inputs["dy"])))
    hit = case.groups == case.groups[at]
    assert dx[~hit].tobytes() == clean[~hit].tobytes()
    assert np.isnan(dx[hit]).all()
    for grad in (dgamma, dbeta):
        np.testing.assert_array_equal(
            np.isnan(grad.ravel()), np.arange(grad.size) == case.params[at]
        )


# Sizes


ONE_ELEMENT = [
    Case(nk.layer_norm, (5, 1)),
    Case(nk.layer_norm, (5, 3, 1, 1), {"axis": (2, 3)}),
    Case(nk.instance_norm, (3, 5), running=False),
    Case(nk.instance_norm, (3, 5, 1, 1), running=False),
    Case(nk.group_norm, (3, 6), {"num_groups": 6}),
    Case(nk.batch_norm, (1, 5), running=False),
    Case(nk.batch_norm, (1, 5, 1, 1), running=False),
    Case(nk.batch_norm, (3, 5), {"channel_axis": (0, 1)}, running=False),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ONE_ELEMENT, ids=str)
def test_a_group_of_one_element_gives_beta(case: Case, dtype: str, backend: str, xp: Any) -> None:
    inputs = case.inputs(dtype)
    largest = np.array(finfo(dtype).max, dtype)
    for x in (inputs["x"], np.full_like(inputs["x"], largest), np.full_like(inputs["x"], 0.1)):
        got = case.run(to_device(inputs | {"x": x}, xp))
        np.testing.assert_array_equal(numpy(got["y"]), inputs["beta"].ravel()[case.params])
        np.testing.assert_array_equal(numpy(got["dgamma"]), np.zeros(case.param_shape, dtype))
        report(mismatches(got, reference(case, inputs | {"x": x})))
    if "batch_renorm" not in case.name:
        zero = Case(case.norm, case.shape, case.options | {"eps": 0.0}, running=case.running)
        got = zero.run(to_device(inputs, xp))
        np.testing.assert_array_equal(numpy(got["y"]), inputs["beta"].ravel()[case.params])
        np.testing.assert_allclose(numpy(got["dx"]).astype("float64"), 0, atol=1e-6)


@each_norm
@pytest.mark.parametrize("dtype", DTYPES)
def test_empty_batches(case: Case, dtype: str, backend: str, xp: Any) -> None:
    empty = Case(case.norm, (0, *case.shape[1:]), case.options)
    given = to_device(empty.inputs(dtype), xp)
    before = copied(given)
    got = empty.run(given)
    for name in ("y", "dx"):
        assert (got[name].shape, got[name].dtype) == (empty.shape, given["x"].dtype)
    for name in ("gamma", "beta"):
        assert same_bits(got["d" + name], xp.zeros_like(given[name]))
    out = xp.empty_like(given["x"])
    assert empty.call(given, out=out) is out
    for name in SPREAD.get(case.name, ""), "running_mean":
        assert name not in given or same_bits(given[name], before[name])


@pytest.mark.parametrize("shape", [(3, 0), (0, 0), (2, 5, 0), (2, 0, 5)])
@pytest.mark.parametrize("name", NORMS)
def test_other_empty_arrays(name: str, shape: tuple[int, ...], backend: str, xp: Any) -> None:
    case = Case(NORMS[name], shape, {"num_groups": 1} if name == "group_norm" else {})
    given = to_device(case.inputs("float32"), xp)
    before = copied(given)
    got = case.run(given)
    assert got["y"].shape == got["dx"].shape == shape
    for param in ("gamma", "beta"):
        assert same_bits(got["d" + param], xp.zeros_like(given[param]))
    assert all(same_bits(given[k], before[k]) for k in given)


@each_norm
@pytest.mark.parametrize("dtype", DTYPES)
def test_eps_zero(case: Case, dtype: str, backend: str, xp: Any) -> None:
    zero = Case(case.norm, case.shape, case.options | {"eps": 0.0})
    got = zero.run(to_device(zero.inputs(dtype), xp))
    report(mismatches(got, exact(zero, dtype)))


def test_eps_zero_with_gamma_and_beta_of_the_batch_gives_x_back(backend: str, xp: Any) -> None:
    x = xp.asarray([[1.0], [3.0], [5.0], [7.0]])
    gamma, beta = xp.asarray([math.sqrt(5)]), xp.asarray([4.0])
    np.testing.assert_allclose(numpy(nk.batch_norm(x, gamma, beta, eps=0.0)), numpy(x), rtol=1e-15)


# Running statistics


STATISTICS = [case for case in SMALL if case.name in SPREAD and case.running and case.training]


@pytest.mark.parametrize("momentum", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("wide", ["float32", "float64"])
@pytest.mark.parametrize("case", STATISTICS, ids=str)
def test_running_statistics(case: Case, wide: str, momentum: float, backend: str, xp: Any) -> None:
    case = Case(case.norm, case.shape, case.options | {"momentum": momentum})
    for dtype in DTYPES:
        inputs = case.inputs(dtype)
        given = to_device(inputs, xp)
        for name in ("running_mean", SPREAD[case.name]):
            inputs[name] = inputs[name].astype(wide)
            # every second element of a larger array: updated in place, its neighbours kept
            given[name] = ANY_DEVICE["every second"](xp.asarray(inputs[name]))
        want = formula(case, inputs)
        case.call(given)
        for name in ("running_mean", SPREAD[case.name]):
            got = numpy(given[name])
            if momentum == 0:
                assert same_bits(got, inputs[name])
            tolerance = 4e-6 if "float32" in (wide, dtype) or dtype != "float64" else 1e-13
            np.testing.assert_allclose(got, want[name], rtol=tolerance, atol=tolerance)
            assert np.isnan(numpy(given[name].base)).sum() == given[name].base.size - got.size


def test_running_variance_is_unbiased(backend: str, xp: Any) -> None:
    x = xp.asarray([[1.0], [3.0], [5.0], [7.0]])
    mean, var = xp.zeros(1), xp.zeros(1)
    nk.batch_norm(x, running_mean=mean, running_var=var, momentum=1.0)
    assert (float(mean[0]), float(var[0])) == pytest.approx((4.0, 20 / 3))
    mean, std = xp.zeros(1), xp.zeros(1)
    nk.batch_renorm(x, running_mean=mean, running_std=std + 1, momentum=1.0, eps=4.0)
    nk.batch_renorm(x, running_mean=mean, running_std=std, r_max=1, d_max=0, momentum=1.0, eps=4.0)
    assert (float(mean[0]), float(std[0])) == (4.0, 3.0)  # biased, eps included


def test_instance_norm_averages_its_statistics_over_the_batch(backend: str, xp: Any) -> None:
    x = xp.asarray([[[1.0, 3.0]], [[10.0, 14.0]]])
    mean, var = xp.zeros(1), xp.zeros(1)
    nk.instance_norm(x, running_mean=mean, running_var=var, momentum=1.0)
    assert (float(mean[0]), float(var[0])) == ((2 + 12) / 2, (2 + 8) / 2)


@pytest.mark.parametrize("case", [c for c in SMALL if c.frozen], ids=str)
def test_inference_changes_nothing(case: Case, backend: str, xp: Any) -> None:
    inputs = case.inputs("float32")
    kept = {k: read_only(v) if xp is np else xp.asarray(v) for k, v in inputs.items()}
    case.run(kept)
    assert all(same_bits(kept[k], inputs[k]) for k in inputs)


def test_statistics_make_no_difference_in_training(backend: str, xp: Any) -> None:
    for case in STATISTICS:
        if case.name != "batch_renorm":
            given = to_device(case.inputs("float32"), xp)
            without = {k: v for k, v in given.items() if not k.startswith("running")}
            assert same_bits(case.call(given), case.call(without)), case


def test_instance_norm_infers_with_its_own_statistics_if_none_are_given(
    backend: str, xp: Any
) -> None:
    x = xp.asarray(np.random.default_rng(0).normal(size=(3, 4, 5)).astype("float32"))
    assert same_bits(nk.instance_norm(x, training=False), nk.instance_norm(x))


# Batch Renormalization


RENORM_SHAPES = [(17, 5), (3, 7, 5, 3), (17, 33, 9, 9), (3001, 17), (2, 3, 9001), (1, 4, 64, 33)]


@kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", RENORM_SHAPES, ids=str)
def test_renorm_without_room_is_batch_norm(
    shape: tuple[int, ...], dtype: str, backend: str, xp: Any
) -> None:
    inputs = to_device(Case(nk.batch_norm, shape, running=False).inputs(dtype), xp)
    channels = shape[1]
    for layout, params in itertools.product(("C", "channels last", "cropped"), (dtype, "float64")):
        x = ANY_DEVICE[layout](inputs["x"])
        gamma, beta = (inputs[k].astype(params) for k in ("gamma", "beta"))
        want, pullback = nk.vjp(nk.batch_norm, x, gamma, beta)
        gradients = pullback(inputs["dy"])
        for mean, std in ((0.5, 2.0), (math.nan, math.nan), (math.inf, 0.0), (0.0, math.inf)):
            y, pullback = nk.vjp(
                nk.batch_renorm,
                x,
                gamma,
                beta,
                running_mean=xp.full(channels, mean),
                running_std=xp.full(channels, std),
                r_max=1.0,
                d_max=0.0,
            )
            assert same_bits(y, want), (layout, params, mean, std)
            for got, known in zip(pullback(inputs["dy"]), gradients, strict=True):
                known = numpy(known).astype(np.float64)
                off = (1e-14 if dtype == "float64" else 4e-6) * (1 + np.abs(known).max())
                assert not mismatch(got, Want(known, off)), (layout, mean, std)


def test_renorm_by_hand(backend: str, xp: Any) -> None:
    """sigma_B = 2 and mean 5 against running_std 1 and running_mean 1: r = 2, d = 4."""
    x = xp.asarray([[3.0], [7.0]])

    def run(**options: float) -> list[float]:
        mean, std = xp.ones(1), xp.ones(1)
        y = nk.batch_renorm(x, running_mean=mean, running_std=std, eps=0.0, **options)
        return numpy(y).ravel().tolist()

    assert run() == [2.0, 6.0]  # (x - running_mean) / running_std: inside both clips
    assert run(r_max=1.5) == [2.5, 5.5]
    assert run(d_max=3.0) == [1.0, 5.0]
    assert run(r_max=math.inf, d_max=math.inf) == [2.0, 6.0]
    assert run(r_max=1, d_max=0) == [-1.0, 1.0]


def test_renorm_infers_without_a_second_eps(backend: str, xp: Any) -> None:
    x = xp.asarray([[3.0], [7.0]])
    mean, std = xp.ones(1), xp.full(1, 2.0)
    y = nk.batch_renorm(x, running_mean=mean, running_std=std, training=False, eps=100.0)
    assert numpy(y).ravel().tolist() == [1.0, 3.0]


def test_renorm_passes_nan_through_its_clips(backend: str, xp: Any) -> None:
    x = xp.asarray(np.random.default_rng(0).normal(size=(9, 3)))
    mean, std = xp.zeros(3), xp.asarray([1.0, math.nan, 1.0])
    y = numpy(nk.batch_renorm(x, running_mean=mean, running_std=std))
    assert np.isnan(y).all(axis=0).tolist() == [False, True, False]
    assert np.isfinite(y[:, [0, 2]]).all()
    mean = xp.asarray([0.0, 0.0, math.nan])
    y = numpy(nk.batch_renorm(x, running_mean=mean, running_std=xp.ones(3)))
    assert np.isnan(y).all(axis=0).tolist() == [False, False, True]


def test_renorm_schedule() -> None:
    schedule = nk.RenormSchedule()
    assert [schedule(step) for step in (0, 5000)] == [(1.0, 0.0)] * 2
    assert schedule(15_000) == pytest.approx((1 + 2 * 10 / 35, 5 * 10 / 20))
    assert schedule(25_000) == pytest.approx((1 + 2 * 20 / 35, 5.0))
    assert [schedule(step) for step in (40_000, 10**9)] == [(3.0, 5.0)] * 2
    bounds = [schedule(step) for step in range(0, 50_000, 500)]
    assert bounds == sorted(bounds)
    again = pickle.loads(pickle.dumps(schedule))
    assert again == schedule
    assert again(12_345) == schedule(12_345)


def test_renorm_schedule_of_ones_own() -> None:
    schedule = nk.RenormSchedule(warmup=10, r_max=2.0, r_steps=20, d_max=1.0, d_steps=30)
    assert [schedule(step) for step in (10, 15, 20, 30)] == [
        (1.0, 0.0), (1.5, 0.25), (2.0, 0.5), (2.0, 1.0)
    ]  # fmt: skip


# Swapping norms


METHODS = {
    "batch": (nk.batch_norm, {"running_mean", "running_var", "training", "momentum"}),
    "batch_renorm": (
        nk.batch_renorm,
        {"running_mean", "running_std", "training", "momentum", "r_max", "d_max"},
    ),
    "layer": (nk.layer_norm, set()),
    "instance": (nk.instance_norm, {"running_mean", "running_var", "training", "momentum"}),
    "group": (nk.group_norm, {"num_groups"}),
    "rms": (nk.rms_norm, set()),
}


@pytest.mark.parametrize("channel_axis", [1, -1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_normalize_swaps_by_one_word(method: str, channel_axis: int, backend: str, xp: Any) -> None:
    norm, own = METHODS[method]
    rng = np.random.default_rng(0)
    x = xp.asarray(rng.normal(size=(3, 4, 4, 4)))
    gamma, beta = xp.asarray(rng.normal(size=(2, 4)))
    union = {
        "eps": 0.5,
        "momentum": 0.25,
        "training": True,
        "running_mean": xp.zeros(4),
        "running_var": xp.ones(4),
        "running_std": xp.ones(4),
        "r_max": 2.0,
        "d_max": 1.0,
        "num_groups": 2,
    }
    direct = {k: v for k, v in copied(union).items() if k in own | {"eps"}} | {
        "channel_axis": channel_axis
    }
    if method in ("layer", "rms"):
        direct = {"eps": 0.5, "axis": (1, 2, 3), "param_axis": channel_axis}
    want, want_pullback = nk.vjp(norm, x, gamma, beta, **direct)
    options = copied(union) | {"channel_axis": channel_axis}
    y, pullback = nk.vjp(nk.normalize, x, method, gamma, beta, **options)
    assert same_bits(y, want)
    assert all(map(same_bits, pullback(x), want_pullback(x)))
    again = copied(union) | {"channel_axis": channel_axis}
    assert same_bits(nk.normalize(x, method, gamma, beta, **again), want)
    for name in ("running_mean", "running_var", "running_std"):
        touched = not same_bits(options[name], union[name])
        assert touched == (name in own), name
        assert not touched or same_bits(options[name], direct[name])


def test_a_partial_of_a_norm_has_a_pullback(backend: str, xp: Any) -> None:
    x = xp.asarray(np.random.default_rng(0).normal(size=(3, 4, 5)))
    y, pullback = nk.vjp(functools.partial(nk.group_norm, num_groups=2, eps=0.5), x, eps=0.25)
    want, want_pullback = nk.vjp(nk.group_norm, x, num_groups=2, eps=0.25)
    assert same_bits(y, want)
    assert same_bits(pullback(x).x, want_pullback(x).x)


# A norm of one's own


@nk.norm
def channel_rms_norm(x, gamma=None, beta=None, *, channel_axis=1, eps=1e-5, out=None):
    """Batch norm's axes with RMS norm's statistics."""
    return nk.Call(x, gamma, beta, per_channel, channel_axis, eps=eps, center=False, out=out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(9, 5), (3, 7, 5, 3), (2, 3, 2, 3, 3)], ids=str)
def test_a_seventh_norm(shape: tuple[int, ...], dtype: str, backend: str, xp: Any) -> None:
    reduced = tuple(a for a in range(len(shape)) if a != 1)
    twin = Case(nk.rms_norm, shape, {"axis": reduced, "param_axis": 1})
    report(problems(Case(channel_rms_norm, shape), dtype, xp, exact(twin, dtype)))


def test_a_seventh_norm_is_checked_like_the_others() -> None:
    with pytest.raises(ValueError, match=r"^channel_rms_norm: gamma has shape \(4,\)"):
        channel_rms_norm(np.ones((2, 3)), np.ones(4))


def test_channels_last_is_never_copied() -> None:
    """A view goes in and y lies like it: neither is transposed on the way."""
    x = axis_to(1, 3)(np.random.default_rng(0).normal(size=(3, 4, 5, 6)))
    for norm in NORMS.values():
        options = {"num_groups": 2} if norm is nk.group_norm else {}
        if norm is nk.batch_renorm:
            options = {"running_mean": np.zeros(4), "running_std": np.ones(4)}
        assert norm(x, **options).strides == x.strides
