"""A call like one before is not checked again, and must do the same as if it were."""

import functools
from typing import Any

import numpy as np
import pytest
from cases import DTYPES, same_bits
from layouts import axis_to, read_only

import normkit as nk
from normkit.axes import over
from normkit.backends.numba import Numba

C = 6
Options = dict[str, Any]


def arrays(dtype: str = "float32", shape: tuple[int, ...] = (5, C, 7), seed: int = 0) -> Options:
    """Arguments by name; the parameters are in the dtype that kernels take as it is, or not."""
    rng = np.random.default_rng(seed)
    real = "float64" if dtype == "float64" else "float32"
    gamma, beta, mean = (rng.normal(size=C).astype(real) for _ in range(3))
    x = rng.normal(2, 3, shape).astype(np.dtype(dtype))
    spread = rng.uniform(0.5, 2, C).astype(real)
    return {"x": x, "gamma": gamma, "beta": beta, "mean": mean, "spread": spread}


def running(given: Options, spread: str = "running_var") -> Options:
    return {"running_mean": given["mean"].copy(), spread: given["spread"].copy()}


#: norm and its options, from the arrays
CALLS: dict[str, Any] = {
    "layer": lambda a: (nk.layer_norm, {"axis": 1, "param_axis": 1}),
    "rms": lambda a: (nk.rms_norm, {"axis": (1, 2), "param_axis": 1}),
    "instance": lambda a: (nk.instance_norm, {}),
    "group": lambda a: (nk.group_norm, {"num_groups": 2}),
    "batch": lambda a: (nk.batch_norm, {}),
    "batch, trained": lambda a: (nk.batch_norm, running(a)),
    "batch, given": lambda a: (nk.batch_norm, running(a) | {"training": False}),
    "instance, given": lambda a: (nk.instance_norm, running(a) | {"training": False}),
    "renorm": lambda a: (nk.batch_renorm, running(a, "running_std")),
    "renorm, given": lambda a: (
        nk.batch_renorm,
        running(a, "running_std") | {"training": False},
    ),
    "by name": lambda a: (functools.partial(nk.normalize, method="group"), {"num_groups": 3}),
    "by name, statistics ignored": lambda a: (
        functools.partial(nk.normalize, method="layer"),
        running(a) | {"num_groups": 3},
    ),
    "in place": lambda a: (nk.batch_norm, {"out": a["x"]}),
    "out": lambda a: (nk.layer_norm, {"axis": 1, "param_axis": 1, "out": np.empty_like(a["x"])}),
    "out, transposed": lambda a: (
        nk.instance_norm,
        {"out": np.empty_like(a["x"].T, order="C").T},
    ),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, C, 7), (1, C, 40), (3, C, 100), (0, C, 4)], ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
@pytest.mark.parametrize("call", CALLS)
def test_the_second_call_does_what_the_first_would(
    call: str, last: bool, shape: tuple[int, ...], dtype: str
) -> None:
    for params in ({"gamma", "beta"}, {"beta"}, set()):
        for seed in range(3):
            repeated = results(call, params, last, arrays(dtype, shape, seed))
            with nk.use_backend(Numba()):  # which has never been called
                first = results(call, params, last, arrays(dtype, shape, seed))
            for name, want in first.items():
                assert same_bits(repeated[name], want), name
                assert repeated[name].strides == want.strides


def results(call: str, params: set[str], last: bool, given: Options) -> Options:
    """Everything that a call and a pullback give or change."""
    if last:
        given["x"] = axis_to(1, 2)(given["x"])
    norm, options = CALLS[call](given)
    options = {name: given[name] for name in params} | options
    x, found = given["x"].copy(order="K"), {"y": norm(given["x"], **options)}
    if "out" in options:
        assert found["y"] is options.pop("out")
    y, pullback = nk.vjp(norm, x, **options)
    found |= {"y of vjp": y} | pullback(2 * x)._asdict()
    found |= {name: options[name] for name in options if name.startswith("running")}
    return {name: array for name, array in found.items() if array is not None}


def counted() -> tuple[Any, list[int]]:
    calls = [0]

    @functools.partial(nk.norm, pure=True)
    def norm(x, gamma=None, beta=None, *, axis=-1, eps=1e-5, out=None):  # type: ignore[no-untyped-def]
        """A norm that counts how often it is declared."""
        calls[0] += 1
        return nk.Call(x, gamma, beta, over, axis, eps=eps, out=out)

    return norm, calls


def test_only_calls_that_differ_in_what_is_checked_are_checked() -> None:
    norm, calls = counted()
    x, gamma = np.ones((3, 4), np.float32), np.ones(4, np.float32)
    checked = []
    for args, options in (
        ((x,), {}),
        ((x + 1,), {}),
        ((x, gamma), {}),
        ((x,), {"gamma": gamma}),
        ((x,), {"gamma": gamma + 1}),
        ((x,), {"beta": gamma}),
        ((x,), {"eps": 1}),
        ((x,), {"eps": 1.0}),
        ((x,), {"eps": 1.0}),
        ((x[:, ::1],), {}),
        ((x.astype(">f4"),), {}),
        ((x.T,), {}),
        ((np.ones((4, 3), np.float32),), {}),
        ((x,), {"out": np.empty_like(x)}),
        ((x,), {"out": np.empty_like(x)}),
    ):
        before = calls[0]
        norm(*args, **options)
        checked.append(calls[0] > before)
    assert checked == [1, 0, 1, 1, 0, 1, 1, 1, 0, 0, 1, 1, 1, 1, 0]


def test_a_norm_may_make_its_parameters_from_its_arguments() -> None:
    @functools.partial(nk.norm, pure=True)
    def norm(x, weight, bias=None):  # type: ignore[no-untyped-def]
        """RMS norm as some models have it."""
        return nk.Call(x, weight + 1, bias, over, -1, center=False)

    x, weight = np.ones((3, 4), np.float32), np.arange(4, dtype=np.float32)
    for scale in (1, 2, 3):
        assert same_bits(norm(x, weight * scale)[0], weight * scale + 1)
        assert same_bits(norm(x, 0 * weight, weight * scale)[0], weight * scale + 1)


def test_pullbacks_keep_the_arrays_of_their_own_call() -> None:
    pullbacks = []
    for seed in range(3):
        x = arrays(seed=seed)["x"]
        pullbacks.append((x, nk.vjp(nk.instance_norm, x)[1]))
    for x, pullback in pullbacks:
        with nk.use_backend(Numba()):
            want = nk.vjp(nk.instance_norm, x)[1](2 * x).x
        assert same_bits(pullback(2 * x).x, want)


def test_parameters_are_told_apart_by_name() -> None:
    @functools.partial(nk.norm, pure=True)
    def crossed(x, beta, gamma):  # type: ignore[no-untyped-def]
        """Its parameters are called by each other's names."""
        return nk.Call(x, beta, gamma, over, -1, eps=1e-5)

    @functools.partial(nk.norm, pure=True)
    def spread(x, *unused, out=None):  # type: ignore[no-untyped-def]
        """Its arguments have no names."""
        return nk.Call(x, None, None, over, -1, eps=1e-5, out=out)

    x, one = np.arange(12, dtype=np.float32).reshape(3, 4), np.ones(4, np.float32)
    for shift in (1, 2, 3):
        assert same_bits(crossed(x, one, one * shift), nk.layer_norm(x, one, one * shift))
        assert same_bits(crossed(x, one, one), nk.layer_norm(x, one, one))
        assert same_bits(spread(x, 1, 2, out=np.empty_like(x)), nk.layer_norm(x))


def test_a_backend_made_from_numba_is_asked_every_time() -> None:
    class Sevens(Numba):
        name = "sevens"

        def forward(self, x, axes, gamma, beta, y, **options):  # type: ignore[no-untyped-def]
            y[...] = 7
            return self.moments(x, axes, eps=options["eps"], center=options["center"])

    with nk.use_backend(Sevens()):
        for _ in range(3):
            assert np.all(nk.layer_norm(np.ones((2, 3))) == 7)


def test_the_chosen_backend_is_asked() -> None:
    x = arrays()["x"]
    want = nk.layer_norm(x.astype(np.float64)).astype(np.float32)
    ours = [nk.layer_norm(x) for _ in range(2)]
    with nk.use_backend("reference"):
        assert same_bits(nk.layer_norm(x), want)
    assert all(same_bits(nk.layer_norm(x), y) for y in ours)


def shared(given: Options) -> Options:
    both = np.zeros(2 * C - 1, np.float32)
    return {"running_mean": both[:C], "running_var": both[C - 1 :]}


#: What the signature does not tell: (options that differ from good ones, the error)
REFUSED: dict[str, tuple[Any, str]] = {
    "training as an int": (lambda a: {"training": 1}, "training=1 must be True or False"),
    "eps as a bool": (lambda a: {"eps": True}, "eps=True must be a real number"),
    "momentum as a bool": (lambda a: {"momentum": True}, "momentum=True must be a real number"),
    "channels as a bool": (lambda a: {"channel_axis": True}, "True"),
    "channels as a tuple of bools": (lambda a: {"channel_axis": (True,)}, "True"),
    "read-only mean": (
        lambda a: {"running_mean": read_only(a["mean"])},
        "running_mean is read-only",
    ),
    "read-only out": (lambda a: {"out": read_only(a["x"].copy())}, "out is read-only"),
    "the mean is gamma": (lambda a: {"running_mean": a["gamma"]}, "running_mean overlaps gamma"),
    "both are one": (shared, "running_mean overlaps running_var"),
    "out overlaps x": (
        lambda a: dict(zip(("x", "out"), overlapping(a["x"]), strict=True)),
        "out overlaps x",
    ),
}


def overlapping(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    both = np.zeros(x.size + 1, x.dtype)
    return both[:-1].reshape(x.shape), both[1:].reshape(x.shape)


@pytest.mark.parametrize("mistake", REFUSED)
def test_what_the_first_call_would_refuse_is_refused(mistake: str) -> None:
    given = arrays()
    good = {name: given[name] for name in ("x", "gamma", "beta")} | running(given)
    good |= {"training": True, "eps": 1, "momentum": 1, "channel_axis": 1}
    options, message = REFUSED[mistake]
    bad = good | options(given)
    if "out" in bad:
        good["out"] = np.empty_like(given["x"])
    for _ in range(2):
        nk.batch_norm(**good)
    before = {name: np.array(bad[name]) for name in ("running_mean", "running_var")}
    with pytest.raises((TypeError, ValueError), match=f"^batch_norm: .*{message}"):
        nk.batch_norm(**bad)
    assert all(same_bits(bad[name], want) for name, want in before.items())
