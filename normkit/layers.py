"""Layers: a norm with its arguments remembered, parameters and running statistics among them.

>>> import numpy as np, normkit as nk
>>> layer = nk.layers.create("group", 64, num_groups=8)
>>> layer
GroupNorm(64, num_groups=8)
>>> x = np.random.default_rng(0).normal(size=(2, 64, 7, 7)).astype("float32")
>>> y, pullback = layer.vjp(x)
>>> dx, dgamma, dbeta = pullback(np.ones_like(y))
>>> layer.gamma -= 0.1 * dgamma
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, fields
from importlib import import_module
from operator import index
from typing import Any, ClassVar, Self, TypeVar

import numpy as np

from normkit.axes import Ints
from normkit.backends.base import Array
from normkit.call import ARITHMETIC, Call, Pullback
from normkit.norms import METHODS, OPTIONS, choose, read_per_channel

T = TypeVar("T")
_STATE = ("gamma", "beta", "running_mean", "running_var", "running_std", "step")


@dataclass(eq=False, repr=False, kw_only=True)
class Layer(ABC):
    """What all layers share: each keeps its norm's arguments as attributes of the same names.

    Parameters
    ----------
    channels : int or tuple of int
        Shape of the parameters: what x has at `channel_axis`. Layer and RMS norm call it `shape`.
    channel_axis : int or tuple of int
        -1 for channels-last.
    eps : float
        Added to the variance, inside the root.
    affine : bool
        Whether there are parameters: gamma, ones at first, and beta, zeros.
    bias : bool
        False leaves out beta.
    dtype : dtype
        Of the parameters. Running statistics are float32, or float64 if the parameters are.
    xp : module
        The library of the arrays, numpy or cupy; they are made on its current device.

    Attributes
    ----------
    gamma, beta : array or None
        For an optimiser to change in place.
    training : bool
        True at first; see `train` and `eval`.

    Raises
    ------
    TypeError, ValueError
        For any wrong option, mostly in the words of the norm itself.
    """

    method: ClassVar[str]  #: what `normalize` calls the norm
    _size: ClassVar[str] = "channels"  #: the field that says what shape gamma and beta have
    _axis: ClassVar[str] = "channel_axis"  #: the norm's argument that says which axes have them
    _spread: ClassVar[str] = ""  #: the running statistic beside the mean
    _counts: ClassVar[bool] = False  #: whether the number of the step matters

    eps: float = 1e-5
    affine: bool = True
    bias: bool = True
    dtype: Any = np.float32
    xp: Any = np

    def __post_init__(self) -> None:
        size = getattr(self, self._size)
        shape = size if isinstance(size, tuple) else (size,)
        if not shape or not all(hasattr(n, "__index__") and index(n) > 0 for n in shape):
            raise ValueError(f"{self._size}={size!r} must be a positive int or a tuple of them")
        self.dtype = np.dtype(self.dtype)
        if self.dtype.name not in ARITHMETIC:
            raise TypeError(f"dtype={self.dtype} must be one of {', '.join(ARITHMETIC)}")
        self._shape: Ints = tuple(index(n) for n in shape)
        self.training = True
        self.gamma = self.xp.ones(shape, self.dtype) if self.affine else None
        self.beta = self.xp.zeros(shape, self.dtype) if self.affine and self.bias else None
        self.running_mean, self.step = None, None
        if self._spread and getattr(self, "track_running_stats", True):
            wide = ARITHMETIC[self.dtype.name]
            self.running_mean = self.xp.zeros(shape, wide)
            setattr(self, self._spread, self.xp.ones(shape, wide))
            if self._counts or getattr(self, "momentum", 0.0) is None:
                self.step = 0
        axes = tuple(range(1, len(shape) + 1))
        trial = self.xp.empty((0, *shape), self.dtype)  # the norm checks the options
        self._call(trial, **{self._axis: axes if len(axes) > 1 else 1})

    def __call__(self, x: Array, *, out: Array | None = None) -> Array:
        """The norm of x, to the bit what its function gives.

        Training updates the running statistics. `x` and `out` are the function's.
        """
        return self._run(Call.forward, x, out)

    def vjp(self, x: Array, *, out: Array | None = None) -> tuple[Array, Pullback]:
        """The norm of x and its pullback: ``dx, dgamma, dbeta = pullback(dy)``.

        As `normkit.vjp`: the pullback keeps gamma by reference, so call it before you change gamma.
        """
        return self._run(Call.vjp, x, out)

    def train(self, mode: bool = True) -> Self:
        """Normalise with the statistics of x, and update the running ones."""
        self.training = mode
        return self

    def eval(self) -> Self:
        """Normalise with the running statistics, where there are any, and change nothing."""
        return self.train(False)

    def state_dict(self) -> dict[str, Array]:
        """Copies of all that training changes, as plain arrays: ready for ``numpy.savez``."""
        return {name: self.xp.array(value) for name, value in self._state().items()}

    def load_state_dict(self, state: Mapping[str, Array]) -> None:
        """Copy what `state_dict` gave into the layer's arrays, cast to their dtypes.

        Raises
        ------
        TypeError, ValueError
            For an unknown or missing key, a wrong shape or kind of dtype; then nothing changes.
        """
        own = self._state()
        if state.keys() != own.keys():
            raise ValueError(
                f"{self}: the state has the keys {sorted(state)}: expected {sorted(own)}"
            )
        new = {}
        for name, value in state.items():
            value = self.xp.asarray(value)
            shape, dtype = np.shape(own[name]), getattr(own[name], "dtype", np.dtype(int))
            if value.shape != shape:
                raise ValueError(f"{self}: {name} has shape {value.shape}: expected {shape}")
            if not np.can_cast(value.dtype, dtype, "same_kind"):
                raise TypeError(f"{self}: {name} has dtype {value.dtype}: expected {dtype}")
            new[name] = value.astype(dtype)
        for name, value in new.items():
            if name == "step":
                self.step = int(value)
            else:
                own[name][...] = value

    def _state(self) -> dict[str, Any]:
        state = {name: getattr(self, name, None) for name in _STATE}
        return {name: value for name, value in state.items() if value is not None}

    def _options(self) -> dict[str, Any]:
        """The arguments of the next call, but for the axes."""
        own = vars(self)
        options = {name: own[name] for name in OPTIONS[self.method] if name in own}
        if self.running_mean is None:  # then x's own statistics serve inference as well
            options.pop("training", None)
        if options.get("momentum", 0.0) is None:
            options["momentum"] = 1 / (1 + (self.step or 0))
        return options

    @abstractmethod
    def _axes(self, x: Array) -> dict[str, Any]:
        """The norm's arguments that say which axes it is about."""

    def _call(self, x: Array, out: Array | None = None, **axes: Any) -> Call:
        declare = METHODS[self.method].declare  # type: ignore[attr-defined]
        call: Call = declare(x, self.gamma, self.beta, out=out, **self._options(), **axes)
        if call.plan.layout.param_shape != self._shape:  # without parameters nobody looked
            raise ValueError(
                f"{self}: x has shape {x.shape}, and {call.plan.layout.param_shape} "
                f"where {self._shape} is expected"
            )
        return call

    def _run(self, do: Callable[[Call], T], x: Array, out: Array | None) -> T:
        call = self._call(x, out, **self._axes(x))
        result = do(call)
        if self.step is not None and not call.frozen and call.x.size:
            self.step += 1
        return result

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"xp": self.xp.__name__}  # modules do not pickle

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state | {"xp": import_module(state["xp"])})

    def __repr__(self) -> str:
        shown = [str(getattr(self, self._size))]
        for f in fields(self):
            value = getattr(self, f.name)
            if f.kw_only and value != f.default:
                shown.append(f"{f.name}={getattr(value, '__name__', value)}")
        return f"{type(self).__name__}({', '.join(shown)})"


@dataclass(eq=False, repr=False)
class _PerChannel(Layer):
    channels: int | Ints
    _: KW_ONLY
    channel_axis: int | Ints = 1

    def _axes(self, x: Array) -> dict[str, Any]:
        return {"channel_axis": self.channel_axis}


@dataclass(eq=False, repr=False)
class _Rows(Layer):
    _size = "shape"
    _axis = "axis"

    shape: int | Ints
    _: KW_ONLY
    channel_axis: int | None = None

    def _axes(self, x: Array) -> dict[str, Any]:
        if self.channel_axis is None:
            return {"axis": tuple(range(-len(self._shape), 0))}
        return read_per_channel(self.method, x, self.channel_axis)


@dataclass(eq=False, repr=False, kw_only=True)
class BatchNorm(_PerChannel):
    """`normkit.batch_norm` as a layer.

    Parameters
    ----------
    channels, channel_axis
        Tuples for statistics of their own at several axes.
    momentum : float or None
        Weight of the new value. None averages all batches since the start, as in PyTorch; their
        number `step` is then part of the state.
    track_running_stats : bool
        False keeps no running statistics, so that x's own serve inference too.
    **options
        Those of `Layer`.

    Attributes
    ----------
    running_mean, running_var : array or None
        0 and 1 at first.

    Examples
    --------
    >>> import numpy as np, normkit as nk
    >>> layer = nk.layers.BatchNorm(1, momentum=None)
    >>> y = layer(np.array([[1.0], [3.0]])), layer(np.array([[5.0], [7.0]]))
    >>> layer.running_mean, layer.step
    (array([4.], dtype=float32), 2)
    >>> layer.eval()(np.array([[4.0]]))
    array([[0.]])
    """

    method = "batch"
    _spread = "running_var"

    momentum: float | None = 0.1
    track_running_stats: bool = True


@dataclass(eq=False, repr=False, kw_only=True)
class BatchRenorm(_PerChannel):
    """`normkit.batch_renorm` as a layer.

    Parameters
    ----------
    channels, channel_axis, momentum
        As of `BatchNorm`.
    r_max, d_max : float
        Bounds of the correction.
    schedule : callable, optional
        Gives ``(r_max, d_max)`` by `step` instead: `normkit.RenormSchedule()`, for one.
    **options
        Those of `Layer`.

    Attributes
    ----------
    running_mean, running_std : array
        0 and 1 at first.
    step : int
        The number of batches trained on, part of the state.

    Examples
    --------
    >>> import normkit as nk
    >>> layer = nk.layers.BatchRenorm(64, schedule=nk.RenormSchedule())
    >>> list(layer.state_dict())
    ['gamma', 'beta', 'running_mean', 'running_std', 'step']
    """

    method = "batch_renorm"
    _spread = "running_std"
    _counts = True

    momentum: float | None = 0.01
    r_max: float = 3.0
    d_max: float = 5.0
    schedule: Callable[[int], tuple[float, float]] | None = None

    def _options(self) -> dict[str, Any]:
        options = super()._options()
        if self.schedule is not None:
            options["r_max"], options["d_max"] = self.schedule(self.step or 0)
        return options


@dataclass(eq=False, repr=False, kw_only=True)
class LayerNorm(_Rows):
    """`normkit.layer_norm` as a layer.

    Parameters
    ----------
    shape : int or tuple of int
        Of the trailing axes, which are reduced over and have the parameters.
    channel_axis : int, optional
        With it the norm is read per channel, as by `normkit.normalize`: the parameters have this
        axis, of size `shape`, and all axes but 0 are reduced over.
    **options
        Those of `Layer`.

    Examples
    --------
    >>> import numpy as np, normkit as nk
    >>> nk.layers.LayerNorm(2)(np.array([[1.0, 3.0]])).round(3)
    array([[-1.,  1.]])
    """

    method = "layer"


@dataclass(eq=False, repr=False, kw_only=True)
class InstanceNorm(_PerChannel):
    """`normkit.instance_norm` as a layer: options as of `BatchNorm`, axes of one int.

    As in PyTorch it keeps no running statistics unless ``track_running_stats=True``.
    """

    method = "instance"
    _spread = "running_var"

    momentum: float | None = 0.1
    track_running_stats: bool = False


@dataclass(eq=False, repr=False, kw_only=True)
class GroupNorm(_PerChannel):
    """`normkit.group_norm` as a layer: `num_groups` divides `channels`; the rest is `Layer`'s."""

    method = "group"

    num_groups: int


@dataclass(eq=False, repr=False, kw_only=True)
class RMSNorm(_Rows):
    """`normkit.rms_norm` as a layer: options as of `LayerNorm`; bias=False is the paper's."""

    method = "rms"


_LAYERS = {
    layer.method: layer
    for layer in (BatchNorm, BatchRenorm, LayerNorm, InstanceNorm, GroupNorm, RMSNorm)
}
_KNOWN = {method: {f.name for f in fields(layer) if f.kw_only} for method, layer in _LAYERS.items()}


def create(method: str, channels: int, *, channel_axis: int = 1, **options: Any) -> Layer:
    """A layer by its method's name, read per channel as by `normkit.normalize`.

    Parameters
    ----------
    method : {"batch", "batch_renorm", "layer", "instance", "group", "rms"}
        Which norm. "layer" and "rms" reduce over all axes but 0.
    channels : int
        Size of the channel axis, and of gamma and beta.
    channel_axis : int
        -1 for channels-last.
    **options
        Those of any layer; the ones that this layer does not have are ignored.

    Raises
    ------
    TypeError
        For an option that no layer has.
    ValueError
        For an unknown method, and as the layer itself.

    Examples
    --------
    >>> import normkit as nk
    >>> for method in ("batch", "group", "layer"):
    ...     print(nk.layers.create(method, 32, num_groups=8, momentum=0.2))
    BatchNorm(32, momentum=0.2)
    GroupNorm(32, num_groups=8)
    LayerNorm(32, channel_axis=1)
    """
    options = choose(method, options, _KNOWN)
    return _LAYERS[method](channels, channel_axis=channel_axis, **options)
