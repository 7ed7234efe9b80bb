"""normkit against the results of other libraries and of exact arithmetic (see oracles.py)."""

import fnmatch
import itertools
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable

import ml_dtypes
import numpy as np
import oracles
import pytest
from cases import numpy
from oracles import Arrays, Case

import normkit as nk

# Cases (a pattern of names) that no implementation of the documented formulas can pass, and why.
EXCEPTIONS: dict[str, str] = {}

# How many of all cases say nothing about normkit. golden.npz holds none of them.
SKIPPED = {
    "normkit has no such norm": 108,
    "the arguments of a module's constructor": 4,
    "normkit takes axes, not a shape to compare with": 1,
    "one value per channel gives beta, not an error": 3,
    "one value per channel updates no running_var, by ValueError": 1,
    "eps is negative": 43,
    "momentum is outside [0, 1]": 30,
    "batch norm of one axis is an error": 11,
    "gamma and beta are per group": 7,
    "a running std below sqrt(eps) is raised to it": 1,
    "r is clipped to other than [1/r_max, r_max]": 30,
}

ALL = oracles.load()


def applies(case: Case) -> bool:
    excepted = any(fnmatch.fnmatch(case.name, pattern) for pattern in EXCEPTIONS)
    return not (excepted or oracles.skip_reason(case))


ERRORS = [case for case in ALL if applies(case) and case.raises]
HUGE = [case for case in ALL if applies(case) and "huge_index" in case.tags]
VALUES = [case for case in ALL if applies(case) and case not in ERRORS + HUGE]


def family(case: Case) -> tuple[str, str, str]:
    return case.source, case.op, case.dtype


FAMILIES = [
    pytest.param(list(cases), id="-".join(key))
    for key, cases in itertools.groupby(sorted(VALUES, key=family), family)
]


def judge(case: Case, make: Callable[[Case], Arrays] = oracles.arrays) -> list[str]:
    """What is wrong with the values, the bits, the dtypes and the strides of the results."""
    try:
        got = oracles.run(case, nk, make)
    except Exception as error:
        return [f"{case.name}: {type(error).__name__}: {error}"]
    wrong = []
    inputs = make(case)
    for name in got.keys() & {"y", "vjp y", "dx"}:
        if got[name].dtype != oracles.dtype_of(case, "x"):
            wrong.append(f"{case.name}: {name} has dtype {got[name].dtype}")
        if got[name].strides != np.empty_like(inputs["x"]).strides:
            wrong.append(f"{case.name}: {name} has strides {got[name].strides}")
    for name in ("dweight", "dbias"):
        if got.get(name) is not None and got[name].dtype != oracles.dtype_of(case, name[1:]):
            wrong.append(f"{case.name}: {name} has dtype {got[name].dtype}")
    got = {name: numpy(a) for name, a in got.items()}
    wrong += oracles.failures(case, got)
    for name in got:
        again = got.get(f"vjp {name}")
        if again is not None and again.tobytes() != got[name].tobytes():
            wrong.append(f"{case.name}: vjp gives other bits of {name} than the plain call")
    return wrong


def report(wrong: Iterable[str]) -> None:
    if lines := list(wrong):
        pytest.fail("\n".join(lines), pytrace=False)


@pytest.mark.parametrize("backend", ["numba", "reference"])
@pytest.mark.parametrize("cases", FAMILIES)
def test_values(cases: list[Case], backend: str) -> None:
    with nk.use_backend(backend):
        report(line for case in cases for line in judge(case))


@pytest.mark.skipif(os.environ.get("NORMKIT_HUGE") != "1", reason="10 GB: set NORMKIT_HUGE=1")
@pytest.mark.parametrize("case", HUGE, ids=repr)
def test_more_than_two_to_the_31_elements(case: Case) -> None:
    report(judge(case))


@pytest.mark.parametrize("case", ERRORS, ids=repr)
def test_errors_leave_the_statistics_alone(case: Case) -> None:
    name, args, options = oracles.call(case, oracles.arrays(case))
    before = {k: v.copy() for k, v in options.items() if k.startswith("running")}
    with pytest.raises((TypeError, ValueError)):
        getattr(nk, name)(*args, **options)
    for statistic, values in before.items():
        np.testing.assert_array_equal(options[statistic], values)


def test_no_case_is_skipped_silently() -> None:
    skipped = Counter(filter(None, map(oracles.skip_reason, ALL)))
    assert skipped == (SKIPPED if oracles.FOLDER else {})
    assert all(fnmatch.filter([case.name for case in ALL], pattern) for pattern in EXCEPTIONS)


# Layouts


def in_memory(a: np.ndarray, source: int, destination: int) -> np.ndarray:
    """Equal to a, but with the axes moved so in memory."""
    source, destination = (min(axis, a.ndim - 1) for axis in (source, destination))
    return np.moveaxis(np.moveaxis(a, source, destination).copy(), destination, source)


def reverse(a: np.ndarray) -> np.ndarray:
    return a[(slice(None, None, -1),) * a.ndim]


def every_second(a: np.ndarray) -> np.ndarray:
    b = np.full((*a.shape[:-1], 2 * a.shape[-1] + 1), np.nan, a.dtype)
    b[..., 1::2] = a
    return b[..., 1::2]


def unaligned(a: np.ndarray) -> np.ndarray:
    b = np.empty(a.nbytes + 1, np.uint8)[1:].view(a.dtype).reshape(a.shape)
    b[...] = a
    return b


def byteswapped(a: np.ndarray) -> np.ndarray:
    return a if a.dtype == ml_dtypes.bfloat16 else a.astype(a.dtype.newbyteorder())


def read_only(a: np.ndarray) -> np.ndarray:
    b = a.copy()
    b.flags.writeable = False
    return b


LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "C": np.ascontiguousarray,
    "Fortran": np.asfortranarray,
    "channels last": lambda a: in_memory(a, 1, a.ndim - 1),
    "channels first": lambda a: in_memory(a, 1, 0),
    "batch last": lambda a: in_memory(a, 0, a.ndim - 1),
    "reversed": lambda a: reverse(reverse(a).copy()),
    "every second": every_second,
    "unaligned": unaligned,
    "byte-swapped": byteswapped,
    "read-only": read_only,
}
MODEST = [
    pytest.param(small, id=param.id)
    for param in FAMILIES
    if (
        small := [
            case
            for case in param.values[0]
            if not case.layout
            and "generate" not in case.params
            and 0 < math.prod(case.shape) < 5000
        ]
    )
]


@pytest.mark.parametrize("cases", MODEST)
def test_layouts(cases: list[Case]) -> None:
    wrong = []
    for shift, layout in enumerate(LAYOUTS):
        # dy, gamma and beta come in other layouts than x
        order = list(LAYOUTS.values())[shift:] + list(LAYOUTS.values())[:shift]

        def make(case: Case, order: list = order) -> Arrays:
            inputs = oracles.arrays(case)
            for lay_out, name in zip(order, ("x", "dy", "weight", "bias"), strict=False):
                if name in inputs:
                    inputs[name] = lay_out(inputs[name])
            return inputs

        wrong += [f"x {layout}: {line}" for case in cases for line in judge(case, make)]
    report(wrong)


# The judge


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_goal_refuses_three_units_in_the_last_place(dtype: str) -> None:
    want = np.array([1.5, -3.0, 1e-3, 5e3])
    eps = float(ml_dtypes.finfo(dtype).eps)
    tolerance = {"dtype": dtype, "rtol": 8 * eps, "atol": 0.0, "goal_rtol": eps, "goal_atol": 0.0}
    exact = off = want.astype(dtype)
    for _ in range(3):
        off = np.nextafter(off, np.array(np.inf, dtype))
    assert not oracles.mismatch(exact, want, tolerance, "goal")
    assert not oracles.mismatch(off, want, tolerance, "pass")
    assert oracles.mismatch(off, want, tolerance, "goal").startswith("4 of 4 differ")
    assert oracles.mismatch(want * np.nan, want, tolerance)
    assert oracles.mismatch(exact[1:], want, tolerance)
