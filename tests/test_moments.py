"""Moments: exact to float64 however the data is cut, and in as little memory as is said."""

import multiprocessing
import pickle
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import ml_dtypes  # makes np.dtype("bfloat16") known
import numpy as np
import pytest
from cases import DTYPES, numpy, same_bits
from layouts import layouts

import normkit as nk
from normkit import moments as module

DTYPES_IN = [*DTYPES, "bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64"]


def data(shape: tuple[int, ...], dtype: str = "float64") -> np.ndarray:
    """Mean 1e6 and standard deviation 1, as far as the dtype can hold that."""
    x = np.random.default_rng(0).normal(size=shape)
    kind = np.dtype(dtype).kind
    if kind == "b":
        return x > 0
    if kind in "iu":
        return (20 * x + (100 if kind == "u" else 3)).astype(dtype)
    return (x + (1e6 if dtype in ("float32", "float64") else 9)).astype(dtype)


def exact(x: np.ndarray, channels: tuple[int, ...] = (1,)) -> tuple[np.ndarray, np.ndarray]:
    """Mean and biased variance per channel in exact arithmetic, rounded once."""
    columns = np.moveaxis(x, channels, range(len(channels)))
    shape = columns.shape[: len(channels)]
    results = []
    for column in columns.reshape(int(np.prod(shape)), -1).astype(np.float64):
        values = [Fraction(float(value)) for value in column]
        mean = sum(values) / len(values)
        var = sum((value - mean) ** 2 for value in values) / len(values)
        results.append((float(mean), float(var)))
    means, variances = np.transpose(results)
    return means.reshape(shape), variances.reshape(shape)


def check(got: nk.Moments, want: tuple[np.ndarray, np.ndarray], count: int) -> None:
    mean, var = want
    assert got.count == count
    np.testing.assert_allclose(numpy(got.mean), mean, rtol=1e-15, atol=1e-16 * var.max() ** 0.5)
    np.testing.assert_allclose(numpy(got.var), var, rtol=4e-15)
    np.testing.assert_allclose(numpy(got.std), var**0.5, rtol=2e-15)
    np.testing.assert_allclose(numpy(got.M2), var * count, rtol=4e-15)


@pytest.mark.parametrize("dtype", DTYPES_IN)
@pytest.mark.parametrize("piece", [1 << 20, 7])
def test_any_dtype_and_layout(
    dtype: str, piece: int, backend: str, xp: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PIECE", piece)
    x = data((5, 3, 4, 6), dtype)
    want = exact(x)
    for name, lay_out in layouts(xp).items():
        if x.dtype.kind in "biu" and name in ("every second", "cropped"):
            continue  # their margins are NaN
        check(nk.Moments().update(lay_out(xp.asarray(x))), want, 120)


@pytest.mark.parametrize("channels", [0, 1, -1, (1, 2, 3), (0, 2), (-1, 1)])
@pytest.mark.parametrize("piece", [1 << 20, 1])
def test_any_channel_axis(
    channels: int | tuple[int, ...],
    piece: int,
    backend: str,
    xp: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_PIECE", piece)
    x = data((5, 3, 4, 6))
    axes = channels if isinstance(channels, tuple) else (channels,)
    want = exact(x, tuple(sorted(a % 4 for a in axes)))
    check(nk.Moments(channels).update(xp.asarray(x)), want, x.size // want[0].size)


SPLITS = {
    "random": lambda rng, x: np.sort(rng.integers(0, len(x) + 1, 40)),  # empty ones among them
    "one by one": lambda rng, x: np.arange(len(x)),
    "two": lambda rng, x: [rng.integers(len(x))],
}


@pytest.mark.parametrize("order", ["as it comes", "sorted"])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("tree", ["random", "left", "updates"])
def test_random_trees_over_random_splits(
    tree: str, split: str, order: str, backend: str, xp: Any
) -> None:
    x = data((500, 2))
    x = x if order == "as it comes" else np.sort(x, axis=0)
    want = exact(x)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        parts = [xp.asarray(part) for part in np.split(x, SPLITS[split](rng, x))]
        if tree == "updates":
            total = nk.Moments()
            for part in parts:
                total.update(part)
        else:
            leaves = [nk.Moments().update(part) for part in parts]
            while len(leaves) > 1:
                i = rng.integers(len(leaves) - 1) if tree == "random" else 0
                leaves[i].merge(leaves.pop(i + 1))
            (total,) = leaves
        check(total, want, 500)


def test_pieces_of_different_levels() -> None:
    x = np.concatenate([data((50, 1)) + level for level in (0.0, -1e6, 1e3, 1e9, 1e-3)])
    total = nk.Moments()
    for part in np.split(x, 25):
        total.merge(nk.Moments().update(part))
    check(total, exact(x), 250)


def test_many_merges_do_not_drift() -> None:
    x = data((7, 2))
    total, part = nk.Moments(), nk.Moments().update(x)
    for _ in range(10_000):
        total.merge(part)
    check(total, exact(x), 70_000)
    for _ in range(20):
        total.merge(total)
    check(total, exact(x), 70_000 << 20)


def test_integers_beyond_float64_are_rounded_to_it(backend: str, xp: Any) -> None:
    big = np.array([[2**53 + 1], [-(2**63)], [2**63 - 1]])
    check(nk.Moments().update(xp.asarray(big)), exact(big), 3)
    check(nk.Moments().update(xp.asarray(big.view("uint64"))), exact(big.view("uint64")), 3)


def test_nan_and_inf_stay_in_their_channel(backend: str, xp: Any) -> None:
    x = data((6, 3))
    x[1, 0], x[4, 2] = np.nan, np.inf
    want = exact(x[:, 1:2])
    total = nk.Moments()
    for part in np.split(x, 3):
        total.update(xp.asarray(part))
    for name, values in zip(("mean", "var"), want, strict=True):
        got = numpy(getattr(total, name))
        assert np.isfinite(got).tolist() == [False, True, False]
        np.testing.assert_allclose(got[1], values[0], rtol=1e-15)


# Empty ones


def test_nothing() -> None:
    nothing = nk.Moments()
    for name in ("mean", "var", "std", "M2"):
        with pytest.raises(ValueError, match=r"call update\(x\)"):
            getattr(nothing, name)
    with pytest.raises(ValueError, match=r"call update\(x\)"):
        nothing.normalize(np.ones((2, 3)))
    nothing.update(np.ones((0, 3))).update(np.ones((4, 0))).merge(nk.Moments())
    assert nothing.count == 0
    x = data((5, 3))
    some = nk.Moments().update(x)
    mean = some.mean
    assert same_bits(some.merge(nothing).update(x[:0]).mean, mean)
    assert same_bits(nothing.merge(some).mean, mean)
    nothing.update(x + 1)
    assert same_bits(some.mean, mean)  # what was merged is not shared
    assert some.count == 5


def test_results_are_the_callers_own() -> None:
    total = nk.Moments().update(data((5, 3)))
    for name in ("mean", "var", "std", "M2"):
        before = getattr(total, name).copy()
        getattr(total, name)[...] = 0
        assert same_bits(getattr(total, name), before)


# Standardising


@pytest.mark.parametrize("dtype", DTYPES_IN)
def test_normalize(dtype: str, backend: str, xp: Any) -> None:
    x = data((40, 3, 5), dtype)
    mean, var = exact(x)
    out = {"bool": "float32", "int32": "float64", "uint32": "float64", "int64": "float64"}
    kind = np.dtype(out.get(dtype, dtype if dtype in DTYPES else "float32"))
    total = nk.Moments().update(xp.asarray(x))
    for eps in (0.0, 0.25):
        wide = x.astype(np.longdouble) - mean[:, None]
        want = (wide / np.sqrt(var[:, None] + eps)).astype(np.float64)
        got = total.normalize(xp.asarray(x), eps=eps)
        assert got.dtype == kind
        tolerance = 1e-9 if kind == "float64" else float(ml_dtypes.finfo(kind).eps)
        np.testing.assert_allclose(numpy(got).astype(float), want, rtol=tolerance, atol=tolerance)


def test_normalize_keeps_what_the_mean_left_out(backend: str, xp: Any) -> None:
    """A mean of 1e6 has an ulp of 1e-10: as much would show in values of size 1."""
    x = data((50, 1))
    values = [Fraction(float(value)) for value in x.ravel()]
    mean = sum(values) / len(values)
    std = float(sum((value - mean) ** 2 for value in values) / len(values)) ** 0.5
    want = [float(value - mean) / std for value in values]
    got = nk.Moments().update(xp.asarray(x)).normalize(xp.asarray(x))
    np.testing.assert_allclose(numpy(got).ravel(), want, rtol=0, atol=4e-15)


@pytest.mark.parametrize("dtype", DTYPES_IN)
def test_a_constant_channel_becomes_zero(dtype: str, backend: str, xp: Any) -> None:
    x = data((8, 3), dtype)
    x[:, 1] = 1.1
    total = nk.Moments()
    for part in np.split(x, 4):
        total.update(xp.asarray(part))
    y = numpy(total.normalize(xp.asarray(x)))
    assert not y[:, 1].any()
    assert y[:, 0].any()
    x[0, 1] = 0  # never seen: there is no scale for it
    assert not numpy(total.normalize(xp.asarray(x)))[:, 1].any()


def test_normalize_is_batch_norms_inference(backend: str, xp: Any) -> None:
    x = xp.asarray(data((6, 4, 5), "float32"))
    total = nk.Moments(-1).update(x)
    statistics = {"running_mean": total.mean, "running_var": total.var}
    want = nk.batch_norm(x, training=False, channel_axis=-1, eps=1e-3, **statistics)
    np.testing.assert_allclose(numpy(total.normalize(x, 1e-3)), numpy(want), rtol=1e-6, atol=1e-6)


# Errors


WRONG: dict[str, tuple[Callable[[nk.Moments], Any], type[Exception], str]] = {
    "list": (lambda m: m.update([[1.0]]), TypeError, "pass numpy.asarray"),
    "None": (lambda m: m.update(None), TypeError, "NumPy or CuPy"),
    "scalar": (lambda m: m.update(np.float64(1)), TypeError, "scalar"),
    "masked": (lambda m: m.update(np.ma.ones((2, 3))), TypeError, "mask"),
    "complex": (lambda m: m.update(np.ones((2, 3), complex)), TypeError, "astype"),
    "longdouble": (lambda m: m.update(np.ones((2, 3), np.longdouble)), TypeError, "astype"),
    "object": (lambda m: m.update(np.ones((2, 3), object)), TypeError, "astype"),
    "empty complex": (lambda m: m.update(np.ones((0, 3), complex)), TypeError, "astype"),
    "one axis": (lambda m: m.update(np.ones(3)), ValueError, r"x\[:, None\]"),
    "channels": (lambda m: m.update(np.ones((2, 4))), ValueError, r"\(3,\).*\(4,\)"),
    "merge channels": (
        lambda m: m.merge(nk.Moments().update(np.ones((2, 4)))), ValueError, r"\(3,\).*\(4,\)"
    ),
    "merge array": (lambda m: m.merge(np.ones(3)), TypeError, "a Moments, not ndarray"),
    "axis": (lambda m: nk.Moments(2).update(np.ones((2, 3))), ValueError, "channel_axis=2"),
    "float axis": (lambda m: nk.Moments(1.0).update(np.ones((2, 3))), TypeError, "channel_axis"),
    "eps": (lambda m: m.normalize(np.ones((2, 3)), eps=-1.0), ValueError, "eps=-1.0"),
    "normalize channels": (lambda m: m.normalize(np.ones((2, 4))), ValueError, r"\(3,\).*\(4,\)"),
    "normalize complex": (lambda m: m.normalize(np.ones((2, 3), complex)), TypeError, "astype"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_argument_changes_nothing(wrong: str) -> None:
    call, error, message = WRONG[wrong]
    total = nk.Moments().update(data((5, 3)))
    before = total.count, total.mean, total.M2
    with pytest.raises(error, match=message):
        call(total)
    after = total.count, total.mean, total.M2
    assert before[0] == after[0]
    assert all(map(same_bits, before[1:], after[1:]))


def test_libraries_do_not_mix(cupy: Any) -> None:
    total = nk.Moments().update(np.ones((2, 3)))
    with pytest.raises(TypeError, match="numpy arrays are given cupy arrays"):
        total.update(cupy.ones((2, 3)))


# Processes and memory


def test_pickles(backend: str, xp: Any) -> None:
    for total in (nk.Moments(-1), nk.Moments(-1).update(xp.asarray(data((5, 3))))):
        again = pickle.loads(pickle.dumps(total))
        assert repr(again) == repr(total)
        x = xp.asarray(data((9, 3)))
        assert same_bits(again.update(x).var, total.update(x).var)


FILE = (1 << 15, 2, 32, 32)  # 64 MiB of uint8
MEMORY = 16 << 20


def share(path: Path, start: int, stop: int) -> tuple[nk.Moments, int]:
    """One process's part: Moments of some of the file's rows, and the most memory that it took."""
    x = np.memmap(path, np.uint8, "r", shape=FILE)
    nk.Moments().update(x[:600])  # what is compiled or loaded once is not counted
    tracemalloc.start()
    total = nk.Moments().update(x[start:stop])
    return total, tracemalloc.get_traced_memory()[1]


def test_four_processes_share_a_file_that_is_larger_than_their_memory(tmp_path: Path) -> None:
    path = tmp_path / "images"
    x = np.memmap(path, np.uint8, "w+", shape=FILE)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (256, *FILE[1:]), dtype=np.uint8)
    images[:, 1] //= 2
    for rows in np.split(x, len(x) // len(images)):
        rows[...] = images
    x.flush()
    del rows, x
    bounds = [0, 10_000, 10_001, 20_000, FILE[0]]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(4, context) as pool:
        parts = list(pool.map(share, [path] * 4, bounds[:-1], bounds[1:]))
    total = nk.Moments()
    for part, memory in parts:
        total.merge(part)
        assert memory < MEMORY
    whole = images.swapaxes(0, 1).reshape(2, -1).astype(int)
    n, sums, squares = whole.shape[1], whole.sum(axis=1), (whole**2).sum(axis=1)
    var = [int(n * q - s * s) / n**2 for s, q in zip(sums, squares, strict=True)]
    check(total, (sums / n, np.array(var)), FILE[0] * 32 * 32)
