"""On a real GPU: what neither the compiler nor the emulation can show. ``pytest -m gpu``.

test_norms.py, whose tests take every backend, runs on the GPU under the same mark.
"""

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import oracles
import pytest
import test_oracles
from cases import Case, numpy
from test_cuda_backend import excepted
from test_norms import same_bits, to_device

import normkit as nk

pytestmark = pytest.mark.gpu

EACH = [
    Case(nk.layer_norm, (64, 1000)),
    Case(nk.rms_norm, (3, 70001)),
    Case(nk.instance_norm, (4, 8, 33, 31)),
    Case(nk.group_norm, (4, 8, 32, 32), {"num_groups": 4}),
    Case(nk.batch_norm, (8, 16, 14, 14)),
    Case(nk.batch_norm, (2, 3, 300, 301)),
    Case(nk.batch_norm, (3001, 64), {"training": False}),
    Case(nk.batch_renorm, (64, 56, 64), {"channel_axis": -1}),
]
each = pytest.mark.parametrize("case", EACH, ids=str)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("norm", oracles.NORMS)
def test_oracles_hold(norm: str, dtype: str, cupy: Any) -> None:
    wrong = []
    for case in test_oracles.VALUES:
        if (case.op, case.dtype) == (norm, dtype) and not excepted(case):
            wrong += test_oracles.judge(case, lambda case: on_device(oracles.arrays(case), cupy))
        cupy.get_default_memory_pool().free_all_blocks()
    test_oracles.report(wrong)


def on_device(arrays: oracles.Arrays, cupy: Any) -> oracles.Arrays:
    """The same values and strides on the GPU."""
    moved = {}
    for name, a in arrays.items():
        base = a
        while isinstance(base.base, np.ndarray):
            base = base.base
        offset = a.__array_interface__["data"][0] - base.__array_interface__["data"][0]
        memory = cupy.asarray(base.reshape(-1).view(a.dtype)).data + offset
        moved[name] = cupy.ndarray(a.shape, a.dtype, memory, a.strides)
    return moved


@each
def test_streams(case: Case, cupy: Any) -> None:
    """Work goes to the current stream, in order with what is there already, and nowhere else."""
    inputs = case.inputs("float32")
    want = {k: v.copy() for k, v in case.run(to_device(inputs, cupy)).items()}
    cupy.cuda.Device().synchronize()
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        late = to_device(inputs, cupy)
        slow = cupy.zeros(1 << 26, "float32")
        for _ in range(50):
            slow *= 0.5
        late["x"] += slow[: case.size].reshape(case.shape)  # not before those
        got = case.run(late)
    stream.synchronize()
    assert all(same_bits(got[k], want[k]) for k in want)


@each
def test_graphs(case: Case, cupy: Any) -> None:
    """A warm call can be captured: it allocates from the pool and waits for nothing."""
    given = to_device(case.inputs("float32"), cupy)
    pool = cupy.cuda.MemoryPool()  # the graph's own: what it uses stays its own
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream, cupy.cuda.using_allocator(pool.malloc):
        case.run({k: v.copy() for k, v in given.items()})
        stream.begin_capture()
        got = case.run(given)
        graph = stream.end_capture()
        for scale in (1.0, 3.0):
            fresh = case.inputs("float32")
            fresh["x"] = fresh["x"] * np.float32(scale)
            for name, values in fresh.items():
                given[name].set(values, stream)
            graph.launch(stream)
            stream.synchronize()
            found = {k: numpy(v).copy() for k, v in got.items()}
            want = case.run(to_device(fresh, cupy))
            stream.synchronize()
            assert all(same_bits(found[k], want[k]) for k in want), scale


@each
def test_threads(case: Case, cupy: Any) -> None:
    """Each with a stream of its own; some compile at the same time."""
    inputs = case.inputs("bfloat16")
    want = {k: numpy(v) for k, v in case.run(to_device(inputs, cupy)).items()}
    wrong: list[str] = []

    def work() -> None:
        with cupy.cuda.Stream(non_blocking=True) as stream:
            for _ in range(5):
                got = case.run(to_device(inputs, cupy))
                stream.synchronize()
                wrong.extend(k for k in want if not same_bits(got[k], want[k]))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.fixture
def two(cupy: Any) -> Any:
    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("one GPU only: nothing was tested on a second")
    return cupy


@each
def test_the_second_device(case: Case, two: Any) -> None:
    inputs = case.inputs("float32")
    want = case.run(to_device(inputs, two))
    with two.cuda.Device(1):
        given = to_device(inputs, two)
    got = case.run(given)
    for name, values in got.items():
        assert values.device.id == 1
        assert same_bits(values, want[name]) or values.dtype == "float32", name  # another model
    assert two.cuda.Device().id == 0


def test_devices_do_not_mix(two: Any) -> None:
    x = two.ones((4, 6))
    with two.cuda.Device(1):
        gamma = two.ones(6)
    with pytest.raises(TypeError, match=r"^layer_norm: gamma is on .*1.* and x on .*0"):
        nk.layer_norm(x, gamma)


def test_libraries_do_not_mix(cupy: Any) -> None:
    for x, gamma in ((cupy.ones((4, 6)), np.ones(6)), (np.ones((4, 6)), cupy.ones(6))):
        with pytest.raises(TypeError, match=r"^layer_norm: gamma is a (numpy|cupy) array and x a"):
            nk.layer_norm(x, gamma)


class Huge(NamedTuple):
    """More than 2**31 elements."""

    norm: Callable[..., Any]
    shape: tuple[int, ...]
    options: dict[str, Any]


HUGE = [
    Huge(nk.layer_norm, ((1 << 21) + 1, 1024), {}),
    Huge(nk.rms_norm, (2, (1 << 30) + 7), {}),
    Huge(nk.group_norm, (2, 64, 4097, 4097), {"num_groups": 32}),
    Huge(nk.batch_norm, ((1 << 25) + 1, 64), {}),
    Huge(nk.batch_norm, (3, 7, 10240, 10007), {}),
]


@pytest.mark.parametrize("huge", HUGE, ids=lambda h: f"{h.norm.__name__}{h.shape}")
def test_more_than_two_to_the_31_elements(huge: Huge, cupy: Any) -> None:
    """Of values that repeat, whose mean and deviation are those of one period."""
    size = int(np.prod(huge.shape))
    free, _ = cupy.cuda.runtime.memGetInfo()
    if free < 12 * size:
        pytest.skip(f"{free >> 30} GiB of GPU memory are free, {12 * size >> 30} are needed")
    x = cupy.empty(huge.shape, "float16")
    step = 1 << 27
    for start in range(0, size, step):
        i = cupy.arange(start, min(size, start + step), dtype="int64")
        x.reshape(-1)[start : start + step] = (i % 257 - 128).astype("float16") / 64
    y, pullback = nk.vjp(huge.norm, x, **huge.options)
    dx = pullback(y).x
    std = float(np.std(np.arange(257) - 128.0)) / 64
    for at in (0, size // 2, size - 1000):
        part = slice(at, at + 1000)
        want = x.reshape(-1)[part].astype("float64") / std
        got = y.reshape(-1)[part].astype("float64")
        assert float(abs(got - want).max()) < 0.05
        # dy = y is what scales x: its gradient vanishes
        assert float(abs(dx.reshape(-1)[part].astype("float64")).max()) < 0.05
    del x, y, dx, pullback
    cupy.get_default_memory_pool().free_all_blocks()
