"""The six integers against the plain meaning of each norm, element by element."""

import itertools
from typing import Any

import numpy as np
import pytest
from cases import SMALL, Case
from layouts import in_order

from normkit.axes import Axes, Layout, layout, over, per_channel, per_sample

N, C, H, W, G = 2, 6, 3, 5, 3
NCHW, NHWC = (0, 1, 2, 3), (0, 2, 3, 1)


def find(shape: tuple[int, ...], order: tuple[int, ...], rule: Any, *args: Any) -> Layout:
    """The layout of an array of that shape whose axes lie in memory in that order."""
    x = in_order(np.empty(shape), order)
    return layout(x.shape, x.strides, x.itemsize, rule, *args)


@pytest.mark.parametrize(
    ("order", "rule", "args", "expected"),
    [
        (NCHW, over, (-1,), (N * C * H, 1, 1, W, W, 1)),
        (NCHW, per_sample, (1,), (N * C, 1, 1, H * W, C, H * W)),
        (NCHW, per_sample, (1, G), (N * G, 1, 1, C // G * H * W, C, H * W)),
        (NCHW, per_channel, (1,), (1, N, C, H * W, C, H * W)),
        (NHWC, per_channel, (1,), (1, N * H * W, C, 1, C, 1)),
        (NHWC, per_sample, (1,), (N, H * W, C, 1, C, 1)),
        (NHWC, per_sample, (1, G), (N, H * W, G, C // G, C, 1)),
        (NCHW, over, (1,), (N, C, H * W, 1, C, H * W)),
        (NHWC, over, (1,), (N * H * W, 1, 1, C, C, 1)),
        (NCHW, per_channel, ((1, 2, 3),), (1, N, C * H * W, 1, C * H * W, 1)),
        (NCHW, over, ((1, 2, 3),), (N, 1, 1, C * H * W, C * H * W, 1)),
        (NCHW, over, ((1, 2, 3), 1), (N, 1, 1, C * H * W, C, H * W)),
    ],
)
def test_table(order: Any, rule: Any, args: Any, expected: tuple[int, ...]) -> None:
    found = find((N, C, H, W), order, rule, *args)
    assert found.axes == Axes(*expected)
    assert not found.copies


def test_group_and_count() -> None:
    axes = Axes(2, 3, 5, 7, params=5, span=7)
    assert axes.groups == 2 * 5
    assert axes.group_size == 3 * 7


RULES = {
    "batch_norm": (per_channel, "channel_axis", 1),
    "batch_renorm": (per_channel, "channel_axis", 1),
    "layer_norm": (over, "axis", -1),
    "rms_norm": (over, "axis", -1),
    "instance_norm": (per_sample, "channel_axis", 1),
    "group_norm": (per_sample, "channel_axis", 1),
}
EXTRA = {"layer_norm": "param_axis", "rms_norm": "param_axis", "group_norm": "num_groups"}


def of_case(case: Case, x: np.ndarray) -> Layout:
    rule, option, default = RULES[case.name]
    args = [case.options.get(option, default)]
    if case.name in EXTRA:
        args.append(case.options.get(EXTRA[case.name]))
    return layout(x.shape, x.strides, x.itemsize, rule, *args)


def fits(case: Case, order: tuple[int, ...]) -> bool:
    """Whether the roles of the axes in memory are at most keep, reduce, keep, reduce."""
    reduced = []
    for axis in order:
        size = case.shape[axis]
        together = case.kept.get(axis, size)  # group norm's channel axis is both
        reduced += [False] * (size > together) + [True] * (together > 1)
    runs = [role for role, _ in itertools.groupby(reduced)]
    return len(runs) <= (3 if runs[:1] == [True] else 4)


@pytest.mark.parametrize("case", [case for case in SMALL if not case.frozen], ids=str)
def test_every_element_has_its_group_and_parameter(case: Case) -> None:
    for order in itertools.permutations(range(len(case.shape))):
        flat = in_order(np.arange(case.size).reshape(case.shape), order)
        found = of_case(case, flat)
        k0, r0, k1, r1, params, span = found.axes
        assert k0 * r0 * k1 * r1 == case.size, order
        assert found.param_shape == case.param_shape, order

        view = found.view(flat)
        assert np.shares_memory(view, flat), order
        assert view.flags.c_contiguous == fits(case, order), order
        assert bool(found.copies) != fits(case, order), (order, found)

        # element number i of memory is element number elements[i] of x
        i, elements = np.arange(case.size), np.ascontiguousarray(view).ravel()
        group = i // (r0 * k1 * r1) * k1 + i // r1 % k1
        assert group.max() == found.axes.groups - 1, order
        brute = case.groups.ravel()[elements]
        pairs = set(zip(group.tolist(), brute.tolist(), strict=True))
        assert len(pairs) == found.axes.groups == case.groups.max() + 1, order

        kept = np.zeros(found.axes.groups, int)
        kept[group] = brute
        given = np.arange(found.axes.groups)
        np.testing.assert_array_equal(found.unpack_groups(kept).ravel(), given)
        shaped = given.reshape(found.unpack_groups(kept).shape)
        np.testing.assert_array_equal(found.pack_groups(shaped, np), kept)

        param = np.arange(np.prod(case.param_shape, dtype=int)).reshape(case.param_shape)
        packed = found.pack_param(param, np)
        assert packed.shape == (params,), order
        wanted = case.params.ravel()[elements]
        np.testing.assert_array_equal(packed[i // span % params], wanted)

        # the transpose of pack_param: sums what it has repeated
        sums = np.bincount(i // span % params, minlength=params)
        np.testing.assert_array_equal(
            found.unpack_param(sums).ravel(), np.bincount(wanted, minlength=param.size)
        )


@pytest.mark.parametrize(
    ("x", "reason"),
    [
        (np.empty((4, 6, 5)), ""),
        (np.empty((4, 6, 5, 7)), "alternate"),
        (np.empty((4, 6, 5)).transpose(2, 0, 1), ""),
        (np.empty((4, 6, 5))[:1], ""),
        (np.empty((4, 6, 5))[:, 2:3, 2:3], "side by side"),
        (np.empty((4, 6, 5))[::-4, :, None], ""),
        (np.empty((4, 6, 5))[..., ::2], "side by side"),
        (np.empty((4, 6, 5))[:, ::-1], "side by side"),
        (np.broadcast_to(np.empty(5), (4, 6, 5)), "side by side"),
        (np.empty((4, 6, 5, 7)).transpose(0, 1, 3, 2), ""),
    ],
)
def test_what_has_to_be_copied(x: np.ndarray, reason: str) -> None:
    found = layout(x.shape, x.strides, x.itemsize, per_channel, (1, -1))
    assert bool(found.copies) == bool(reason)
    assert reason in found.copies
    assert found.view(x).flags.c_contiguous != bool(reason)


def test_parameters_on_separated_axes_are_expanded_and_x_stays() -> None:
    found = find((3, 4, 5), (0, 1, 2), over, 1, (0, 2))
    assert not found.copies
    assert (found.axes.params, found.axes.span) == (3 * 4 * 5, 1)


def test_a_layout_is_worked_out_once() -> None:
    before = layout.cache_info()
    first = find((31, 7, 13), (0, 1, 2), over, (1, 2))
    assert find((31, 7, 13), (0, 1, 2), over, (1, 2)) is first
    after = layout.cache_info()
    assert (after.misses - before.misses, after.hits - before.hits) == (1, 1)


@pytest.mark.parametrize(
    ("rule", "args", "error", "message"),
    [
        (over, (3,), ValueError, "axis=3 is out of range for an array of 3 axes"),
        (over, (-4,), ValueError, "axis=-4 is out of range for an array of 3 axes"),
        (over, ((0, -3),), ValueError, r"axis=\(0, -3\) names an axis twice"),
        (over, ((),), ValueError, r"axis=\(\) is empty"),
        (over, ("1",), TypeError, "axis='1' must be an int, not str"),
        (over, (1, (1, 5)), ValueError, "param_axis=5 is out of range"),
        (per_channel, ((1, 1.5),), TypeError, "channel_axis=1.5 must be an int, not float"),
        (per_sample, ((1, 2),), TypeError, r"channel_axis=\(1, 2\) must be an int, not a tuple"),
        (per_sample, (0,), ValueError, "channel_axis=0 is the batch axis"),
        (per_sample, (-3,), ValueError, "channel_axis=-3 is the batch axis"),
        (per_sample, (1, 4), ValueError, "num_groups=4 does not divide the 6 channels of axis 1"),
        (per_sample, (1, 0), ValueError, "num_groups=0 must be a positive int"),
    ],
)
def test_messages(rule: Any, args: tuple[Any, ...], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        find((2, 6, 5), (0, 1, 2), rule, *args)
