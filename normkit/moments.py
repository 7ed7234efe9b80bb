"""Mean and variance per channel of more data than fits in memory, in pieces and in any order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, Self

import numpy as np

from normkit.axes import Ints, per_channel
from normkit.backends.base import Array
from normkit.call import ARITHMETIC, _plain, number
from normkit.dispatch import namespace
from normkit.norms import batch_norm

_PIECE = 1 << 20  #: elements that are held as float64 at once
_quiet = np.errstate(all="ignore")  # an inf or NaN in x is no news

Pair = tuple[Array, Array]  #: an unevaluated sum: float64 values, and what rounding them left out


class Moments:
    """Count, mean and variance per channel: update with arrays, merge in any order.

    Parameters
    ----------
    channel_axis : int or tuple of int
        Axes that keep statistics of their own, as for `batch_norm`.

    Attributes
    ----------
    count : int
        Elements per channel so far. While it is 0, the others are a ValueError.
    mean, var, std, M2 : array
        float64, of ``x.shape`` at `channel_axis`: the mean; the biased variance ``M2 / count`` and
        its root; the sum of squared deviations from the mean. ``M2 / (count - 1)`` is the unbiased
        variance.

    Notes
    -----
    The rounding errors of mean and M2 are carried along, so that the order of updates and merges
    shows in the last place at most. Moments pickle: let each process update its own with a share
    of the data, and merge what comes back.

    References
    ----------
    T. F. Chan, G. H. Golub, R. J. LeVeque, Updating Formulae and a Pairwise Algorithm for Computing
    Sample Variances, 1979.

    Examples
    --------
    >>> import numpy as np, normkit as nk
    >>> moments = nk.Moments()
    >>> for pixels in [[0, 7], [2, 7], [4, 7], [6, 7]]:
    ...     _ = moments.update(np.array([pixels], dtype="uint8"))
    >>> moments
    Moments(channel_axis=1, count=4)
    >>> moments.mean, moments.var
    (array([3., 7.]), array([5., 0.]))
    >>> moments.normalize(np.array([[3.0, 7.0], [8.0, 9.0]])).round(3)
    array([[0.   , 0.   ],
           [2.236, 0.   ]])

    Statistics of the population for batch norm's inference, instead of running averages (Algorithm
    2 of Ioffe and Szegedy, 2015):

    >>> layer = nk.layers.BatchNorm(2)
    >>> layer.running_mean[...] = moments.mean
    >>> layer.running_var[...] = moments.M2 / (moments.count - 1)
    """

    def __init__(self, channel_axis: int | Ints = 1) -> None:
        self.channel_axis = channel_axis
        self.count = 0
        self._sums: tuple[Pair, Pair] | None = None  # mean, M2

    def update(self, x: Array) -> Self:
        """Take in the elements of `x`, and return self.

        Parameters
        ----------
        x : array
            Any shape of two axes or more, any strides; float16, bfloat16, float32, float64, bool
            or any integers (beyond 2**53 rounded to float64). It is read piece by piece, so that a
            memory map may be larger than memory.

        Raises
        ------
        TypeError, ValueError
            For another dtype, or other channels than before; then nothing changes.
        """
        x = _plain("x", x)
        found = Moments(self.channel_axis)
        for piece in _pieces(x, per_channel(x.shape, self.channel_axis).reduced):
            found.merge(self._of(piece))
        return self.merge(found)

    @_quiet
    def merge(self, other: Moments) -> Self:
        """Take in all that `other` has seen, and return self.

        Raises
        ------
        TypeError, ValueError
            For what is no Moments, other channels, or arrays of another library.
        """
        if not isinstance(other, Moments):
            raise TypeError(f"merge: other must be a Moments, not {type(other).__name__}")
        if self._sums is None or other._sums is None:
            self._sums = self._sums or other._sums
            self.count += other.count
            return self
        (mean, m2), (mean_, m2_) = self._sums, other._sums
        if namespace(mean[0]) is not namespace(mean_[0]):
            raise TypeError(
                f"Moments of {namespace(mean[0]).__name__} arrays are given "
                f"{namespace(mean_[0]).__name__} arrays: convert one"
            )
        if mean[0].shape != mean_[0].shape:
            raise ValueError(
                f"Moments of channels of shape {mean[0].shape} are given {mean_[0].shape}"
            )
        count = self.count + other.count
        delta = (mean_[0] - mean[0]) + (mean_[1] - mean[1])
        between = delta * delta * (self.count * other.count / count)
        mean = _plus(mean, delta * (other.count / count))
        m2 = _plus(_plus(m2, m2_[0]), m2_[1] + between)
        self.count, self._sums = count, (mean, m2)
        return self

    def normalize(self, x: Array, eps: float = 0.0) -> Array:
        """``(x - mean) / sqrt(var + eps)``, and 0 where ``var + eps`` is 0: a constant channel.

        Parameters
        ----------
        x : array
            With the channels of the updates, and any dtype that they take.
        eps : float
            Added to the variance, inside the root.

        Returns
        -------
        array
            Laid out like x. Of x's dtype; for integers and bool what NumPy combines x's dtype and
            float32 to: float32 up to 16 bits, float64 for more.
        """
        eps = number("eps", eps, 0.0)
        x = _plain("x", x)
        if x.dtype.kind in "biu":
            x = x.astype(np.result_type(x.dtype, np.float32))
        (mean, rest), _ = self._moments()
        var = self.var
        var[var + eps == 0] = np.inf
        return batch_norm(
            x,
            None,
            -rest / (var + eps) ** 0.5,
            running_mean=mean,
            running_var=var,
            training=False,
            eps=eps,
            channel_axis=self.channel_axis,
        )

    @property
    def mean(self) -> Array:
        return self._moments()[0][0].copy()

    @property
    def M2(self) -> Array:
        return self._moments()[1][0].copy()

    @property
    def var(self) -> Array:
        return self.M2 / self.count

    @property
    def std(self) -> Array:
        return self.var**0.5

    def __repr__(self) -> str:
        return f"Moments(channel_axis={self.channel_axis}, count={self.count})"

    def _moments(self) -> tuple[Pair, Pair]:
        if self._sums is None:
            raise ValueError("Moments of nothing: call update(x) with some data first")
        return self._sums

    @_quiet
    def _of(self, x: Array) -> Moments:
        """Of one piece, by the backend's kernels."""
        if x.dtype.kind in "biu" or x.dtype.name in ARITHMETIC:  # batch_norm refuses the rest
            x = x.astype(np.float64)
        call = batch_norm.declare(x, channel_axis=self.channel_axis)  # type: ignore[attr-defined]
        found = Moments(self.channel_axis)
        if x.size:
            layout = call.plan.layout
            with call.backend.elsewhere(call.x) or nullcontext():
                packed = call.pack(call.x, call.plan.native)
                stats = call.backend.moments(packed, layout.axes, eps=0.0, center=True)
            mean = stats.mean.astype(np.float64)  # the reference backend has more
            rest = stats.mean - mean + (0 if stats.residual is None else stats.residual)
            m2 = stats.var * layout.axes.group_size
            mean, rest, m2 = (layout.unpack_groups(a.astype(np.float64)) for a in (mean, rest, m2))
            found._sums = _plus((mean, rest), 0.0), (m2, np.zeros_like(m2))
            found.count = layout.axes.group_size
        return found


def _pieces(x: Array, reduced: Ints) -> Iterator[Array]:
    """`x` in halves of halves along what is reduced over, until they are small."""
    long = [a for a in reduced if x.shape[a] > 1]
    if x.size <= _PIECE or not long:
        yield x
        return
    axis = max(long, key=lambda a: abs(x.strides[a]))
    for half in namespace(x).array_split(x, 2, axis):
        yield from _pieces(half, reduced)


def _plus(a: Pair, b: Any) -> Pair:
    """a + b with what is rounded off, by Knuth's and Dekker's sums."""
    total = a[0] + b
    part = total - a[0]
    rest = (a[0] - (total - part)) + (b - part) + a[1]
    high = total + rest
    return high, rest - (high - total)
