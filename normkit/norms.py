"""The catalogue: a norm is a declaration of what is reduced and what becomes of the statistics."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from normkit.axes import over, per_channel, per_channel_of_samples, per_sample
from normkit.backends.base import Array
from normkit.call import Call, Running, norm, number

_norm = partial(norm, pure=True)


def _flag(argument: str, value: object) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{argument}={value!r} must be True or False")
    return bool(value)


def _running(
    mean: Array | None,
    spread: Array | None,
    spread_name: str,
    momentum: float,
    clip: tuple[float, float] | None = None,
) -> Running | None:
    """Running statistics with their momentum, None where none were given."""
    momentum = number("momentum", momentum, 0.0, 1.0)
    if mean is None and spread is None:
        return None
    if mean is None or spread is None:
        missing, given = ("running_mean", spread_name)[:: 1 if mean is None else -1]
        raise ValueError(f"{given} is given without {missing}: pass both, or neither")
    return Running(mean, spread, spread_name, momentum, clip)


@_norm
def batch_norm(
    x: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    channel_axis: int | tuple[int, ...] = 1,
    out: Array | None = None,
) -> Call:
    """Batch normalization: statistics per channel, over every other axis.

    ``y = gamma * (x - mean) / sqrt(var + eps) + beta`` with the biased variance of the batch, or,
    with ``training=False``, with the running statistics.

    Parameters
    ----------
    x : array
        Any shape of two axes or more; float16, bfloat16, float32 or float64; any strides.
    gamma, beta : array, optional
        Scale and shift, of ``x.shape`` at `channel_axis`; 1 and 0 by default.
    running_mean, running_var : array, optional
        float32 or float64, shaped like gamma; both or neither. In training they are updated in
        place, after use: ``running_mean += momentum * (mean - running_mean)``, and running_var
        likewise with the unbiased variance ``var * m / (m - 1)``, m being the number of elements
        per channel.
    training : bool
        False normalises with the running statistics and changes nothing.
    momentum : float
        Weight of the new value, in [0, 1]: PyTorch's meaning. Keras, Flax, Chainer (`decay`) and
        ONNX call ``1 - momentum`` momentum.
    eps : float
        Added to the variance, inside the root.
    channel_axis : int or tuple of int
        Axes that keep statistics of their own: -1 for channels-last, ``(1, 2, 3)`` for batch norm
        per activation. The parameters then have ascending axis order.
    out : array, optional
        Where to write y: of x's shape and dtype, any strides; x itself works in place.

    Returns
    -------
    array
        Of x's shape, dtype and memory layout (``empty_like(x)``).

    Raises
    ------
    TypeError, ValueError
        For any wrong argument, before anything is computed or updated: a one-dimensional x, groups
        of one element with running statistics in training, ``training=False`` without them …

    Notes
    -----
    PyTorch and Keras (TensorFlow) update the running variance with the unbiased variance as here;
    Flax, Keras 3 on other backends and ONNX with the biased one.

    References
    ----------
    S. Ioffe, C. Szegedy, Batch Normalization, 2015 (arXiv:1502.03167).

    Examples
    --------
    >>> import numpy as np, normkit as nk
    >>> x = np.array([[1.0], [3.0], [5.0], [7.0]])
    >>> nk.batch_norm(x, np.array([2.0]), np.array([1.0]), eps=0.001).round(2).ravel()
    array([-1.68,  0.11,  1.89,  3.68])
    """
    running = _running(running_mean, running_var, "running_var", momentum)
    frozen = not _flag("training", training)
    if frozen and running is None:
        raise ValueError(
            "training=False needs running_mean and running_var: pass both, or training=True "
            "to use the statistics of x"
        )
    return Call(
        x, gamma, beta, per_channel, channel_axis, eps=eps, running=running, frozen=frozen, out=out
    )


@_norm
def batch_renorm(
    x: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    running_mean: Array | None = None,
    running_std: Array | None = None,
    training: bool = True,
    r_max: float = 3.0,
    d_max: float = 5.0,
    momentum: float = 0.01,
    eps: float = 1e-5,
    channel_axis: int | tuple[int, ...] = 1,
    out: Array | None = None,
) -> Call:
    """Batch Renormalization: batch norm that trains on nearly what it infers with.

    With the batch's mean and ``sigma = sqrt(var + eps)``, and the running statistics from before
    this step's update::

        r = clip(sigma / running_std, 1/r_max, r_max)
        d = clip((mean - running_mean) / running_std, -d_max, d_max)
        y = gamma * ((x - mean) / sigma * r + d) + beta

    r and d are constants for the gradient. With ``training=False``
    ``y = gamma * (x - running_mean) / running_std + beta``: eps is in running_std already.

    Parameters
    ----------
    x : array
        Any shape of two axes or more; float16, bfloat16, float32 or float64; any strides.
    gamma, beta : array, optional
        Scale and shift, of ``x.shape`` at `channel_axis`; 1 and 0 by default.
    running_mean, running_std : array
        float32 or float64, shaped like gamma. In training they are updated in place, after use:
        ``running_mean += momentum * (mean - running_mean)`` and
        ``running_std += momentum * (sigma - running_std)``. Start them at 0 and 1.
    training : bool
        False normalises with the running statistics and changes nothing.
    r_max : float
        At least 1, inf allowed; 1 gives r = 1 whatever the running statistics hold.
    d_max : float
        At least 0, inf allowed; 0 gives d = 0. ``r_max=1, d_max=0`` is batch norm, bit for bit.
        `RenormSchedule` gives both by training step.
    momentum : float
        Weight of the new value, in [0, 1]: the paper's alpha.
    eps : float
        Added to the variance, inside the root.
    channel_axis : int or tuple of int
        Axes that keep statistics of their own, as for `batch_norm`.
    out : array, optional
        Where to write y: of x's shape and dtype, any strides; x itself works in place.

    Returns
    -------
    array
        Of x's shape, dtype and memory layout (``empty_like(x)``).

    Raises
    ------
    TypeError, ValueError
        For any wrong argument, before anything is computed or updated; running statistics are
        required.

    Notes
    -----
    Algorithm 1 of the paper: sigma itself is averaged, with no ``m / (m - 1)``. Keras averages the
    variance and takes the root, Chainer keeps a running variance; both differ from the paper.

    References
    ----------
    S. Ioffe, Batch Renormalization, 2017 (arXiv:1702.03275).

    Examples
    --------
    >>> import numpy as np, normkit as nk
    >>> mean, std = np.zeros(1), np.ones(1)
    >>> x = np.array([[1.0], [3.0]])
    >>> nk.batch_renorm(x, running_mean=mean, running_std=std, eps=0.0).ravel()
    array([1., 3.])
    >>> mean
    array([0.02])
    """
    clip = number("r_max", r_max, 1.0), number("d_max", d_max, 0.0)
    running = _running(running_mean, running_std, "running_std", momentum, clip)
    if running is None:
        raise ValueError(
            "running_mean and running_std are missing: Batch Renormalization needs both, "
            "zeros and ones of gamma's shape at first"
        )
    return Call(
        x,
        gamma,
        beta,
        per_channel,
        channel_axis,
        eps=eps,
        running=running,
        frozen=not _flag("training", training),
        out=out,
    )


@_norm
def layer_norm(
    x: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    axis: int | tuple[int, ...] = -1,
    param_axis: int | tuple[int, ...] | None = None,
    eps: float = 1e-5,
    out: Array | None = None,
) -> Call:
    """Layer normalization: statistics over `axis`, for each of the rest by itself.

    ``y = gamma * (x - mean) / sqrt(var + eps) + beta`` with the biased variance.

    Parameters
    ----------
    x : array
        float16, bfloat16, float32 or float64; any shape and strides.
    gamma, beta : array, optional
        Scale and shift, of ``x.shape`` at `param_axis`; 1 and 0 by default.
    axis : int or tuple of int
        Axes to reduce over, any of them, trailing or not.
    param_axis : int or tuple of int, optional
        Axes that gamma and beta have, in ascending order; `axis` by default.
    eps : float
        Added to the variance, inside the root.
    out : array, optional
        Where to write y: of x's shape and dtype, any strides; x itself works in place.

    Returns
    -------
    array
        Of x's shape, dtype and memory layout (``empty_like(x)``).

    Raises
    ------
    TypeError, ValueError
        For any wrong argument, before anything is computed.

    Notes
    -----
    PyTorch reduces over trailing axes only; Keras's `LayerNormalization` and Flax's take any, with
    eps = 1e-3 and 1e-6 by default. A row has the same bits whatever else is in the batch.

    References
    ----------
    J. L. Ba, J. R. Kiros, G. E. Hinton, Layer Normalization, 2016 (arXiv:1607.06450).

    Examples
    --------
    >>> import numpy as np, normkit as nk
    >>> nk.layer_norm(np.array([[1.0, 3.0], [5.0, 5.0]]), eps=0.0625).round(3)
    array([[-0.97,  0.97],
           [ 0.  ,  0.  ]])
    """
    return Call(x, gamma, beta, over, axis, param_axis, eps=eps, out=out)


@_norm
def instance_norm(
    x: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    channel_axis: int = 1,
    out: Array | None = None,
) -> Call:
    """Instance normalization: statistics per sample and channel, over the spatial axes.

    ``y = gamma * (x - mean) / sqrt(var + eps) + beta`` with the biased variance.

    Parameters
    ----------
    x : array
        Axis 0 is the batch; float16, bfloat16, float32 or float64; any strides.
    gamma, beta : array, optional
        Scale and shift, of shape ``(C,)``; 1 and 0 by default.
    running_mean, running_var : array, optional
        float32 or float64 of shape ``(C,)``; both or neither. In training they are updated in
        place as by `batch_norm`, from the statistics averaged over the samples.
    training : bool
        False normalises with the running statistics, where there are any, and changes nothing.
    momentum : float
        Weight of the new value, in [0, 1]: PyTorch's meaning.
    eps : float
        Added to the variance, inside the root.
    channel_axis : int
        Not 0; -1 for channels-last.
    out : array, optional
        Where to write y: of x's shape and dtype, any strides; x itself works in place.

    Returns
    -------
    array
        Of x's shape, dtype and memory layout (``empty_like(x)``).

    Raises
    ------
    TypeError, ValueError
        For any wrong argument, before anything is computed or updated.

    Notes
    -----
    PyTorch's `use_input_stats` is `training` here. PyTorch refuses spatial axes of one element;
    here such a group gives beta. A sample has the same bits whatever else is in the batch.

    References
    ----------
    D. Ulyanov, A. Vedaldi, V. Lempitsky, Instance Normalization, 2016 (arXiv:1607.08022).

    Examples
    --------
    >>> import numpy as np, normkit as nk
    >>> nk.instance_norm(np.array([[[1.0, 3.0], [10.0, 30.0]]]), eps=0.0)
    array([[[-1.,  1.],
            [-1.,  1.]]])
    """
    running = _running(running_mean, running_var, "running_var", momentum)
    frozen = not _flag("training", training) and running is not None
    rule = per_channel_of_samples if frozen else per_sample  # given statistics know no samples
    return Call(
        x, gamma, beta, rule, channel_axis, eps=eps, running=running, frozen=frozen, out=out
    )


@_norm
def group_norm(
    x: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    num_groups: int,
    channel_axis: int = 1,
    eps: float = 1e-5,
    out: Array | None = None,
) -> Call:
    """Group normalization: statistics per sample and group of consecutive channels.

    ``y = gamma * (x - mean) / sqrt(var + eps) + beta`` with the biased variance; gamma and beta are
    per channel.

    Parameters
    ----------
    x : array
        Axis 0 is the batch; float16, bfloat16, float32 or float64; any strides.
    gamma, beta : array, optional
        Scale and shift, of shape ``(C,)``; 1 and 0 by default.
    num_groups : int
        Divides the number of channels; 1 is layer norm over a sample, C is instance norm.
    channel_axis : int
        Not 0; -1 for channels-last.
    eps : float
        Added to the variance, inside the root.
    out : array, optional
        Where to write y: of x's shape and dtype, any strides; x itself works in place.

    Returns
    -------
    array
        Of x's shape, dtype and memory layout (``empty_like(x)``).

    Raises
    ------
    TypeError, ValueError
        For any wrong argument, before anything is computed.

    Notes
    -----
    As in PyTorch; Keras's default eps is 1e-3. ONNX's opset 18 has parameters per group, opset 21
    per channel as here. A sample has the same bits whatever else is in the batch.

    References
    ----------
    Y. Wu, K. He, Group Normalization, 2018 (arXiv:1803.08494).

    Examples
    --------
    >>> import numpy as np, normkit as nk
    >>> nk.group_norm(np.array([[1.0, 3.0, 10.0, 30.0]]), num_groups=2, eps=0.0)
    array([[-1.,  1., -1.,  1.]])
    """
    try:
        groups = None if isinstance(num_groups, bool) else operator.index(num_groups)
    except TypeError:
        groups = None
    if groups is None:
        kind = type(num_groups).__name__
        raise TypeError(f"num_groups={num_groups!r} must be a positive int, not {kind}")
    return Call(x, gamma, beta, per_sample, channel_axis, groups, eps=eps, out=out)


@_norm
def rms_norm(
    x: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    axis: int | tuple[int, ...] = -1,
    param_axis: int | tuple[int, ...] | None = None,
    eps: float = 1e-5,
    out: Array | None = None,
) -> Call:
    """Root mean square normalization: layer norm that does not subtract the mean.

    ``y = gamma * x / sqrt(mean(x**2) + eps) + beta``.

    Parameters
    ----------
    x : array
        float16, bfloat16, float32 or float64; any shape and strides.
    gamma, beta : array, optional
        Scale and shift, of ``x.shape`` at `param_axis`; 1 and 0 by default.
    axis : int or tuple of int
        Axes to reduce over, any of them, trailing or not.
    param_axis : int or tuple of int, optional
        Axes that gamma and beta have, in ascending order; `axis` by default.
    eps : float
        Added to the mean square, inside the root.
    out : array, optional
        Where to write y: of x's shape and dtype, any strides; x itself works in place.

    Returns
    -------
    array
        Of x's shape, dtype and memory layout (``empty_like(x)``).

    Raises
    ------
    TypeError, ValueError
        For any wrong argument, before anything is computed.

    Notes
    -----
    PyTorch has no beta, and its default eps is the machine epsilon of x's dtype; Flax's is 1e-6.
    A row has the same bits whatever else is in the batch.

    References
    ----------
    B. Zhang, R. Sennrich, Root Mean Square Layer Normalization, 2019 (arXiv:1910.07467).

    Examples
    --------
    >>> import numpy as np, normkit as nk
    >>> nk.rms_norm(np.array([[1.0, 7.0]]), eps=0.0)
    array([[0.2, 1.4]])
    """
    return Call(x, gamma, beta, over, axis, param_axis, eps=eps, center=False, out=out)


#: `normalize`'s names.
METHODS = {
    "batch": batch_norm,
    "batch_renorm": batch_renorm,
    "layer": layer_norm,
    "instance": instance_norm,
    "group": group_norm,
    "rms": rms_norm,
}
#: method -> its options, the axes apart
OPTIONS = {
    method: set(inspect.signature(function).parameters)
    - {"x", "gamma", "beta", "channel_axis", "axis", "param_axis"}
    for method, function in METHODS.items()
}


def choose(
    method: str, options: dict[str, Any], known: Mapping[str, set[str]] = OPTIONS
) -> dict[str, Any]:
    """Those of `options` that `method` knows; an error for one that no method knows."""
    if not isinstance(method, str):
        raise TypeError(f"method={method!r} must be a str: one of {', '.join(known)}")
    if method not in known:
        raise ValueError(f"method={method!r} is unknown: expected one of {', '.join(known)}")
    kept = {name: value for name, value in options.items() if name in known[method]}
    if len(kept) < len(options):
        union = set().union(*known.values())
        if unknown := set(options) - union:
            raise TypeError(
                f"unknown option {', '.join(sorted(unknown))}: the methods' options are "
                f"{', '.join(sorted(union))}"
            )
    return kept


def read_per_channel(method: str, x: Array, channel_axis: int) -> dict[str, Any]:
    """The arguments for `method`'s axes with parameters per channel."""
    if method not in ("layer", "rms"):
        return {"channel_axis": channel_axis}
    if getattr(x, "shape", ()):
        per_sample(x.shape, channel_axis)  # which refuses what is no channel axis
    return {"axis": tuple(range(1, getattr(x, "ndim", 2))), "param_axis": channel_axis}


@_norm
def normalize(
    x: Array,
    method: str,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    channel_axis: int = 1,
    **options: Any,
) -> Call:
    """Any of the norms by name, read per channel, so that one word swaps them.

    Parameters
    ----------
    x : array
        Axis 0 is the batch.
    method : {"batch", "batch_renorm", "layer", "instance", "group", "rms"}
        Which norm. "layer" and "rms" reduce over all axes but 0.
    gamma, beta : array, optional
        Scale and shift, of shape ``(C,)`` for every method.
    channel_axis : int
        -1 for channels-last.
    **options
        Those of any method; the ones that the chosen method does not have are ignored
        (`num_groups` for "batch", running statistics for "layer").

    Returns
    -------
    array
        Of x's shape, dtype and memory layout.

    Raises
    ------
    TypeError
        For an option that no method has.
    ValueError
        For an unknown method, and as the method itself.

    Examples
    --------
    >>> import numpy as np, normkit as nk
    >>> x = np.array([[1.0, 3.0, 10.0, 30.0]])
    >>> for method in ("layer", "group"):
    ...     print(nk.normalize(x, method, num_groups=2, eps=0.0).round(2))
    [[-0.87 -0.7  -0.09  1.66]]
    [[-1.  1. -1.  1.]]
    """
    options = choose(method, options)
    options |= read_per_channel(method, x, channel_axis)
    call: Call = METHODS[method].declare(x, gamma, beta, **options)  # type: ignore[attr-defined]
    return call
