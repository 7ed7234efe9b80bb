"""Bad arguments: refused before any work, by a message that says what, what instead, and how."""

import functools
import sys
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from cases import SPREAD as STATISTICS

import normkit as nk
from normkit import dispatch

SHAPE = N, C, H, W = 2, 6, 4, 5
NORMS = ("batch_norm", "batch_renorm", "layer_norm", "instance_norm", "group_norm", "rms_norm")
BATCH, LAYERS = ("batch_norm", "batch_renorm"), ("layer_norm", "rms_norm")
PER_SAMPLE = ("instance_norm", "group_norm")

Arguments = dict[str, Any]


def good(norm: str) -> Arguments:
    """Arguments that every norm accepts, new at each call."""
    x = np.arange(N * C * H * W, dtype="float32").reshape(SHAPE)
    arguments = {"x": x, "gamma": f4(C), "beta": f4(C), "out": np.zeros_like(x)}
    arguments |= {"axis": 1, "param_axis": 1} if norm in LAYERS else {"channel_axis": 1}
    if norm in STATISTICS:
        arguments["running_mean"] = np.full(C, 0.5)
        arguments[STATISTICS[norm]] = np.full(C, 2.0)
    if norm == "group_norm":
        arguments["num_groups"] = 1
    return arguments


class Elsewhere:
    """An array of another library, as far as anyone can tell from its type."""

    shape, ndim, size, dtype = SHAPE, len(SHAPE), N * C * H * W, np.dtype("float32")
    strides = (480, 80, 20, 4)


def foreign(module: str, name: str) -> Any:
    return type(name, (Elsewhere,), {"__module__": module})()


TENSOR = foreign("torch", "Tensor")
JAX = foreign("jaxlib._jax", "ArrayImpl")
CUPY = foreign("cupy", "ndarray")


def overlapping(arguments: Arguments) -> Arguments:
    """x and out two overlapping windows of one array."""
    both = np.zeros((N + 1, C, H, W), "float32")
    return {"x": both[:-1], "out": both[1:]}


def first_of_x(name: str, *, like: str) -> Callable[[Arguments], Arguments]:
    """The argument is a view of another one's memory."""

    def change(arguments: Arguments) -> Arguments:
        memory = np.zeros(N * C * H * W, "float32")
        arguments = arguments | {"x": memory.reshape(SHAPE)}
        return {"x": arguments["x"], name: memory[:C]} if like == "x" else {name: arguments[like]}

    return change


def wrong_x(x: Any, error: type[Exception], *said: str) -> tuple[Any, ...]:
    return NORMS, {"x": x}, error, (": x", *said)


def frozen(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


def f4(*shape: int) -> np.ndarray:
    return np.ones(shape, "float32")


FLOATS = ("float16, bfloat16, float32, float64", "astype")

# the norms it concerns; the arguments that change (a dict, or a function of the good ones that
# gives it); the error; what its message says beside the norm's name
BAD: list[tuple[Any, ...]] = [
    # x
    wrong_x([[1.0, 2.0]], TypeError, "list", "numpy.asarray"),
    wrong_x(None, TypeError, "NoneType"),
    wrong_x(3.0, TypeError, "float", "numpy.asarray"),
    wrong_x(np.float32(3), TypeError, "float32"),
    wrong_x(f4(*SHAPE).astype(int), TypeError, "int64", *FLOATS),
    wrong_x(f4(*SHAPE).astype(bool), TypeError, "bool", *FLOATS),
    wrong_x(f4(*SHAPE).astype(complex), TypeError, "complex128", *FLOATS),
    wrong_x(f4(*SHAPE).astype(np.longdouble), TypeError, str(np.dtype(np.longdouble)), *FLOATS),
    wrong_x(f4(*SHAPE).astype(ml_dtypes.float8_e4m3fn), TypeError, "float8_e4m3fn", *FLOATS),
    wrong_x(f4(*SHAPE).astype(object), TypeError, "object", *FLOATS),
    wrong_x(f4(*SHAPE).astype(str), TypeError, "<U", *FLOATS),
    wrong_x(f4(*SHAPE).view([("a", "f4")]), TypeError, *FLOATS),
    wrong_x(np.ma.masked_array(f4(*SHAPE)), TypeError, "masked", "filled", ".data"),
    wrong_x(TENSOR, TypeError, "torch.Tensor", ".numpy()", "from_dlpack"),
    wrong_x(JAX, TypeError, "ArrayImpl", "numpy.asarray", "from_dlpack"),
    wrong_x(foreign("tensorflow.python", "EagerTensor"), TypeError, "EagerTensor", ".numpy()"),
    wrong_x(foreign("pandas", "DataFrame"), TypeError, "pandas.DataFrame", "NumPy or CuPy"),
    (BATCH + LAYERS, {"x": f4()}, ValueError, ["0 axes"]),
    (PER_SAMPLE, {"x": f4()}, ValueError, ["x has shape ()", "batch", "channel"]),
    (BATCH, {"x": f4(5)}, ValueError, ["(5,)", "x[:, None]"]),
    (PER_SAMPLE, {"x": f4(5)}, ValueError, ["(5,)", "batch", "channel"]),
    # gamma, beta
    *(
        row
        for p in ("gamma", "beta")
        for row in (
            (NORMS, {p: [1.0] * C}, TypeError, [p, "list"]),
            (NORMS, {p: 1.0}, TypeError, [p, "float"]),
            (NORMS, {p: np.float32(1)}, TypeError, [p, "float32"]),
            (NORMS, {p: f4(W)}, ValueError, [f"{p} has shape (5,)", "expected (6,)", str(SHAPE)]),
            (NORMS, {p: f4(1, C)}, ValueError, [f"{p} has shape (1, 6)", "expected (6,)"]),
            (NORMS, {p: f4()}, ValueError, [f"{p} has shape ()", "expected (6,)"]),
            (NORMS, {p: np.ones(C, int)}, TypeError, [f"{p} has dtype int64", *FLOATS]),
            (NORMS, {p: np.ones(C, "longdouble")}, TypeError, [p, *FLOATS]),
            (NORMS, {p: np.ma.ones(C)}, TypeError, [p, "masked", f"{p}.filled"]),
            (NORMS, {p: TENSOR}, TypeError, [p, "torch.Tensor", ".numpy()"]),
            (NORMS, {p: CUPY}, TypeError, [p, "cupy", "numpy", "one library"]),
        )
    ),
    # axes; each is tried after the good call with 1, which True and 1.0 are equal to
    *(
        row
        for norms, name in ((LAYERS, "axis"), (LAYERS, "param_axis"), (BATCH, "channel_axis"))
        for row in (
            (norms, {name: 4}, ValueError, [f"{name}=4", "out of range", "4 axes", "-4 to 3"]),
            (norms, {name: -5}, ValueError, [f"{name}=-5", "out of range"]),
            (norms, {name: (1, 4)}, ValueError, [f"{name}=4", "out of range"]),
            (norms, {name: (1, -3)}, ValueError, [f"{name}=(1, -3)", "twice"]),
            (norms, {name: (1, 1)}, ValueError, [f"{name}=(1, 1)", "twice"]),
            (norms, {name: ()}, ValueError, [f"{name}=()", "empty"]),
            (norms, {name: 1.0}, TypeError, [f"{name}=1.0", "int", "float"]),
            (norms, {name: True}, TypeError, [f"{name}=True", "int", "bool"]),
            (norms, {name: (True, 2)}, TypeError, [f"{name}=True", "int", "bool"]),
            (norms, {name: "1"}, TypeError, [f"{name}='1'", "int", "str"]),
            (norms, {name: [1, 2]}, TypeError, ["tuple", "list"]),
            (norms, {name: {1}}, TypeError, ["tuple", "set"]),
            (norms, {name: np.array([1])}, TypeError, ["tuple", "ndarray"]),
        )
    ),
    (LAYERS, {"axis": None}, TypeError, ["axis=None", "int", "NoneType"]),
    (BATCH, {"channel_axis": None}, TypeError, ["channel_axis=None", "int", "NoneType"]),
    (PER_SAMPLE, {"channel_axis": 4}, ValueError, ["channel_axis=4", "out of range", "4 axes"]),
    (PER_SAMPLE, {"channel_axis": 0}, ValueError, ["channel_axis=0", "batch axis", str(SHAPE)]),
    (PER_SAMPLE, {"channel_axis": -4}, ValueError, ["channel_axis=-4", "batch axis"]),
    (PER_SAMPLE, {"channel_axis": (1, 2)}, TypeError, ["channel_axis=(1, 2)", "int", "tuple"]),
    (PER_SAMPLE, {"channel_axis": 1.0}, TypeError, ["channel_axis=1.0", "int", "float"]),
    (PER_SAMPLE, {"channel_axis": True}, TypeError, ["channel_axis=True", "int", "bool"]),
    # num_groups
    (
        "group_norm",
        {"num_groups": 4},
        ValueError,
        ["group_norm: num_groups=4 does not divide the 6 channels of axis 1 (x has shape (2, 6, 4"],
    ),
    ("group_norm", {"num_groups": 12}, ValueError, ["num_groups=12 does not divide the 6"]),
    ("group_norm", {"num_groups": 0}, ValueError, ["num_groups=0", "positive int"]),
    ("group_norm", {"num_groups": -2}, ValueError, ["num_groups=-2", "positive int"]),
    ("group_norm", {"num_groups": 1.0}, TypeError, ["num_groups=1.0", "positive int"]),
    ("group_norm", {"num_groups": True}, TypeError, ["num_groups=True", "positive int"]),
    ("group_norm", {"num_groups": "2"}, TypeError, ["num_groups='2'", "positive int"]),
    ("group_norm", {"num_groups": np.array(2.5)}, TypeError, ["num_groups=", "positive int"]),
    ("group_norm", {"num_groups": None}, TypeError, ["num_groups=None", "positive int"]),
    ("group_norm", {"num_groups": [2]}, TypeError, ["num_groups", "int", "list"]),
    # numbers
    *(
        row
        for norms, name, low in (
            (NORMS, "eps", -1e-9),
            (tuple(STATISTICS), "momentum", -0.1),
            ("batch_renorm", "r_max", 0.5),
            ("batch_renorm", "d_max", -1.0),
        )
        for row in (
            (norms, {name: low}, ValueError, [f"{name}={low}", "must be"]),
            (norms, {name: float("nan")}, ValueError, [f"{name}=nan", "must be"]),
            (norms, {name: "0.5"}, TypeError, [f"{name}='0.5'", "real number", "str"]),
            (norms, {name: None}, TypeError, [f"{name}=None", "real number"]),
            (norms, {name: True}, TypeError, [f"{name}=True", "real number", "bool"]),
            (norms, {name: 1j}, TypeError, [f"{name}=1j", "real number", "complex"]),
            (norms, {name: f4(1)}, TypeError, [name, "real number", "ndarray"]),
        )
    ),
    (tuple(STATISTICS), {"momentum": 1.5}, ValueError, ["momentum=1.5", "[0, 1]"]),
    ("batch_renorm", {"r_max": float("-inf")}, ValueError, ["r_max=-inf", "at least 1"]),
    # training
    *(
        (tuple(STATISTICS), {"training": wrong}, TypeError, [f"training={wrong!r}", "True or"])
        for wrong in (1, 0.0, None, "yes")
    ),
    (
        "batch_norm",
        {"training": False, "running_mean": None, "running_var": None},
        ValueError,
        ["training=False", "running_mean", "running_var", "training=True"],
    ),
    *(
        (
            "batch_renorm",
            {"training": training, "running_mean": None, "running_std": None},
            ValueError,
            ["running_mean", "running_std"],
        )
        for training in (True, False)
    ),
    # running statistics
    *(
        ((norm,), {missing: None, "training": training}, ValueError, [missing, given])
        for norm, spread in STATISTICS.items()
        for missing, given in (("running_mean", spread), (spread, "running_mean"))
        for training in (True, False)
    ),
    *(
        row
        for norm, spread in STATISTICS.items()
        for name in ("running_mean", spread)
        for training in (True, False)
        for wrong, error, said in (
            (f4(W), ValueError, [f"{name} has shape (5,)", "expected (6,)", str(SHAPE)]),
            (f4(1, C), ValueError, [f"{name} has shape (1, 6)", "expected (6,)"]),
            ([0.0] * C, TypeError, [name, "list"]),
            (0.0, TypeError, [name, "float"]),
            (f4(C).astype("f2"), TypeError, [f"{name} has dtype float16", "float32 or float64"]),
            (f4(C).astype(int), TypeError, [f"{name} has dtype int64", "astype"]),
            (np.ma.ones(C), TypeError, [name, "masked"]),
            (CUPY, TypeError, [name, "cupy", "numpy"]),
            (TENSOR, TypeError, [name, "torch.Tensor"]),
        )
        for row in [(norm, {name: wrong, "training": training}, error, said)]
    ),
    *(
        row
        for norm, spread in STATISTICS.items()
        for name in ("running_mean", spread)
        for row in (
            (norm, {name: frozen(f4(C))}, ValueError, [name, "read-only", "cop"]),
            (norm, first_of_x(name, like="x"), ValueError, [f"{name} overlaps x"]),
            (norm, first_of_x("gamma", like=name), ValueError, [f"{name} overlaps gamma"]),
            (norm, first_of_x("beta", like=name), ValueError, [f"{name} overlaps beta"]),
            (norm, first_of_x(spread, like="running_mean"), ValueError, ["overlaps"]),
        )
    ),
    *(
        (
            norm,
            {"x": f4(n, C, 1, 1), "out": f4(n, C, 1, 1)},
            ValueError,
            ["running_var", "one element", f"({n}, 6, 1, 1)", "training=False"],
        )
        for norm, n in (("batch_norm", 1), ("instance_norm", 2))
    ),
    # out
    (NORMS, {"out": [0.0]}, TypeError, ["out", "list"]),
    (NORMS, {"out": f4(N, C, H)}, ValueError, ["out has shape (2, 6, 4)", str(SHAPE)]),
    (NORMS, {"out": f4(1, *SHAPE)}, ValueError, ["out has shape (1, 2, 6, 4, 5)", str(SHAPE)]),
    (NORMS, {"out": np.zeros(SHAPE)}, TypeError, ["dtype float64", "float32"]),
    (NORMS, {"out": np.zeros(SHAPE, "f2")}, TypeError, ["dtype float16", "float32"]),
    (NORMS, {"out": frozen(f4(*SHAPE))}, ValueError, ["out", "read-only"]),
    (NORMS, {"out": np.ma.ones(SHAPE, "f4")}, TypeError, ["out", "masked"]),
    (NORMS, {"out": CUPY}, TypeError, ["out", "cupy", "numpy"]),
    (NORMS, overlapping, ValueError, ["out overlaps x", "x itself"]),
    (NORMS, lambda a: {"out": a["x"][::-1]}, ValueError, ["out overlaps x"]),
    (NORMS, first_of_x("gamma", like="out"), ValueError, ["gamma"]),
    # signatures
    (NORMS, {"epsilon": 1e-5}, TypeError, ["epsilon"]),
    (("layer_norm", "group_norm", "rms_norm"), {"momentum": 0.1}, TypeError, ["momentum"]),
    (BATCH, {"num_groups": 2}, TypeError, ["num_groups"]),
]


def described(value: Any) -> str:
    if isinstance(value, np.ndarray | Elsewhere):
        return f"{type(value).__name__}:{value.dtype}{list(value.shape)}"
    return repr(value)


def rows() -> list[Any]:
    found = []
    for norms, change, error, said in BAD:
        named = "overlap"
        if isinstance(change, dict):
            named = ",".join(f"{name}={described(value)}" for name, value in change.items())
        for norm in norms if isinstance(norms, tuple) else (norms,):
            found.append(pytest.param(norm, change, error, said, id=f"{norm}-{named}"))
    return found


def vjp_by_name(norm: Callable[..., Any], *, x: Any, gamma: Any, beta: Any, **options: Any) -> Any:
    return nk.vjp(norm, x, gamma, beta, **options)


@pytest.mark.parametrize("through_vjp", [False, True], ids=["call", "vjp"])
@pytest.mark.parametrize(("norm", "change", "error", "said"), rows())
def test_bad_argument(
    norm: str, change: Any, error: Any, said: tuple[str, ...], through_vjp: bool
) -> None:
    call = getattr(nk, norm)
    if through_vjp:
        call = functools.partial(vjp_by_name, call)
    with nk.use_backend("reference"):
        call(**good(norm))  # nothing that a good call has left in a cache may let a bad one pass
        arguments = good(norm)
        arguments |= change(arguments) if callable(change) else change
        before = {k: v.copy() for k, v in arguments.items() if type(v) is np.ndarray}
        with pytest.raises(error) as caught:
            call(**arguments)
    message = str(caught.value)
    assert message.startswith(norm)
    for fragment in said:
        assert fragment in message
    for name, values in before.items():
        assert arguments[name].tobytes() == values.tobytes(), f"{name} was touched"


def test_out_must_not_hold_the_parameters() -> None:
    for name in ("gamma", "beta", "running_mean", "running_var"):
        memory = np.zeros((2, 3), "float32")
        arguments = {"gamma": f4(3), "running_mean": f4(3), "running_var": f4(3)}
        arguments |= {name: memory[0]}
        with pytest.raises(ValueError, match=f"^batch_norm: out overlaps {name}|{name} overlaps"):
            nk.batch_norm(f4(2, 3), out=memory, **arguments)


def test_arguments_after_beta_are_keywords() -> None:
    for norm in NORMS:
        arguments = good(norm)
        with pytest.raises(TypeError, match=f"^{norm}.*positional"):
            getattr(nk, norm)(arguments["x"], arguments["gamma"], arguments["beta"], 1)


def test_group_norm_asks_for_its_groups() -> None:
    with pytest.raises(TypeError, match=r"^group_norm.*num_groups"):
        nk.group_norm(f4(*SHAPE))


def test_x_comes_before_what_is_checked_of_it() -> None:
    """Whatever else is wrong, the first thing to say of a list is that it is one."""
    for norm in NORMS:
        with pytest.raises(TypeError, match="list"):
            getattr(nk, norm)(**good(norm) | {"x": [1.0], "eps": 0.5})


# Pullbacks and vjp


@pytest.mark.parametrize(
    ("dy", "error", "said"),
    [
        (f4(N, C, H), ValueError, ["dy has shape (2, 6, 4)", str(SHAPE)]),
        (f4(1, C, H, W), ValueError, ["dy has shape (1, 6, 4, 5)", str(SHAPE)]),
        (f4(*SHAPE).astype(int), TypeError, ["dy has dtype int64", *FLOATS]),
        (f4(*SHAPE).astype("longdouble"), TypeError, ["dy", *FLOATS]),
        ([[1.0]], TypeError, ["dy", "list"]),
        (1.0, TypeError, ["dy", "float"]),
        (np.float32(1), TypeError, ["dy", "float32"]),
        (None, TypeError, ["dy", "NoneType"]),
        (np.ma.ones(SHAPE), TypeError, ["dy", "masked", "dy.filled"]),
        (TENSOR, TypeError, ["dy", "torch.Tensor", ".numpy()"]),
        (CUPY, TypeError, ["dy", "cupy", "numpy"]),
    ],
)
def test_bad_dy(dy: Any, error: type[Exception], said: list[str]) -> None:
    with nk.use_backend("reference"):
        _, pullback = nk.vjp(nk.layer_norm, f4(*SHAPE))
        with pytest.raises(error, match=r"^pullback: ") as caught:
            pullback(dy)
    for fragment in said:
        assert fragment in str(caught.value)


def test_vjp_needs_x_afterwards() -> None:
    for norm in NORMS:
        arguments = good(norm)
        x = arguments.pop("x")
        before = {k: np.copy(v) for k, v in arguments.items()}
        for out in (x, x[...]):
            with pytest.raises(ValueError, match="out is x"):
                nk.vjp(getattr(nk, norm), x, **arguments | {"out": out})
        for name, values in before.items():
            np.testing.assert_array_equal(arguments[name], values)


@pytest.mark.parametrize("norm", [np.sum, "batch_norm", None, nk.RenormSchedule()])
def test_vjp_needs_a_norm(norm: Any) -> None:
    with pytest.raises(TypeError, match=r"^vjp: norm=.* layer_norm"):
        nk.vjp(norm, f4(*SHAPE))


# normalize, use_backend, RenormSchedule


@pytest.mark.parametrize(
    ("method", "options", "error", "said"),
    [
        ("batchnorm", {}, ValueError, ["method='batchnorm'", "batch_renorm", "layer", "rms"]),
        (nk.batch_norm, {}, TypeError, ["method=", "str", "batch_renorm"]),
        (None, {}, TypeError, ["method=None", "str"]),
        ("batch", {"epsilon": 1e-5}, TypeError, ["epsilon", "eps", "num_groups"]),
        ("layer", {"axis": 1}, TypeError, ["axis"]),
        ("rms", {"param_axis": 1}, TypeError, ["param_axis"]),
        ("group", {}, TypeError, ["num_groups"]),
        ("group", {"num_groups": 4}, ValueError, ["num_groups=4 does not divide the 6 channels"]),
        ("batch_renorm", {}, ValueError, ["running_mean", "running_std"]),
        *((m, {"channel_axis": (1, 2)}, TypeError, ["channel_axis"]) for m in ("rms", "instance")),
        *((m, {"channel_axis": True}, TypeError, ["channel_axis"]) for m in ("layer", "batch")),
        *((m, {"channel_axis": 4}, ValueError, ["out of range"]) for m in ("rms", "batch")),
        *(
            (m, {"channel_axis": 0}, ValueError, ["batch axis"])
            for m in ("layer", "rms", "instance")
        ),
    ],
)
@pytest.mark.parametrize("through_vjp", [False, True], ids=["call", "vjp"])
def test_bad_normalize(
    method: Any, options: Arguments, error: type[Exception], said: list[str], through_vjp: bool
) -> None:
    with nk.use_backend("reference"):
        nk.normalize(f4(*SHAPE), "layer", f4(C))
        normalize = functools.partial(nk.vjp, nk.normalize) if through_vjp else nk.normalize
        with pytest.raises(error) as caught:
            normalize(f4(*SHAPE), method, f4(C), **options)
    for fragment in ("normalize", *said):
        assert fragment in str(caught.value)


def test_unknown_backend() -> None:
    with (
        pytest.raises(ValueError, match=r"'nunba'.*numba, cuda, reference"),
        nk.use_backend("nunba"),
    ):
        pass


@pytest.mark.parametrize(
    "bounds",
    [{"r_max": 0.5}, {"d_max": -1.0}, {"warmup": -1}, {"r_steps": 10}, {"r_max": float("nan")}],
)
def test_bad_schedule(bounds: dict[str, float]) -> None:
    (name,) = bounds
    with pytest.raises(ValueError, match=f"{name}=.*expected"):
        nk.RenormSchedule(**bounds)


# Arrays of other libraries


@pytest.fixture
def without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine where the CUDA backend cannot be imported."""
    monkeypatch.setitem(sys.modules, "normkit.backends.cuda", None)
    dispatch.load.cache_clear()


@pytest.mark.usefixtures("without_cuda")
def test_a_cupy_array_without_its_backend() -> None:
    for norm in NORMS:
        with pytest.raises(RuntimeError) as caught:
            getattr(nk, norm)(**good(norm) | {"x": foreign("cupy", "ndarray"), "out": None})
        for fragment in ("cuda", 'pip install "normkit[cuda12]"', "normkit[cuda13]", "reference"):
            assert fragment in str(caught.value)


@pytest.mark.usefixtures("without_cuda")
@pytest.mark.parametrize("name", ["gamma", "beta", "running_mean", "out"])
def test_a_cupy_array_among_numpy_arrays_without_its_backend(name: str) -> None:
    """Mixing libraries is the mistake here: nothing that one could install would mend it."""
    arguments = good("batch_norm") | {name: foreign("cupy", "ndarray")}
    with pytest.raises(TypeError, match=rf"^batch_norm: {name} .*cupy.*numpy"):
        nk.batch_norm(**arguments)


def test_numba_is_not_for_cupy_arrays() -> None:
    with (
        nk.use_backend("numba"),
        pytest.raises(TypeError, match=r"'numba' backend .*numpy.*not cupy.ndarray"),
    ):
        nk.layer_norm(CUPY)


# Memory


@pytest.mark.parametrize("norm", STATISTICS)
@pytest.mark.parametrize("name", ["numba", "reference"])
def test_out_of_memory_in_the_middle_leaves_statistics(
    norm: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever of the allocations fails."""
    left = 0

    def scarce(allocate: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise MemoryError
            return allocate(*args, **options)

        return run

    function = getattr(nk, norm)
    with nk.use_backend(name):
        function(good(norm).pop("x"), **{k: v for k, v in good(norm).items() if k != "x"})
        for allocator in ("empty", "empty_like", "zeros_like", "broadcast_to", "clip"):
            monkeypatch.setattr(np, allocator, scarce(getattr(np, allocator)))
        for call in (function, functools.partial(nk.vjp, function)):
            failed = 0
            for allowed in range(20):
                left = 1000
                arguments = good(norm) | {"out": None}
                statistics = [arguments[k] for k in ("running_mean", STATISTICS[norm])]
                before = [a.tobytes() for a in statistics]
                left = allowed
                try:
                    call(arguments.pop("x"), **arguments)
                except MemoryError:
                    failed += 1
                    assert [a.tobytes() for a in statistics] == before
            assert 0 < failed < 20


def test_no_memory_for_the_result_leaves_statistics() -> None:
    x = np.broadcast_to(np.float32(1), (1 << 24, 3, 1 << 24))  # takes four bytes, and y 2**50
    for norm, spread in STATISTICS.items():
        statistics = {"running_mean": np.zeros(3), spread: np.ones(3)}
        with pytest.raises(MemoryError):
            getattr(nk, norm)(x, **statistics)
        assert statistics["running_mean"].tolist() == [0, 0, 0]
        assert statistics[spread].tolist() == [1, 1, 1]


def test_normalize_takes_no_scalar() -> None:
    for method in ("layer", "batch"):
        with pytest.raises(TypeError, match="is a scalar"):
            nk.normalize(np.float64(3), method)
