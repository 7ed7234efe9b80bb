"""Results larger than the caches must have the bits of small ones.

Whole cache lines of them are written past the caches, and memory is asked for in another way.
"""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from cases import same_bits

import normkit as nk
import normkit.axes
from normkit.backends import numba as numba_backend
from normkit.backends.numba import kernels

SAMPLES, FEW = 33, 3
#: norm, options, shape of a sample, axis that lies last in memory; large enough in any dtype
LARGE: dict[str, Any] = {
    "layer": (nk.layer_norm, {"axis": (1, 2)}, (193, 1361), None),
    "layer, gamma of a part": (nk.layer_norm, {"axis": (1, 2), "param_axis": 2}, (193, 1361), None),
    "rms": (nk.rms_norm, {"axis": (1, 2), "param_axis": 1}, (65, 4047), None),
    "group": (nk.group_norm, {"num_groups": 5}, (65, 64, 64), None),
    "group, channels last": (nk.group_norm, {"num_groups": 5}, (65, 64, 64), 1),
    "group, lines of channels": (nk.group_norm, {"num_groups": 6}, (96, 52, 53), 1),
    "group, lines of many channels": (nk.group_norm, {"num_groups": 2}, (128, 48, 48), 1),
    "group, runs of 12 lines": (nk.group_norm, {"num_groups": 6}, (1344, 14, 14), None),
    "instance": (nk.instance_norm, {}, (97, 52, 53), None),
    "instance, 12 lines": (nk.instance_norm, {}, (1344, 14, 14), None),
    "instance, channels last": (nk.instance_norm, {}, (97, 52, 53), 1),
    "instance, lines of channels": (nk.instance_norm, {}, (96, 52, 53), 1),
    "instance, a line": (nk.instance_norm, {}, (8192, 32), None),
    "group, runs of a line or two": (nk.group_norm, {"num_groups": 5}, (8325, 7, 7), None),
    "instance, a line or two": (nk.instance_norm, {}, (8325, 7, 7), None),
    "instance, a few lines": (nk.instance_norm, {}, (4096, 8, 8), None),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("call", LARGE)
def test_samples_have_the_same_bits_in_a_large_batch(call: str, dtype: str) -> None:
    norm, options, sample, last = LARGE[call]
    rng = np.random.default_rng(1)
    shape = (SAMPLES, *sample)
    if last is not None:
        shape = (SAMPLES, *sample[1:], sample[0])

    def normal() -> Any:
        array = rng.standard_normal(shape, "float32").astype(dtype)
        return array if last is None else np.moveaxis(array, -1, 1)

    x, dy = normal(), normal()
    assert 3 * x.nbytes // 64 >= kernels.STREAMED  # which y is written after two reads of x
    assert kernels.PASSES_BACKWARD * x[:FEW].nbytes // 64 < kernels.STREAMED
    axes = options.get("param_axis", options.get("axis", 1))
    params = [x.shape[a] for a in (axes if isinstance(axes, tuple) else (axes,))]
    gamma, beta = (rng.standard_normal(params, "float32") for _ in range(2))
    found = []
    for some in (slice(None), slice(FEW), slice(SAMPLES - FEW, None)):
        y, pullback = nk.vjp(norm, x[some], gamma, beta, **options)
        found.append((y, pullback(dy[some]).x, norm(x[some], gamma, beta, **options)))
    large, first, final = found
    for whole, begin, end in zip(large, first, final, strict=True):
        assert same_bits(whole[:FEW], begin)
        assert same_bits(whole[-FEW:], end)


@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
@pytest.mark.parametrize("channels", [64, 65])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_large_batches_are_normalised_in_place_as_elsewhere(
    dtype: str, channels: int, last: bool
) -> None:
    rng = np.random.default_rng(2)
    x = rng.standard_normal((60, channels, 44, 45), "float32").astype(dtype)
    x = np.moveaxis(np.moveaxis(x, 1, -1).copy(), -1, 1) if last else x
    gamma, beta, mean = (rng.standard_normal(channels, "float32") for _ in range(3))
    given = {"running_mean": mean, "running_var": mean**2, "training": False}
    with nk.use_backend("reference"):
        exact = nk.batch_norm(x[:2], gamma, beta, **given)
    np.testing.assert_allclose(nk.batch_norm(x, gamma, beta, **given)[:2], exact, 1e-5, 1e-5)
    for options in ({}, given):
        want = nk.batch_norm(x, gamma, beta, **options)
        memory = x.copy(order="K")
        assert nk.batch_norm(memory, gamma, beta, out=memory, **options) is memory
        assert same_bits(memory, want)


@pytest.mark.parametrize("offset", [1, 36, 62])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("norm", "shape", "passes"),
    [
        (nk.layer_norm, (6300, 1361), 3),
        (nk.instance_norm, (5, 3, 860_001), 2),  # of few groups, whose sums are made before
        (nk.instance_norm, (128, 161, 17, 25), 3),
        (nk.instance_norm, (500, 400, 7, 7), 3),
        (nk.batch_norm, (135_000, 97), 2),
        (nk.batch_norm, (135_000, 96), 2),
        (nk.batch_norm, (70_000, 289), 2),
        (nk.batch_norm, (49_000, 416), 2),
        (nk.layer_norm, (135_000, 64), 3),
    ],
)
def test_large_results_may_begin_anywhere(
    norm: Any, shape: tuple[int, ...], passes: int, dtype: str, offset: int
) -> None:
    rng = np.random.default_rng(3)
    x = rng.standard_normal(shape, "float32").astype(dtype)
    assert passes * x.nbytes // 64 >= kernels.STREAMED
    memory = np.full(x.nbytes + 128, 7, np.uint8)
    out = memory[offset : offset + x.nbytes].view(dtype).reshape(shape)
    assert norm(x, out=out) is out
    assert same_bits(out, norm(x))
    assert (memory[:offset] == 7).all()
    assert (memory[offset + x.nbytes :] == 7).all()


@pytest.mark.parametrize("dtype", kernels.DTYPES)
@pytest.mark.parametrize(
    ("shape", "last"),
    [
        ((31, 165, 5, 5), False),
        ((9, 401, 3, 3), False),
        ((2, 2060, 5, 4), True),
        ((40, 2060), True),
    ],
    ids=str,
)
def test_rows_of_columns_may_be_wider_than_a_window(
    shape: tuple[int, ...], last: bool, dtype: str
) -> None:
    rng = np.random.default_rng(4)
    x = rng.standard_normal(shape, "float32").astype(dtype)
    if last:
        x = np.moveaxis(np.moveaxis(x, 1, -1).copy(), -1, 1)
    channels, run = shape[1], 1 if last else x[0, 0].size
    assert channels * run > kernels.WINDOW
    gamma, beta, mean = (rng.standard_normal(channels, "float32") for _ in range(3))
    std = rng.uniform(0.5, 2, channels)
    # Around each 64th column, where a window may end: channels that take float64, or a factor.
    edge = np.arange(64, channels * run, 64) // run
    std[edge[::3]], beta[edge] = 2.0 ** (950 if dtype == "float64" else 50), 0
    given = {"running_mean": mean, "running_std": std, "training": False}
    with nk.use_backend("reference"):
        exact = nk.batch_renorm(x, gamma, beta, **given)
    got = nk.batch_renorm(x, gamma, beta, **given)
    close = 4 * float(ml_dtypes.finfo(dtype).eps)
    np.testing.assert_allclose(got.astype("float64"), exact.astype("float64"), close, close)
    tiny = got[:, edge[::3]].astype("float64"), exact[:, edge[::3]].astype("float64")
    np.testing.assert_allclose(*tiny, rtol=close)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("extreme", ["none", "some", "all"])
def test_gradients_of_many_rows_of_columns_at_once(extreme: str, dtype: str) -> None:
    """Rows of 97 channels, of which a window takes several, and those that need float64 alone."""
    rng = np.random.default_rng(6)
    x, dy = (rng.standard_normal((60_000, 97), "float32").astype(dtype) for _ in range(2))
    assert kernels.PASSES_BACKWARD * x.nbytes // 64 >= kernels.STREAMED
    chosen = {"none": slice(0), "some": slice(3, 90, 7), "all": slice(None)}[extreme]
    size = 2.0 ** (-45 if dtype == "float32" else -950)
    x[:, chosen] *= x.dtype.type(size)
    gamma = rng.standard_normal(97, "float32").astype(dtype)
    found = []
    for backend in ("numba", "reference"):
        with nk.use_backend(backend):
            y, pullback = nk.vjp(nk.batch_norm, x, gamma, eps=0.0)
            dx, dgamma, _ = pullback(dy)
            dx[:, chosen] *= dx.dtype.type(size)
            found.append((y, dx, dgamma))
    close = 1e-5 if dtype == "float32" else 1e-11
    for got, want in zip(*found, strict=True):
        np.testing.assert_allclose(got, want, close, close * np.abs(want).max())


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((2900, 1023), {}),
        ((23, 131_073), {}),
        ((9, 321, 1031), {"axis": (1, 2), "param_axis": 2}),
        ((370_000, 8), {}),
        ((440_001, 7), {}),
    ],
    ids=str,
)
def test_gradients_of_many_rows(shape: tuple[int, ...], options: Any, dtype: str) -> None:
    """dgamma and dbeta are summed while dx is written, past the caches but in rows of few; one row
    takes float64, and the next has the bits that it has alone.
    """
    rng = np.random.default_rng(8)
    x, dy = (rng.standard_normal(shape, "float32").astype(dtype) for _ in range(2))
    assert kernels.PASSES_BACKWARD * x.nbytes // 64 >= kernels.STREAMED
    row = len(x) // 3
    x[row] *= x.dtype.type(2.0 ** (-50 if dtype == "float32" else -950))
    gamma, beta = rng.standard_normal((2, shape[-1]), "float32").astype(dtype)
    found = []
    for backend in ("numba", "reference"):
        with nk.use_backend(backend):
            _, pullback = nk.vjp(nk.layer_norm, x, gamma, beta, eps=0.0, **options)
            dx, dgamma, dbeta = pullback(dy)
            found.append((dx[row], np.delete(dx, row, 0), dgamma, dbeta))
    close = 1e-5 if dtype == "float32" else 1e-11
    for got, want in zip(*found, strict=True):
        np.testing.assert_allclose(got, want, close, close * np.abs(want).max())
    next_row = slice(row + 1, row + 2)
    with nk.use_backend("numba"):
        _, pullback = nk.vjp(nk.layer_norm, x[next_row], gamma, beta, eps=0.0, **options)
        assert pullback(dy[next_row]).x[0].tobytes() == found[0][1][row].tobytes()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize("shape", [(180, 61, 14, 14), (16, 2200, 8, 8), (17, 130, 31, 31)], ids=str)
def test_batches_whose_channels_are_far_apart(
    shape: tuple[int, ...], extreme: bool, dtype: str
) -> None:
    """Their stretches are summed in the order of memory, if they have tables for all channels."""
    rng = np.random.default_rng(7)
    x, dy = (rng.normal(1, 2, shape).astype(dtype) for _ in range(2))
    k1, run = shape[1], shape[2] * shape[3]
    axes = nk.axes.Axes(1, shape[0], k1, run, k1, run)
    work = numba_backend._work(axes, x.dtype)
    assert work.family is (kernels.ACROSS if k1 <= kernels.KNOWN else kernels.ROWS)
    assert 16 * work.units * work.parts <= x.nbytes / 100
    gamma, beta = rng.uniform(0.5, 2, (2, k1)).astype("float32")
    if extreme:  # channels that take wider arithmetic
        x[:, 3], gamma[5] = 300, 1e-35
    found = []
    for backend in ("numba", "reference"):
        with nk.use_backend(backend):
            mean, var = np.zeros(k1), np.ones(k1)
            options = {"eps": 1.0, "running_mean": mean, "running_var": var, "momentum": 1.0}
            wide = "float64" if backend == "reference" else dtype
            y, pullback = nk.vjp(nk.batch_norm, x.astype(wide), gamma, beta, **options)
            found.append((y, *pullback(dy.astype(wide))[:3], mean, var))
    eps = float(ml_dtypes.finfo(dtype).eps)
    for i, (got, want) in enumerate(zip(*found, strict=True)):
        close = 4e-6 if i >= 2 else 8 * eps
        np.testing.assert_allclose(
            got.astype("float64"), want, close, close * np.abs(want).max(), err_msg=str(i)
        )
