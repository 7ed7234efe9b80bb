"""What a backend is: three operations on contiguous arrays and six integers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, ClassVar, NamedTuple

import numpy as np

from normkit.axes import Axes

Array = Any  # NumPy, CuPy or a third party's: typed by what it can do, not by what it is


#: clip of Batch Renormalization that corrects nothing: r = 1 and d = 0, which is batch norm
BATCH_NORM = 1.0, 0.0


class Stats(NamedTuple):
    """Statistics of the groups, each a (groups,) array of float32 or wider."""

    mean: Array
    rstd: Array  #: 1 / sqrt(var + eps)
    var: Array = None  #: biased variance, of `moments` and `forward`
    residual: Array | None = None  #: what rounding `mean` left out, where the backend keeps it
    r: Array | None = None  #: of Batch Renormalization, where `forward` computed it, with d
    d: Array | None = None


class Update(NamedTuple):
    """Running statistics, arrays of float32 or float64, and how a step enters them.

    For `Backend.forward` they are contiguous, one value a group; for `Backend.average` as the user
    gave them, and the new statistics are shaped alike.

    ``mean += momentum * (new mean - mean)``, and likewise ``spread`` with ``factor * new spread``,
    or, with `factor` None, ``1 / new spread``.
    """

    mean: Array
    spread: Array
    factor: float | None
    momentum: float
    clip: tuple[float, float] | None = None  #: (r_max, d_max) of Batch Renormalization


#: ``launch(x, y, gamma, beta, running_mean, running_spread, keep)``: statistics, with `keep`; their
#: variance may be absent
Launch = Callable[..., Stats | None]


class Step(NamedTuple):
    """One launch of a kernel, in words."""

    kernel: str
    launch: str  #: how it is split or launched


class Backend(ABC):
    """Where the arithmetic happens.

    Arrays come checked, C-contiguous in memory order and in native byte order; their shapes say
    nothing that `axes` does not. `x`, `y` and `dx` have one dtype, `dy` has that or its arithmetic
    type (float32 for the half types); `gamma` and `beta` are (params,) arrays of any supported
    dtype, or None. `y` may be `x` itself.

    Infs and NaNs among the data are no news: what NumPy would warn of is silenced by the backend.

    Third parties subclass this as well; `examples/custom_backend.py` is one in full, and
    `normkit.testing.check_backend` tests it. A library without strides has its arrays taken in
    logical order, its y and dx are written to by item assignment whatever their shape, and its
    running statistics are kept without it (`update` is None).
    """

    name: ClassVar[str]  #: what `use_backend` takes
    arrays: ClassVar[tuple[str, ...]]  #: top-level modules of the array types it serves
    #: whether `forward` heeds the clip of an update: said anew by whoever overrides `forward`
    renormalizes: ClassVar[bool] = False

    @abstractmethod
    def moments(self, x: Array, axes: Axes, *, eps: float, center: bool) -> Stats:
        """Mean and rstd of every group; about 0 instead of the mean if not `center` (RMS)."""

    @abstractmethod
    def normalize(
        self, x: Array, axes: Axes, stats: Stats, gamma: Array | None, beta: Array | None, y: Array
    ) -> None:
        """Write ``y = gamma * (x - mean) * rstd + beta``."""

    @abstractmethod
    def gradients(
        self,
        dy: Array,
        x: Array,
        axes: Axes,
        stats: Stats,
        gamma: Array | None,
        dx: Array,
        *,
        center: bool,
        frozen: bool,
        affine: tuple[Any, Any] | None,
    ) -> tuple[Array, Array] | None:
        """Write dx, return (dgamma, dbeta) as (params,) arrays in float32 or wider.

        `affine` is the dtypes that they get in the end, which they may have at once.

        With ``g = gamma*dy`` and ``xhat = (x - mean)*rstd``::

            dx = rstd * (g - mean(g) - xhat*mean(g*xhat))       # no mean(g) if not `center`
            dx = rstd * g                                       # if `frozen`: statistics were given
            dgamma = sum(dy*xhat), dbeta = sum(dy)              # None if not `affine`
        """

    def forward(
        self,
        x: Array,
        axes: Axes,
        gamma: Array | None,
        beta: Array | None,
        y: Array,
        *,
        eps: float,
        center: bool,
        keep: bool,
        update: Update | None = None,
    ) -> Stats | None:
        """`moments`, `normalize` and, with variances, `average`: a backend may fuse them.

        Without `keep` nobody needs the statistics, and None may be returned. With a clip, which
        only a backend that `renormalizes` is given, `renorm` and `affine` come before `normalize`.
        """
        stats = self.moments(x, axes, eps=eps, center=center)
        self.normalize(x, axes, stats, gamma, beta, y)
        if update is not None:
            self.average(update, stats.mean, stats.var)
        return stats

    def infer(
        self,
        x: Array,
        axes: Axes,
        mean: Array,
        spread: Array,
        eps: float | None,
        gamma: Array | None,
        beta: Array | None,
        y: Array,
    ) -> None:
        """`given` and `normalize`: a backend may fuse them."""
        self.normalize(x, axes, self.given(mean, spread, eps), gamma, beta, y)

    def prepare(
        self,
        x: Array,
        axes: Axes,
        gamma: Array | None,
        beta: Array | None,
        update: Update | None,
        *,
        eps: float | None,
        center: bool,
        frozen: bool,
    ) -> Launch | None:
        """What does the same as `forward`, or as `infer` if `frozen`, to any arrays of the shapes,
        strides, dtypes and device of these, which are examples; None where little would be saved.

        Unlike elsewhere, x and y may be views whose memory, not they, is C-contiguous. Whoever
        overrides `forward`, `infer` or `given` of a backend that has this overrides it as well.
        """
        return None

    def elsewhere(self, x: Array) -> AbstractContextManager[Any] | None:
        """What makes the device of `x` the current one; None if it is, or there is but one."""
        return None

    def given(self, mean: Array, spread: Array, eps: float | None) -> Stats:
        """Statistics from a given mean and variance or, with `eps` None, standard deviation."""
        mean, spread = mean.astype(np.float64), spread.astype(np.float64)
        with np.errstate(all="ignore"):
            return Stats(mean, 1 / (spread if eps is None else (spread + eps) ** 0.5))

    def average(self, update: Update, mean: Array, spread: Array) -> None:
        """Let a new mean and spread enter running statistics; on an error neither has changed."""
        momentum = update.momentum
        with np.errstate(all="ignore"):
            old = update.mean, update.spread
            mean, spread = mean.astype(np.float64), spread.astype(np.float64)
            spread = 1 / spread if update.factor is None else spread * update.factor
            new = mean, spread
            results = [a + momentum * (b - a) for a, b in zip(old, new, strict=True)]
            for a, result in zip(old, results, strict=True):
                a[...] = result

    def renorm(
        self, stats: Stats, mean: Array, std: Array, clip: tuple[float, float]
    ) -> tuple[Array, Array]:
        """r and d of Batch Renormalization, from the running mean and standard deviation."""
        r_max, d_max = clip
        running = self.given(mean, std, None)
        with np.errstate(all="ignore"):
            r = (running.rstd / stats.rstd).clip(1 / r_max, r_max)
            d = ((stats.mean - running.mean) * running.rstd).clip(-d_max, d_max)
        if r_max == 1:  # whatever the running statistics hold
            r[...] = 1.0
        if d_max == 0:
            d[...] = 0.0
        return r, d

    def affine(
        self, gamma: Array | None, beta: Array | None, r: Array, d: Array, dtype: Any
    ) -> tuple[Array, Array]:
        """Its parameters, ``r*gamma`` and ``d*gamma + beta``, in float64 or `dtype`."""
        scaled, shift = r, d
        if gamma is not None:
            gamma = gamma.astype(np.float64)
            scaled, shift = r * gamma, d * gamma
        return scaled, shift if beta is None else shift + beta.astype(np.float64)

    # What can be asked beside the arithmetic; all of it is optional.

    def about(self) -> dict[str, str]:
        """Facts to show, "version" among them; RuntimeError says why it cannot run here."""
        return {}

    def steps(
        self,
        operation: str,
        x: Array,
        axes: Axes,
        gamma: Array | None,
        beta: Array | None,
        running: Update | None,
        *,
        center: bool,
        keep: bool,
    ) -> list[Step]:
        """What an operation, named as its method is, would launch, in order.

        No data are read, and arrays may lie otherwise than the operation wants them.
        """
        return [Step(operation, "")]

    def copy_seconds(self, size: int) -> float | None:
        """How long the fastest copy takes here that reads and writes `size` bytes altogether."""
        return None

    def kernels(self, dtype: str) -> Iterator[tuple[str, Callable[[], object]]]:
        """Name, and what compiles it, of every kernel that calls with an x of `dtype` may need."""
        return iter(())
