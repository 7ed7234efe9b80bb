"""What `explain` says of a call is what the call does."""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import array_api_strict as strict
import numpy as np
import pytest
from cases import SMALL, Case
from custom_backend import Standard
from layouts import layouts

import normkit as nk
from normkit import testing
from normkit.backends.base import Step
from normkit.backends.cuda import Cuda, planner
from normkit.backends.numba import Numba
from normkit.backends.reference import Reference

CHANNELS_LAST = np.zeros((2, 5, 7, 6), "float32").transpose(0, 3, 1, 2)


def drawn(explanation: Any) -> str:
    """The axes in memory order: k for kept, r for reduced, capital if they have parameters."""
    letters = (("r" if a.reduced else "k", a) for a in explanation.axes)
    return " ".join(f"{a.axis}:{k.upper() if a.affine else k}" for k, a in letters)


@pytest.mark.parametrize(
    ("norm", "options", "axes"),
    [
        (nk.batch_norm, {}, "0:r 2:r 3:r 1:K"),
        (nk.batch_norm, {"channel_axis": (1, 3)}, "0:r 2:r 3:K 1:K"),
        (nk.layer_norm, {"axis": (1, 3)}, "0:k 2:k 3:R 1:R"),
        (nk.layer_norm, {"axis": 1, "param_axis": 0}, "0:K 2:k 3:k 1:r"),
        (nk.instance_norm, {}, "0:k 2:r 3:r 1:K"),
        (nk.group_norm, {"num_groups": 2}, "0:k 2:r 3:r 1 (groups):K 1 (within):R"),
    ],
)
def test_axes_are_in_memory_order(norm: Any, options: Any, axes: str) -> None:
    assert drawn(nk.explain(norm, CHANNELS_LAST, **options)) == axes


def test_it_prints_a_table() -> None:
    with nk.use_backend("reference"):
        said = str(nk.explain(nk.group_norm, CHANNELS_LAST[:, ::2], num_groups=3))
    assert said.splitlines() == [
        "group_norm of numpy float32 (2, 3, 5, 7)",
        "axis         0     2     3     1 (groups)  1 (within)",
        "size         2     5     7     3           1",
        "statistics   keep  over  over  keep        over",
        "gamma, beta  -     -     -     yes         yes",
        "in memory as  k0=2, r0=35, k1=3, r1=1, params=3, span=1",
        "backend       reference",
        "kernel        forward",
        "copy          x, 840 B: its elements do not lie side by side "
        "(gaps, repeats or reversed axes)",
        "bytes         1.68 kB to move",
    ]


@pytest.mark.parametrize("case", SMALL[::2], ids=str)
def test_nothing_is_done(case: Case) -> None:
    given = case.inputs("float32")
    before = {name: a.copy() for name, a in given.items()}
    x, gamma, beta = (given.pop(name) for name in ("x", "gamma", "beta"))
    del given["dy"]
    explained = nk.explain(case.norm, x, gamma, beta, **given, **case.options)
    assert explained.norm == case.name
    assert explained.backend == "numba"
    assert explained.seconds is not None
    assert explained.seconds > 0
    moved = 2 * x.nbytes + gamma.nbytes + beta.nbytes
    moved += sum(a.nbytes for a in given.values()) * (2 if case.training else 1)
    assert explained.bytes == moved
    for name, a in {"x": x, "gamma": gamma, "beta": beta, **given}.items():
        assert a.tobytes() == before[name].tobytes(), name
    with pytest.raises(dataclasses.FrozenInstanceError):
        explained.bytes = 0


def test_arrays_larger_than_memory() -> None:
    x = np.broadcast_to(np.float32(1), (1 << 24, 3, 1 << 24))
    assert nk.explain(nk.layer_norm, x).bytes == 2 * x.nbytes


@pytest.mark.parametrize(
    ("norm", "options", "error", "said"),
    [
        (nk.group_norm, {"num_groups": 4}, ValueError, "^group_norm: num_groups=4 does not divide"),
        (nk.layer_norm, {"gamma": np.ones(2)}, ValueError, "^layer_norm: gamma has shape"),
        (np.sum, {}, TypeError, "^explain: norm=.* is no norm"),
    ],
)
def test_errors_are_the_call_s(norm: Any, options: Any, error: Any, said: str) -> None:
    with pytest.raises(error, match=said):
        nk.explain(norm, CHANNELS_LAST, **options)


class Recorder(Reference):
    """Remembers what it is given."""

    name = "recorder"

    def forward(self, x: Any, axes: Any, gamma: Any, beta: Any, y: Any, **options: Any) -> Any:
        self.given = {"x": x, "gamma": gamma, "beta": beta, "y": y}
        return super().forward(x, axes, gamma, beta, y, **options)


def copied(case: Case, layout: Any, out: Any) -> Iterator[str]:
    """Of a call's arrays those that its backend got copies of, and those that `explain` names."""
    inputs = case.inputs("float32")
    x, gamma, beta = (layout(inputs[name]) for name in ("x", "gamma", "beta"))
    options = case.options | ({} if out is None else {"out": out(np.zeros_like(inputs["x"]))})
    explained = nk.explain(case.norm, x, gamma, beta, **options)
    yield " ".join(sorted(copy.partition(",")[0] for copy in explained.copies))
    recorder = Recorder()
    with nk.use_backend(recorder):
        y = case.norm(x, gamma, beta, **options)
    arrays = {"x": x, "gamma": gamma, "beta": beta, "out" if out else "y": y}
    given = recorder.given | {"out": recorder.given["y"]}
    yield " ".join(sorted(k for k, a in arrays.items() if not np.shares_memory(a, given[k])))


FORWARD = [case for case in SMALL if not case.frozen and case.name != "batch_renorm"]


@pytest.mark.parametrize("case", FORWARD, ids=str)
def test_copies_are_those_that_are_made(case: Case) -> None:
    case = dataclasses.replace(case, running=False)
    known = layouts(np)
    wrong = []
    for i, (name, layout) in enumerate(known.items()):
        other = list(known)[(i + 3) % len(known)]
        outs = {None: None, other: known[other]}
        if other in ("read-only", "byte-swapped") or name == "byte-swapped":
            del outs[other]
        for out_name, out in outs.items():
            said, done = copied(case, layout, out)
            if said != done:
                wrong.append(f"{name}, out {out_name}: said {said!r}, done {done!r}")
    assert wrong == []


def runs(case: testing.Case, dtype: str) -> Any:
    given = case.inputs(dtype)
    given = {name: a.astype(dtype) for name, a in given.items() if "running" not in name} | {
        name: a for name, a in given.items() if "running" in name
    }
    x, gamma, beta, _ = (given.pop(name) for name in ("x", "gamma", "beta", "dy"))
    return (x, gamma, beta), case.options | given


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("case", testing.CASES, ids=str)
def test_the_steps_on_the_cpu(case: testing.Case, dtype: str, monkeypatch: Any) -> None:
    backend: Any = Numba()  # which knows no call
    done = []

    def run(kernel: Any, call: Any, tasks: int, elements: int) -> None:
        done.append((kernel._function.__name__, tasks))
        type(backend._pool).run(backend._pool, kernel, call, tasks, elements)

    args, options = runs(case, dtype)
    monkeypatch.setattr(backend._pool, "run", run)
    with nk.use_backend(backend):
        said = nk.explain(case.norm, *args, **options).steps
        case.norm(*args, **options)
    done = [step for step in done if step[0] != "widen"]
    tasks = [int(re.search(r": (\d+) ", step.launch)[1]) for step in said]  # type: ignore[index]
    assert list(zip((step.kernel for step in said), tasks, strict=True)) == done


class Host:
    """A device that notes launches, and has NumPy arrays."""

    limits = planner.Limits(sms=2)
    null = None

    def __init__(self) -> None:
        self.launches: list[planner.Launch] = []

    def bind(self, launch: planner.Launch) -> Any:
        return lambda arrays: self.launches.append(launch)

    def empty(self, shape: Any, dtype: Any) -> Any:
        return np.zeros(shape, dtype)

    def address(self, array: np.ndarray) -> int:
        return array.ctypes.data

    def current(self) -> int:
        return 0

    def elsewhere(self, array: Any) -> None:
        return None


class HostCuda(Cuda):
    arrays = ("numpy",)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # as nothing is computed
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("case", testing.CASES, ids=str)
def test_the_launches_on_a_gpu(case: testing.Case, dtype: str) -> None:
    args, options = runs(case, dtype)
    device = Host()
    with nk.use_backend(HostCuda(device)):
        said = nk.explain(case.norm, *args, **options).steps
        assert device.launches == []
        case.norm(*args, **options)
    assert said == tuple(
        Step(a.kernel, f"grid {a.grid[0]}, block {a.threads}, {a.shared} bytes shared")
        for a in device.launches
    )
    with nk.use_backend(HostCuda(device)):
        nk.vjp(case.norm, *args, **options)[1](args[0])
    assert {a.kernel for a in device.launches} <= set(planner.needed(dtype))


def test_arrays_of_third_parties() -> None:
    with nk.use_backend(Standard()):
        explained = nk.explain(nk.batch_norm, strict.ones((2, 3, 4)), strict.ones(3))
    assert explained.backend == "standard-array_api_strict"
    assert explained.steps == (Step("forward", ""),)
    assert explained.copies == ()
    assert explained.seconds is None
    assert explained.array == "array_api_strict float64 (2, 3, 4)"
