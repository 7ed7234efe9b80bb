"""What CuPy sees of the CUDA backend: arrays, devices, arguments, errors; with no GPU."""

import ctypes
import functools
import sys
from collections.abc import Iterator
from typing import Any

import cuda_host
import numpy as np
import nvrtc
import pytest
import test_cuda_backend
import test_repeat
from cases import same_bits
from layouts import axis_to
from test_cuda_backend import CALLS, Call, inputs, results, serving

import normkit as nk
from normkit import dispatch
from normkit.backends.cuda import Cuda

missing = cuda_host.unavailable() or nvrtc.unavailable()
pytestmark = pytest.mark.skipif(missing is not None, reason=str(missing))
if missing is None:
    import cupy
    from cupy_on_host import Machine, cupy_on_host

    from normkit.backends.cuda.device import CuPyDevice


@pytest.fixture
def machine() -> Iterator["Machine"]:
    with cupy_on_host() as made:
        yield made


RUNS = [(call, "float32") for call in CALLS[::4]] + [(CALLS[i], "bfloat16") for i in (0, 4, 7)]


@pytest.mark.parametrize(("call", "dtype"), RUNS, ids=str)
def test_the_bits_of_numpy_arrays(call: Call, dtype: str, machine: "Machine") -> None:
    given = inputs(call, dtype)
    with serving(test_cuda_backend.Host()) as device:
        want = results(call, *map(device.moved, given))
    got = results(call, *map(machine.array, given))
    for g, w in zip(got, want, strict=True):
        assert isinstance(g, cupy.ndarray)
        assert (g.dtype, g.strides) == (w.dtype, w.strides)
        assert machine.host_view(g).tobytes() == w.tobytes()


def test_a_wave_on_cupy() -> None:
    call = Call(nk.batch_norm, (1500, 64))
    given, waves = inputs(call, "float32"), test_cuda_backend.Waves()
    with serving(waves):
        want = results(call, *map(waves.moved, given))
    with cupy_on_host(limits=waves.limits, resident=16) as machine:
        got = results(call, *map(machine.array, given))
        assert any(test_cuda_backend.is_wave(kernel) for _, kernel in machine.launched)
        for g, w in zip(got, want, strict=True):
            assert machine.host_view(g).tobytes() == w.tobytes()


STATISTICS = {
    nk.batch_norm: "running_var",
    nk.instance_norm: "running_var",
    nk.batch_renorm: "running_std",
}


def arguments(norm: Any) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"x": (4, 6, 5, 5), "gamma": 6, "beta": 6}
    made = {k: rng.standard_normal(s).astype("float32") for k, s in shapes.items()}
    if norm in STATISTICS:
        made |= {"running_mean": np.zeros(6), STATISTICS[norm]: np.ones(6, "float32")}
    return made


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", [nk.batch_norm, nk.batch_renorm])
def test_running_statistics(norm: Any, training: bool, machine: "Machine") -> None:
    given = arguments(norm)
    on_device = {name: machine.array(a) for name, a in given.items()}
    y = norm(**on_device, training=training)
    with serving(test_cuda_backend.Host()):
        want = norm(**given, training=training)
    assert machine.host_view(y).tobytes() == want.tobytes()
    for name, a in given.items():
        assert machine.host_view(on_device[name]).tobytes() == a.tobytes(), name


def test_work_and_memory_are_on_the_device_of_x(machine: "Machine") -> None:
    with machine.device(1):
        x, gamma, beta = (machine.array(a) for a in list(arguments(nk.layer_norm).values()))
    for norm in (nk.batch_norm, nk.instance_norm):
        y, pullback = nk.vjp(norm, x, gamma, beta)
        assert machine.current == 0
        for array in (y, *pullback(y)):
            assert array.data.device_id == 1
    assert {device for device, _ in machine.launched} == {1}
    for name in ("gamma", "beta"):
        given = {"x": x, "gamma": gamma, "beta": beta} | {name: machine.array(np.ones(6, "f4"))}
        with pytest.raises(TypeError, match=rf"^batch_norm: {name} is on .*0.* and x on .*1"):
            nk.batch_norm(**given)
    with pytest.raises(TypeError, match=r"^pullback: dy is on .*0.* and x on .*1"):
        pullback(machine.array(np.ones(x.shape, "f4")))


# Calls like one before are not checked again: test_repeat.py, on CuPy arrays


def on_device(machine: "Machine", options: dict[str, Any]) -> dict[str, Any]:
    """The arrays on the device, laid out as they are; one that is there twice is so there too."""
    moved = {}
    for a in options.values():
        if isinstance(a, np.ndarray) and id(a) not in moved:
            order = sorted(range(a.ndim), key=lambda axis: -a.strides[axis])
            inverse = tuple(map(int, np.argsort(order)))
            moved[id(a)] = machine.array(a.transpose(order)).transpose(inverse)
    return {name: moved.get(id(a), a) for name, a in options.items()}


def everything(
    machine: "Machine", call: str, last: bool, params: set[str], given: dict[str, Any]
) -> dict[str, Any]:
    """What a call and a pullback give or change, and where it lies."""
    if last:
        given["x"] = axis_to(1, 2)(given["x"])
    norm, options = test_repeat.CALLS[call](given)
    options = {name: given[name] for name in ("x", *params)} | options
    here = on_device(machine, options)
    of_vjp = on_device(machine, {k: a for k, a in options.items() if k != "out"})
    y, pullback = nk.vjp(norm, **of_vjp)
    found = {"y": norm(**here), "y of vjp": y}
    if call == "renorm":  # whose gradients CuPy multiplies by r and d, by a kernel of its own
        assert pullback._stats.r is not None
        found |= {"r": pullback._stats.r, "d": pullback._stats.d}
    else:
        found |= pullback(y)._asdict()
    assert "out" not in here or found["y"] is here["out"]
    found |= {name: a for name, a in here.items() if name.startswith("running")}
    found |= {f"{name}, vjp": a for name, a in of_vjp.items() if name.startswith("running")}
    return {
        name: (machine.host_view(a).copy(), a.strides) for name, a in found.items() if a is not None
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
@pytest.mark.parametrize("call", [name for name in test_repeat.CALLS if "transposed" not in name])
def test_the_second_call_does_what_the_first_would(
    call: str, last: bool, dtype: str, machine: "Machine"
) -> None:
    for params in ({"gamma", "beta"}, {"beta"}, set[str]()):
        for seed in range(3):
            given = functools.partial(test_repeat.arrays, dtype, (5, 6, 7), seed)
            repeated = everything(machine, call, last, params, given())
            with nk.use_backend(Cuda(CuPyDevice())):  # which has never been called
                first = everything(machine, call, last, params, given())
            for name, (want, strides) in first.items():
                assert same_bits(repeated[name][0], want), name
                assert repeated[name][1] == strides, name


def test_only_calls_that_differ_in_what_is_checked_are_checked(machine: "Machine") -> None:
    norm, calls = test_repeat.counted()
    x, gamma = (machine.array(np.ones(shape, "f4")) for shape in ((3, 4), 4))
    with machine.device(1):
        other = machine.array(np.ones((3, 4), "f4"))
    checked = []
    for args, options in (
        ((x,), {}),
        ((machine.array(np.zeros((3, 4), "f4")),), {}),
        ((x, gamma), {}),
        ((x, machine.array(np.zeros(4, "f4"))), {}),
        ((x,), {"out": x}),
        ((x,), {"out": cupy.empty((3, 4), "f4")}),
        ((x.T,), {}),
        ((other,), {}),
        ((other,), {}),
    ):
        before = calls[0]
        norm(*args, **options)
        checked.append(calls[0] > before)
    assert checked == [1, 0, 1, 0, 1, 0, 1, 1, 0]


def test_a_repeated_call_is_on_the_device_of_x(machine: "Machine") -> None:
    given = list(arguments(nk.layer_norm).values())
    for home in (0, 1, 1, 0, 1):
        with machine.device(home):
            x, gamma, beta = map(machine.array, given)
        for current in (0, 1):
            with machine.device(current):
                machine.launched.clear()
                y = nk.batch_norm(x, gamma, beta)
                y_of_vjp, pullback = nk.vjp(nk.batch_norm, x, gamma, beta)
                for array in (y, y_of_vjp, *pullback(y)):
                    assert array.data.device_id == home
                assert {device for device, _ in machine.launched} == {home}
                assert machine.current == current
    elsewhere = machine.array(given[1])
    with pytest.raises(TypeError, match=r"^batch_norm: gamma is on .*0.* and x on .*1"):
        nk.batch_norm(x, elsewhere, beta)


def test_alignment_is_that_of_each_call(machine: "Machine") -> None:
    """On which the choice of a kernel depends, and which no signature tells."""
    data = np.random.default_rng(0).standard_normal(6 * 8 + 1).astype("f4")
    for shift in (0, 1, 0, 1):
        x = machine.array(data)[shift : shift + 48].reshape(6, 8)
        with serving(test_cuda_backend.Host()) as device:
            want = nk.layer_norm(device.moved(data[shift : shift + 48].reshape(6, 8)))
        machine.launched.clear()
        assert same_bits(machine.host_view(nk.layer_norm(x)), want)
        ((_, kernel),) = machine.launched
        assert f"Rows<4>, {1 - shift}," in kernel


def borrowed(memory: Any, offset: int, shape: tuple[int, ...]) -> Any:
    """A part of `memory`, float32, as DLPack hands it over: without a base, of a wrong size."""
    size = 4 * sum(shape)
    chunk = cupy.cuda.UnownedMemory(memory.data.ptr + offset, size, memory, 0)
    return cupy.ndarray(shape, "f4", cupy.cuda.MemoryPointer(chunk, 0))


def test_overlaps_of_arrays_that_have_no_base(machine: "Machine") -> None:
    memory = machine.array(np.ones(100, "f4"))
    take = functools.partial(borrowed, memory)
    x, mean = take(0, (6, 8)), take(4 * 48, (8,))
    same, apart, shifted = take(0, (6, 8)), take(4 * 50, (6, 8)), take(4, (6, 8))
    for _ in range(2):
        nk.layer_norm(x, out=same)
        nk.layer_norm(x, out=apart)
        with pytest.raises(ValueError, match=r"^layer_norm: out overlaps x"):
            nk.layer_norm(x, out=shifted)
        nk.batch_norm(x, running_mean=mean, running_var=take(4 * 56, (8,)))
        with pytest.raises(ValueError, match=r"^batch_norm: running_mean overlaps running_var"):
            nk.batch_norm(x, running_mean=mean, running_var=take(4 * 52, (8,)))


def test_a_backend_made_from_ours_is_asked_every_time(machine: "Machine") -> None:
    class Loud(Cuda):
        name = "loud"
        calls = 0

        def forward(self, *args: Any, **options: Any) -> Any:
            self.calls += 1
            return super().forward(*args, **options)

    x = machine.array(np.ones((2, 3), "f4"))
    loud = Loud(CuPyDevice())
    with nk.use_backend(loud):
        for _ in range(3):
            nk.layer_norm(x)
    assert loud.calls == 3


def test_numpy_arrays_among_cupy_arrays(machine: "Machine") -> None:
    x = machine.array(np.ones((4, 6), "f4"))
    with pytest.raises(TypeError, match=r"^layer_norm: gamma is a numpy array and x a cupy array"):
        nk.layer_norm(x, np.ones(6, "f4"))


@pytest.mark.parametrize("norm", STATISTICS, ids=lambda norm: norm.__name__)
def test_running_statistics_outlive_a_lack_of_memory(norm: Any, machine: "Machine") -> None:
    """Whichever of a call's allocations fails."""
    given = {name: machine.array(a) for name, a in arguments(norm).items()}
    before = {name: machine.host_view(a).tobytes() for name, a in given.items()}
    failed = 0
    for machine.left in range(20):
        try:
            nk.vjp(norm, **given)
            break
        except cupy.cuda.memory.OutOfMemoryError:
            failed += 1
        except cupy.cuda.runtime.CUDARuntimeError:
            break  # a kernel of CuPy's, which is all that is left to do
        for name, a in given.items():
            assert machine.host_view(a).tobytes() == before[name], name
    assert failed > 1


# What CuPy is given


def test_arguments_by_value() -> None:
    """CuPy passes on the address of the bytes."""
    from normkit.backends.cuda import device

    value = np.array([(1, 2.5)], [("a", "i8"), ("b", "f8")])[0]
    made = device._value(value)
    assert ctypes.string_at(made.ptr, 16) == value.tobytes()
    assert ctypes.string_at(device.CuPyDevice.null.ptr, 8) == bytes(8)


def test_a_kernel_that_cannot_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    from normkit.backends.cuda import compiler

    class Broken:
        def __init__(self, **options: Any) -> None:
            self.options = options

        def get_function(self, name: str) -> Any:
            raise cupy.cuda.compiler.CompileException("line 3: such a log", "", name, (), "nvrtc")

    class Device:
        def __init__(self, number: int) -> None:
            self.compute_capability = "90"

    monkeypatch.setattr(cupy, "RawModule", Broken)
    monkeypatch.setattr(cupy.cuda, "Device", Device)
    with pytest.raises(compiler.KernelError) as caught:
        compiler.function("nk::fold<float>", 0, 3)
    for part in ("nk::fold<float>", "device 3", "sm_90", "line 3: such a log"):
        assert part in str(caught.value)


def unavailable() -> str:
    with pytest.raises(RuntimeError, match=r"'cuda' backend is not available .*cuda12") as caught:
        dispatch.load.__wrapped__("cuda")
    return str(caught.value)


def test_an_old_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cupy, "__version__", "12.3.0")
    monkeypatch.delitem(sys.modules, "normkit.backends.cuda.device")
    monkeypatch.delitem(vars(sys.modules["normkit.backends.cuda"]), "backend", raising=False)
    assert "CuPy 12.3.0 is too old: 13.4 is needed" in unavailable()


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise cupy.cuda.runtime.CUDARuntimeError(35)

    monkeypatch.setattr(cupy.cuda.runtime, "getDeviceCount", fail)
    monkeypatch.delitem(vars(sys.modules["normkit.backends.cuda"]), "backend", raising=False)
    assert "no usable GPU or driver: cudaErrorInsufficientDriver" in unavailable()


def test_explain_reads_no_data(machine: "Machine") -> None:
    given = {name: machine.array(a) for name, a in arguments(nk.batch_norm).items()}
    said = nk.explain(nk.batch_norm, **given)
    assert machine.launched == []
    assert said.array == "cupy float32 (4, 6, 5, 5)"
    assert said.backend == "cuda"
    nk.batch_norm(**given)
    assert [kernel for _, kernel in machine.launched] == [step.kernel for step in said.steps]
