"""Layers: the functions' bits, swaps by one word, and states that go on where they were saved."""

import copy
import io
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import ml_dtypes  # makes np.dtype("bfloat16") known
import numpy as np
import pytest
from cases import DTYPES, numpy, same_bits
from layouts import axis_to

import normkit as nk
from normkit import layers
from normkit.layers import Layer

STATISTICS = ("running_mean", "running_var", "running_std")


class Case(NamedTuple):
    """A layer, an input's shape, and what the layer means: a function with all its options."""

    layer: Callable[..., Layer]
    shape: tuple[int, ...]
    means: Callable[..., Any]

    def __str__(self) -> str:
        return f"{self.layer()}{self.shape}".replace(" ", "")


CASES = [
    Case(partial(layers.BatchNorm, 4), (6, 4, 5), nk.batch_norm),
    Case(
        partial(layers.BatchNorm, 5, channel_axis=-1, momentum=0.25, eps=0.5, bias=False),
        (6, 4, 5),
        partial(nk.batch_norm, channel_axis=2, momentum=0.25, eps=0.5),
    ),
    Case(
        partial(layers.BatchNorm, (4, 5), channel_axis=(1, 2)),
        (6, 4, 5),
        partial(nk.batch_norm, channel_axis=(1, 2)),
    ),
    Case(partial(layers.BatchNorm, 4, track_running_stats=False), (6, 4), nk.batch_norm),
    Case(partial(layers.BatchRenorm, 4), (6, 4, 5), nk.batch_renorm),
    Case(
        partial(layers.BatchRenorm, 4, r_max=1.5, d_max=0.5, momentum=0.5, affine=False),
        (6, 4, 5),
        partial(nk.batch_renorm, r_max=1.5, d_max=0.5, momentum=0.5),
    ),
    Case(partial(layers.LayerNorm, 5), (6, 4, 5), nk.layer_norm),
    Case(
        partial(layers.LayerNorm, (4, 5), eps=0.5),
        (6, 4, 5),
        partial(nk.layer_norm, axis=(1, 2), eps=0.5),
    ),
    Case(
        partial(layers.LayerNorm, 4, channel_axis=1),
        (6, 4, 5),
        partial(nk.layer_norm, axis=(1, 2), param_axis=1),
    ),
    Case(partial(layers.InstanceNorm, 4), (6, 4, 5), nk.instance_norm),
    Case(
        partial(layers.InstanceNorm, 5, channel_axis=-1, track_running_stats=True, momentum=0.5),
        (6, 4, 5),
        partial(nk.instance_norm, channel_axis=2, momentum=0.5),
    ),
    Case(
        partial(layers.GroupNorm, 4, num_groups=2), (6, 4, 5), partial(nk.group_norm, num_groups=2)
    ),
    Case(partial(layers.RMSNorm, 5, bias=False), (6, 4, 5), nk.rms_norm),
    Case(
        partial(layers.RMSNorm, (4, 5), affine=False), (6, 4, 5), partial(nk.rms_norm, axis=(1, 2))
    ),
]
every_case = pytest.mark.parametrize("case", CASES, ids=str)


def batch(shape: tuple[int, ...], step: int, xp: Any, dtype: str = "float32") -> Any:
    rng = np.random.default_rng(step)
    return xp.asarray(rng.normal(1 + step, 2.0, shape).astype(dtype))


def train(layer: Layer, shape: tuple[int, ...], steps: range, xp: Any) -> list[Any]:
    """Everything that some steps of gradient descent give, and inference after them."""
    seen = []
    for step in steps:
        x = batch(shape, step, xp)
        y, pullback = layer.train().vjp(x)
        grads = pullback(y)
        for param, grad in ((layer.gamma, grads.gamma), (layer.beta, grads.beta)):
            if param is not None:
                param -= 0.25 * grad
        seen += [y, *grads]
    return [a for a in [*seen, layer.eval()(x)] if a is not None]


@every_case
def test_a_layer_is_its_function(case: Case, backend: str, xp: Any) -> None:
    layer, options = case.layer(xp=xp), {}
    for name in STATISTICS:
        if getattr(layer, name, None) is not None:
            options[name] = getattr(layer, name).copy()
    for step in range(2):
        x = batch(case.shape, step, xp)
        if layer.gamma is not None:
            layer.gamma += 0.5
        y, pullback = layer.vjp(x)
        want, want_pullback = nk.vjp(case.means, x, layer.gamma, layer.beta, **options)
        assert same_bits(y, want)
        for got, expected in zip(pullback(x), want_pullback(x), strict=True):
            assert (got is expected is None) or same_bits(got, expected)
        assert all(same_bits(getattr(layer, name), options[name]) for name in options)
    assert same_bits(layer(x), case.means(x, layer.gamma, layer.beta, **options))
    frozen = {"training": False} if options else {}
    before = layer.state_dict()
    y = layer.eval()(x, out=xp.empty_like(x))
    assert same_bits(y, case.means(x, layer.gamma, layer.beta, **options | frozen))
    assert all(map(same_bits, before.values(), layer.state_dict().values()))


UNION = {"num_groups": 2, "momentum": 0.25, "eps": 0.5, "r_max": 1.5, "d_max": 0.5}


@pytest.mark.parametrize("channel_axis", [1, -1])
@pytest.mark.parametrize("channels_last", [False, True])
def test_swap_by_one_word(channels_last: bool, channel_axis: int, backend: str, xp: Any) -> None:
    x = batch((3, 4, 6, 4), 0, xp)
    x = axis_to(1, 3)(x) if channels_last else x
    for method in ("batch", "batch_renorm", "layer", "instance", "group", "rms"):
        layer = layers.create(method, 4, channel_axis=channel_axis, xp=xp, **UNION)
        assert layer.gamma.shape == layer.beta.shape == (4,)
        statistics = {name: xp.ones(4, "float32") for name in STATISTICS}
        statistics["running_mean"][...] = 0
        if method == "instance":
            statistics = {}
        want, want_pullback = nk.vjp(
            nk.normalize, x, method, layer.gamma, layer.beta,
            channel_axis=channel_axis, **UNION, **statistics,
        )  # fmt: skip
        y, pullback = layer.vjp(x)
        assert y.strides == x.strides
        assert same_bits(y, want)
        assert all(map(same_bits, pullback(x), want_pullback(x)))


# Steps that count


def test_momentum_none_is_the_cumulative_average(backend: str, xp: Any) -> None:
    for kind, spread in ((layers.BatchNorm, "running_var"), (layers.BatchRenorm, "running_std")):
        layer = kind(3, momentum=None, dtype="float64", eps=0.0, xp=xp)
        means, spreads = [], []
        for step in range(4):
            x = batch((5, 3), step, xp, "float64")
            layer(x)
            means.append(x.mean(axis=0))
            spreads.append(x.var(axis=0, ddof=1) if spread == "running_var" else x.std(axis=0))
            np.testing.assert_allclose(numpy(layer.running_mean), numpy(sum(means)) / (step + 1))
            np.testing.assert_allclose(
                numpy(getattr(layer, spread)), numpy(sum(spreads)) / (step + 1)
            )


def test_schedule(backend: str, xp: Any) -> None:
    schedule = nk.RenormSchedule(warmup=1, r_max=2.0, r_steps=3, d_max=1.0, d_steps=3)
    layer = layers.BatchRenorm(3, schedule=schedule, xp=xp)
    mean, std = xp.zeros(3, "float32"), xp.ones(3, "float32")
    for step, (r_max, d_max) in enumerate([(1.0, 0.0), (1.0, 0.0), (1.5, 0.5), (2.0, 1.0)]):
        x = batch((5, 3), step, xp)
        want = nk.batch_renorm(x, running_mean=mean, running_std=std, r_max=r_max, d_max=d_max)
        assert same_bits(layer(x), want)


def test_what_counts_as_a_step() -> None:
    layer = layers.BatchRenorm(3)
    x = batch((5, 3), 0, np)
    layer.eval()(x)
    layer.train()(x[:0])
    with pytest.raises(ValueError, match="gamma has shape"):
        layer(x[:, :2])
    assert layer.step == 0
    layer(x)
    layer.vjp(x)
    assert layer.step == 2


# States


def through_state(layer: Layer, fresh: Layer) -> Layer:
    fresh.load_state_dict(layer.state_dict())
    return fresh


def through_file(layer: Layer, fresh: Layer) -> Layer:
    file = io.BytesIO()
    np.savez(file, **{name: numpy(value) for name, value in layer.state_dict().items()})
    file.seek(0)
    fresh.load_state_dict(np.load(file))
    return fresh


ROUND_TRIPS = {
    "state": through_state,
    "file": through_file,
    "pickle": lambda layer, fresh: pickle.loads(pickle.dumps(layer)),
    "deepcopy": lambda layer, fresh: copy.deepcopy(layer),
}
COUNTED = [
    Case(partial(layers.BatchNorm, 4, momentum=None), (6, 4), nk.batch_norm),
    Case(
        partial(layers.BatchRenorm, 4, schedule=nk.RenormSchedule(1, r_steps=9, d_steps=5)),
        (6, 4),
        nk.batch_renorm,
    ),
]


@pytest.mark.parametrize("trip", ROUND_TRIPS)
@pytest.mark.parametrize("case", CASES + COUNTED, ids=str)
def test_a_round_trip_goes_on_bit_for_bit(case: Case, trip: str, backend: str, xp: Any) -> None:
    layer, fresh = case.layer(xp=xp), case.layer(xp=xp)
    train(layer, case.shape, range(3), xp)
    again = ROUND_TRIPS[trip](layer, fresh)
    assert repr(again) == repr(layer)
    want = train(layer, case.shape, range(3, 6), xp)
    assert all(map(same_bits, train(again, case.shape, range(3, 6), xp), want))
    assert all(map(same_bits, again.state_dict().values(), layer.state_dict().values()))


def test_a_state_is_a_snapshot_and_loads_in_place() -> None:
    layer = layers.BatchRenorm(4)
    train(layer, (6, 4), range(2), np)
    gamma, state = layer.gamma, layer.state_dict()
    assert list(state) == ["gamma", "beta", "running_mean", "running_std", "step"]
    assert all(type(value) is np.ndarray for value in state.values())
    want = train(layer, (6, 4), range(2, 4), np)
    layer.load_state_dict(state)
    assert layer.gamma is gamma  # an optimiser may hold it
    assert all(map(same_bits, train(layer, (6, 4), range(2, 4), np), want))


def test_a_state_is_cast_to_the_layers_dtypes() -> None:
    layer = layers.BatchNorm(2, dtype="float16")
    layer.load_state_dict({k: v.astype("float64") + 0.1 for k, v in layer.state_dict().items()})
    assert layer.gamma.dtype == "float16"
    assert layer.gamma.tolist() == [np.float16(1.1)] * 2


def without(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda state: {k: v for k, v in state.items() if k != name}


ONES = np.ones(4)
WRONG_STATES = {
    "missing": (without("beta"), ValueError, r"BatchRenorm\(4\): .*expected .*beta"),
    "unknown": (lambda s: s | {"weight": ONES}, ValueError, "weight.*expected"),
    "other norm": (lambda s: layers.BatchNorm(4).state_dict(), ValueError, "running_var.*expected"),
    "empty": (lambda s: {}, ValueError, "expected"),
    "shape": (lambda s: s | {"beta": ONES[:3]}, ValueError, r"beta .*\(3,\).*\(4,\)"),
    "broadcast": (lambda s: s | {"beta": ONES[0]}, ValueError, r"beta .*\(\).*\(4,\)"),
    "complex": (lambda s: s | {"beta": ONES * 1j}, TypeError, "beta .*complex.*float32"),
    "half a step": (lambda s: s | {"step": np.array(1.5)}, TypeError, "step .*float64.*int64"),
}


@pytest.mark.parametrize("wrong", WRONG_STATES)
def test_a_wrong_state_changes_nothing(wrong: str) -> None:
    change, error, message = WRONG_STATES[wrong]
    layer, other = layers.BatchRenorm(4), layers.BatchRenorm(4)
    train(layer, (6, 4), range(2), np)
    train(other, (6, 4), range(3), np)
    before = layer.state_dict()
    with pytest.raises(error, match=message):
        layer.load_state_dict(change(other.state_dict()))
    assert all(map(same_bits, layer.state_dict().values(), before.values()))


# Construction


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype: str, backend: str, xp: Any) -> None:
    for case in CASES:
        layer = case.layer(dtype=dtype, xp=xp)
        wide = "float64" if dtype == "float64" else "float32"
        for name, value in layer.state_dict().items():
            if name != "step":
                assert value.dtype == (wide if name in STATISTICS else dtype), name
        x = batch(case.shape, 0, xp, dtype)
        y, pullback = layer.vjp(x)
        assert y.dtype == dtype
        assert all(g is None or g.dtype == dtype for g in pullback(y))


REPRS = [
    (layers.BatchNorm(64), "BatchNorm(64)"),
    (layers.BatchNorm((3, 4), channel_axis=(1, 2)), "BatchNorm((3, 4), channel_axis=(1, 2))"),
    (layers.BatchNorm(8, momentum=None, eps=0.5), "BatchNorm(8, eps=0.5, momentum=None)"),
    (layers.LayerNorm((3, 4), affine=False), "LayerNorm((3, 4), affine=False)"),
    (layers.GroupNorm(8, num_groups=2), "GroupNorm(8, num_groups=2)"),
    (layers.RMSNorm(8, dtype=ml_dtypes.bfloat16), "RMSNorm(8, dtype=bfloat16)"),
    (layers.RMSNorm(8, dtype="float32", bias=False), "RMSNorm(8, bias=False)"),
    (layers.InstanceNorm(8, track_running_stats=True), "InstanceNorm(8, track_running_stats=True)"),
]


@pytest.mark.parametrize(("layer", "text"), REPRS, ids=[text for _, text in REPRS])
def test_repr(layer: Layer, text: str) -> None:
    assert repr(layer) == text


WRONG_OPTIONS = {
    "no channels": (lambda: layers.BatchNorm(0), ValueError, "channels=0 must be a positive int"),
    "no shape": (lambda: layers.LayerNorm(()), ValueError, r"shape=\(\) must be a positive int"),
    "float channels": (lambda: layers.RMSNorm(8.0), ValueError, r"shape=8.0 must be"),
    "tuple for instance": (lambda: layers.InstanceNorm((3, 4)), TypeError, "must be an int"),
    "dtype": (lambda: layers.LayerNorm(8, dtype=int), TypeError, "dtype=int64 must be one of"),
    "eps": (lambda: layers.RMSNorm(8, eps=-1.0), ValueError, "^rms_norm: eps=-1.0"),
    "momentum": (lambda: layers.BatchNorm(8, momentum=2.0), ValueError, "momentum=2.0 must be"),
    "r_max": (lambda: layers.BatchRenorm(8, r_max=0.5), ValueError, "^batch_renorm: r_max=0.5"),
    "groups": (lambda: layers.GroupNorm(32, num_groups=6), ValueError, "6 does not divide the 32"),
    "positional": (lambda: layers.BatchNorm(8, 0.1), TypeError, "positional"),
    "foreign option": (lambda: layers.LayerNorm(8, momentum=0.1), TypeError, "momentum"),
    "create: unknown option": (
        lambda: layers.create("batch", 8, weight=1),
        TypeError,
        "unknown option weight: .*num_groups",
    ),
    "create: unknown method": (
        lambda: layers.create("bach", 8),
        ValueError,
        "'bach' is unknown: expected one of batch",
    ),
    "create: no method": (lambda: layers.create(8, 8), TypeError, "method=8 must be a str"),
    "create: no groups": (lambda: layers.create("group", 8), TypeError, "num_groups"),
}


@pytest.mark.parametrize("wrong", WRONG_OPTIONS)
def test_a_wrong_option_is_refused_at_once(wrong: str) -> None:
    make, error, message = WRONG_OPTIONS[wrong]
    with pytest.raises(error, match=message):
        make()


@every_case
def test_other_sizes_are_refused_with_and_without_parameters(case: Case) -> None:
    x = np.ones([2 * n for n in case.shape], "float32")
    layer = case.layer()
    with pytest.raises(ValueError, match=r"expected"):
        layer(x)


def test_the_batch_axis_is_no_channel_axis() -> None:
    for method in ("layer", "rms", "instance"):
        with pytest.raises(ValueError, match="batch axis"):
            nk.layers.create(method, 4, channel_axis=0)(np.ones((4, 3), "float32"))


def test_a_layer_is_no_norm() -> None:
    layer = nk.layers.BatchNorm(2)  # which has a vjp of its own
    with pytest.raises(TypeError, match=r"^vjp: norm=.* is no norm"):
        nk.vjp(layer, np.ones((3, 2)))
