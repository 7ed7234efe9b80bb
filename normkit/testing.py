"""One conformance table for any backend, judged by the reference backend.

>>> import numpy as np
>>> from normkit.testing import check_backend
>>> results = check_backend("reference", np, dtypes=["float32"])
>>> max(result.error for result in results) < 1e-6
True
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import product
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from normkit.backends.base import Array, Backend
from normkit.call import ARITHMETIC, vjp
from normkit.dispatch import use_backend
from normkit.norms import (
    batch_norm,
    batch_renorm,
    group_norm,
    instance_norm,
    layer_norm,
    rms_norm,
)

DTYPES = tuple(ARITHMETIC)
OFFSETS = 0.0, 1e2, 1e4, 1e6  #: means of data whose standard deviation is 1
SPREAD = {
    "batch_norm": "running_var",
    "batch_renorm": "running_std",
    "instance_norm": "running_var",
}
SHOWN = 10  #: failures in a message
MANY = 10_000  #: elements from which on a case is tried in one layout and with one mean

Arrays = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Case:
    """A norm, the shapes of x and of gamma, and options."""

    norm: Callable[..., Array]
    shape: tuple[int, ...]
    params: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.norm.__name__

    def __str__(self) -> str:
        return ", ".join(
            [f"{self.name} of {self.shape}", *(f"{k}={v}" for k, v in self.options.items())]
        )

    def inputs(self, dtype: str, offset: float = 0.0) -> Arrays:
        """What the call is given, in float64: values that `dtype` can hold."""
        rng = np.random.default_rng(len(self.shape))
        normal = rng.standard_normal
        values = {
            "x": offset + normal(self.shape),
            "dy": normal(self.shape),
            "gamma": 1 + normal(self.params) / 2,
            "beta": normal(self.params),
        }
        if self.name in SPREAD:
            values["running_mean"] = offset + normal(self.params)
            values[SPREAD[self.name]] = rng.uniform(0.5, 2.0, self.params)
        held = {name: statistics(dtype) if "running" in name else dtype for name in values}
        return {name: a.astype(held[name]).astype(np.float64) for name, a in values.items()}

    def run(self, given: Arrays, **options: Any) -> Arrays:
        """Everything that forward and backward give; running statistics are updated in place."""
        running = {name: a for name, a in given.items() if "running" in name}
        options = self.options | running | options
        y, pullback = vjp(self.norm, given["x"], given.get("gamma"), given.get("beta"), **options)
        dx, dgamma, dbeta = pullback(given["dy"])
        return {"y": y, "dx": dx, "dgamma": dgamma, "dbeta": dbeta} | running


FROZEN = {"training": False}
LAST = {"channel_axis": -1}
CASES = [
    Case(batch_norm, (16, 5, 7, 3), (5,)),
    Case(batch_norm, (300, 17), (17,)),
    Case(batch_norm, (6, 4, 5, 30), (4, 5), {"channel_axis": (1, 2)}),
    Case(batch_norm, (16, 5, 7, 3), (5,), FROZEN),
    Case(batch_norm, (17, 3, 66, 65), (3,)),
    Case(batch_norm, (70_001, 3), (3,)),
    Case(batch_renorm, (16, 5, 7, 3), (5,)),
    Case(batch_renorm, (300, 17), (17,)),
    Case(batch_renorm, (16, 5, 7, 3), (5,), FROZEN),
    Case(layer_norm, (40, 37), (37,)),
    Case(layer_norm, (3, 513), (513,)),
    Case(layer_norm, (4, 24, 9, 8), (24,), {"axis": 1}),
    Case(layer_norm, (4, 6, 5, 8), (6, 8), {"axis": (1, 3)}),
    Case(layer_norm, (4, 6, 70), (6,), {"axis": (1, 2), "param_axis": 1}),
    Case(layer_norm, (2, 70_001), (70_001,)),
    Case(rms_norm, (40, 37), (37,)),
    Case(rms_norm, (3, 513), (513,)),
    Case(rms_norm, (4, 24, 9, 8), (24,), {"axis": 1}),
    Case(instance_norm, (3, 5, 9, 8), (5,)),
    Case(instance_norm, (3, 9, 8, 5), (5,), LAST),
    Case(instance_norm, (3, 5, 9, 8), (5,), FROZEN),
    Case(group_norm, (3, 12, 9, 8), (12,), {"num_groups": 3}),
    Case(group_norm, (3, 9, 8, 12), (12,), {"num_groups": 3, **LAST}),
]


def statistics(dtype: str) -> str:
    """The dtype of the running statistics that go with x's."""
    return np.dtype(ARITHMETIC[dtype]).name


# Arrays of any library


def dtypes_of(xp: Any) -> list[str]:
    """The dtypes that a namespace has, of those that normkit knows."""
    ours = getattr(xp, "__name__", "") in ("numpy", "cupy")  # where ml_dtypes brings bfloat16
    return [name for name in DTYPES if hasattr(xp, name) or ours]


def make(xp: Any, values: np.ndarray[Any, Any], dtype: str) -> Array:
    """An array of the library."""
    if hasattr(xp, dtype):
        return xp.asarray(values, dtype=getattr(xp, dtype))
    return xp.asarray(values.astype(dtype))


def host(xp: Any, array: Array) -> np.ndarray[Any, Any]:
    """The values of an array, in float64."""
    if hasattr(array, "get"):
        array = array.get()
    elif not isinstance(array, np.ndarray):
        array = xp.asarray(array, dtype=xp.float64)
    return np.asarray(array).astype(np.float64)


def channels_last(xp: Any, values: np.ndarray[Any, Any], dtype: str) -> Array:
    return xp.moveaxis(make(xp, np.ascontiguousarray(np.moveaxis(values, 1, -1)), dtype), -1, 1)


def with_gaps(xp: Any, values: np.ndarray[Any, Any], dtype: str) -> Array:
    whole = np.full((*values.shape[:-1], 2 * values.shape[-1]), np.nan)
    whole[..., ::2] = values
    return make(xp, whole, dtype)[..., ::2]


LAYOUTS = {"C order": make, "channels last": channels_last, "with gaps": with_gaps}


def _finfo(dtype: str) -> Any:
    return ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]


# Checks


class Result(NamedTuple):
    """One check of the table, made."""

    case: str
    norm: str
    dtype: str
    offset: float
    error: float  #: largest over what forward and backward give, relative to the largest value
    problem: str  #: "" if it passed


@dataclass(frozen=True, eq=False)
class Check:
    """One line of the table: a case in a dtype, and what is asked of it."""

    case: Case
    dtype: str
    asked: Callable[..., float]
    offset: float = 0.0
    layout: str = "C order"

    def __str__(self) -> str:
        name = "" if self.asked is values else f": {self.asked.__name__.replace('_', ' ')}"
        return f"{self.case}, {self.dtype}, {self.layout}, mean {self.offset:g}{name}"

    def run(self, backend: str | Backend, xp: Any) -> Result:
        error, problem = 0.0, ""
        try:
            with use_backend(backend):
                error = self.asked(self, xp)
        except Exception as failure:  # whatever a backend under test may raise
            kind = "" if type(failure) is AssertionError else f"{type(failure).__name__}: "
            problem = f"{self}: {kind}{failure}"
        return Result(str(self), self.case.name, self.dtype, self.offset, error, problem)

    def given(self, xp: Any, **changes: Any) -> Arrays:
        """The inputs as arrays of the library, new at each call."""
        inputs = self.case.inputs(self.dtype, self.offset) | changes
        lay_out = {"x": LAYOUTS[self.layout], "dy": LAYOUTS[self.layout]}
        return {
            name: lay_out.get(name, make)(
                xp, a, statistics(self.dtype) if "running" in name else self.dtype
            )
            for name, a in inputs.items()
        }


@cache
def _exact(case: Case, dtype: str, offset: float) -> Arrays:
    given = case.inputs(dtype, offset)
    with use_backend("reference"):
        return case.run(given)


def _error(check: Check, name: str, found: np.ndarray[Any, Any], want: Any) -> float:
    """The largest error of a result, relative to the largest value; more than is due is refused."""
    assert found.shape == want.shape, f"{name} has shape {found.shape}, not {want.shape}"
    error, largest = np.abs(found - want), np.abs(want).max()
    dtype = statistics(check.dtype) if "running" in name else check.dtype
    # the mean of float64 data is itself known to so many digits only
    arithmetic = 1e-12 + 2e-15 * check.offset if check.dtype == "float64" else 4e-6
    allowed = _finfo(dtype).eps * np.abs(want) + arithmetic * (1 + largest)
    wrong = ~(error <= allowed)  # NaN too
    at = tuple(map(int, np.unravel_index(np.argmax(wrong), wrong.shape)))
    assert not wrong.any(), f"{name} is {found[at]:.9g} instead of {want[at]:.9g} at {at}"
    return float(error.max() / (largest or 1))


def values(check: Check, xp: Any) -> float:
    """Everything equals the reference, to the accuracy of its dtype."""
    given = check.given(xp)
    got = check.case.run(given)
    errors = []
    for name, want in _exact(check.case, check.dtype, check.offset).items():
        like = given[{"y": "x", "dx": "x", "dgamma": "gamma", "dbeta": "beta"}.get(name, name)]
        assert type(got[name]) is type(like), f"{name} is a {type(got[name]).__name__}"
        assert got[name].dtype == like.dtype, f"{name} has dtype {got[name].dtype}"
        errors.append(_error(check, name, host(xp, got[name]), want))
    return max(errors)


def _same(xp: Any, got: Arrays, want: Arrays, names: Sequence[str]) -> None:
    for name in names:
        a, b = host(xp, got[name]), host(xp, want[name])
        assert a.tobytes() == b.tobytes(), f"{name} has other bits"


def the_bits_of_the_plain_call(check: Check, xp: Any) -> float:
    case, given, plain = check.case, check.given(xp), check.given(xp)
    got = case.run(given)
    running = {name: a for name, a in plain.items() if "running" in name}
    y = case.norm(plain["x"], plain["gamma"], plain["beta"], **case.options, **running)
    _same(xp, got, {"y": y} | running, ["y", *running])
    _same(xp, given, check.given(xp), ["x", "dy", "gamma", "beta"])
    return 0.0


def in_place(check: Check, xp: Any) -> float:
    case, given, again = check.case, check.given(xp), check.given(xp)
    y = case.run(again)["y"]
    running = {name: a for name, a in given.items() if "running" in name}
    out = case.norm(
        given["x"], given["gamma"], given["beta"], out=given["x"], **case.options, **running
    )
    assert out is given["x"], "out is not what is returned"
    _same(xp, {"out": out}, {"out": y}, ["out"])
    return 0.0


def no_parameters(check: Check, xp: Any) -> float:
    inputs, given = check.case.inputs(check.dtype), check.given(xp)
    for name, neutral in ("gamma", 1.0), ("beta", 0.0):
        inputs[name] = np.full(check.case.params, neutral)
        del given[name]
    with use_backend("reference"):
        want = check.case.run(inputs)
    got = check.case.run(given)
    assert got["dgamma"] is got["dbeta"] is None, "there are gradients of no parameters"
    return max(_error(check, name, host(xp, got[name]), want[name]) for name in ("y", "dx"))


def a_nan_stays_in_its_group(check: Check, xp: Any) -> float:
    case, inputs = check.case, check.case.inputs(check.dtype)
    x = inputs["x"].copy()
    x.flat[0] = np.nan
    with use_backend("reference"):
        poisoned = case.run(inputs | {"x": x})
    clean, got = case.run(check.given(xp)), case.run(check.given(xp, x=x))
    group = np.isnan(poisoned["y"])
    assert np.isnan(host(xp, got["y"])[group]).all(), "y has lost it"
    for name in ("y", "dx"):
        same = host(xp, got[name]) == host(xp, clean[name])
        assert same[~group].all(), f"{name} changed in another group"
    return 0.0


def an_empty_batch(check: Check, xp: Any) -> float:
    case = replace(check.case, shape=(0, *check.case.shape[1:]))
    given = replace(check, case=case).given(xp)
    got = case.run(given)
    assert got["y"].shape == got["dx"].shape == case.shape, "the result is not empty"
    for name in ("dgamma", "dbeta"):
        assert not host(xp, got[name]).any(), f"{name} is not 0"
    _same(xp, got, replace(check, case=case).given(xp), [n for n in got if "running" in n])
    return 0.0


BEHAVIOUR = (
    the_bits_of_the_plain_call,
    in_place,
    no_parameters,
    a_nan_stays_in_its_group,
    an_empty_batch,
)


def conformance(xp: Any, dtypes: Sequence[str] | None = None) -> list[Check]:
    """The table for a namespace: every norm, dtype, layout, mean and direction."""
    table = []
    for dtype, case in product(dtypes or dtypes_of(xp), CASES):
        table.append(Check(case, dtype, values))
        if np.prod(case.shape) >= MANY:
            continue
        held = (o for o in OFFSETS[1:] if o < float(_finfo(dtype).max))
        table += [Check(case, dtype, values, offset=offset) for offset in held]
        table += [Check(case, dtype, values, layout=layout) for layout in list(LAYOUTS)[1:]]
        table += [Check(case, dtype, asked) for asked in BEHAVIOUR]
    return table


def check_backend(
    backend: str | Backend, xp: Any, dtypes: Sequence[str] | None = None
) -> list[Result]:
    """Test a backend: every norm, dtype and layout, forward and backward, against the reference.

    Parameters
    ----------
    backend : str or Backend
        A name that `normkit.use_backend` takes, or a backend itself.
    xp : module
        The array library that it serves: `numpy`, `cupy`, or one that follows the array API
        standard.
    dtypes : sequence of str, optional
        By default those of float16, bfloat16, float32 and float64 that `xp` has.

    Returns
    -------
    list of Result
        Of every check.

    Raises
    ------
    AssertionError
        If any fails; the message names the first cases that do.

    Examples
    --------
    In the tests of a package that brings a backend::

        def test_conformance():
            check_backend(MyBackend(), my_array_library)
    """
    results = [check.run(backend, xp) for check in conformance(xp, dtypes)]
    if failed := [result.problem for result in results if result.problem]:
        summary = f"{len(failed)} of {len(results)} checks failed, among them"
        raise AssertionError("\n".join([summary, *failed[:SHOWN]]))
    return results
