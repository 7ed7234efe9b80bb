"""What CuPy sees of the CUDA backend: arrays, devices, arguments, errors; with no GPU."""

import ctypes
import sys
from collections.abc import Iterator
from typing import Any

import cuda_host
import numpy as np
import nvrtc
import pytest
import test_cuda_backend
from test_cuda_backend import CALLS, Call, inputs, results, serving

import normkit as nk
from normkit import dispatch

missing = cuda_host.unavailable() or nvrtc.unavailable()
pytestmark = pytest.mark.skipif(missing is not None, reason=str(missing))
if missing is None:
    import cupy
    from cupy_on_host import Machine, cupy_on_host


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
        compiler.function("nk::fold<float, float>", 0, 3)
    for part in ("nk::fold<float, float>", "device 3", "sm_90", "line 3: such a log"):
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
