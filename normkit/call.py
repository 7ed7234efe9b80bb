"""One call of a norm: checked once, then run forward, or forward with its pullback.

A norm in the catalogue says what to reduce and what to do with the statistics; everything that all
of them share is here: validation, the dtype rule, memory order, running statistics, renorm's r, d.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import numpy as np

from normkit.axes import Ints, Layout, Rule, layout
from normkit.backends.base import BATCH_NORM, Array, Launch, Stats, Update
from normkit.dispatch import (
    adopt,
    backend_for,
    chosen_backend,
    fingerprint,
    is_array_library,
    library,
    namespace,
)
from normkit.portable import Portable, unwrap

#: dtype -> the type of its arithmetic. Adding a dtype is one row here and one in each backend.
ARITHMETIC = {
    "float16": np.float32,
    "bfloat16": np.float32,
    "float32": np.float32,
    "float64": np.float64,
}

#: an inf or NaN among the data is no news
_quiet = functools.partial(np.errstate, all="ignore")

Meta = tuple[Ints, Ints, Any]  #: all that validation looks at
_meta: Callable[[Array], Meta] = operator.attrgetter("shape", "strides", "dtype")


class Grads(NamedTuple):
    """Gradients of one call; None where no parameter was given."""

    x: Array
    gamma: Array | None
    beta: Array | None


class Running(NamedTuple):
    """Running statistics as a norm was given them, and how this step enters them."""

    mean: Array
    spread: Array  #: running_var, or running_std for renorm
    spread_name: str
    momentum: float
    clip: tuple[float, float] | None = None  #: (r_max, d_max) for renorm


def number(argument: str, value: object, low: float, high: float = float("inf")) -> float:
    """`value` as a float in [low, high], or an error that names the argument."""
    if type(value) is float and low <= value <= high:
        return value
    if not isinstance(value, (int, float, np.integer, np.floating)) or isinstance(value, bool):
        raise TypeError(f"{argument}={value!r} must be a real number, not {type(value).__name__}")
    if not low <= value <= high:  # NaN too
        span = f"at least {low:g}" if high == float("inf") else f"in [{low:g}, {high:g}]"
        raise ValueError(f"{argument}={value!r} must be {span}")
    return float(value)


@lru_cache(maxsize=64)
def _arithmetic(argument: str, dtype: Any) -> type:
    if dtype.name not in ARITHMETIC:
        raise TypeError(
            f"{argument} has dtype {dtype}: expected {', '.join(ARITHMETIC)}; "
            f'convert it first, for example {argument}.astype("float32")'
        )
    return ARITHMETIC[dtype.name]


@dataclass(frozen=True)
class Plan:
    """What the shapes, strides and dtypes of a call imply; cached, so checked once."""

    layout: Layout
    native: Any  #: x's dtype in native byte order
    arithmetic: Any  #: dtype of the arithmetic
    empty: bool  #: nothing to compute
    dense: bool  #: x's elements lie side by side, natively, and the norm can take them so
    direct: bool  #: and in C order: no view, no copy
    direct_params: bool  #: gamma and beta are as well
    direct_running: bool  #: running statistics are as well, one a group
    wanted: tuple[Any, Any] | None  #: dtypes of the gradients of parameters, if there are any


@lru_cache(maxsize=8192)
def _plan(
    x: Meta,
    gamma: Meta | None,
    beta: Meta | None,
    running: tuple[Meta, Meta, str] | None,
    updates_var: bool,
    rule: Rule,
    args: tuple[object, ...],
) -> Plan:
    shape, strides, dtype = x
    arithmetic = _arithmetic("x", dtype)
    found = layout(shape, strides, dtype.itemsize, rule, *args)
    direct_params, direct_running = True, False
    for argument, meta in (("gamma", gamma), ("beta", beta)):
        if meta is None:
            continue
        _arithmetic(argument, meta[2])
        if meta[0] != found.param_shape:
            raise ValueError(
                f"{argument} has shape {meta[0]}: expected {found.param_shape} "
                f"for x of shape {shape}"
            )
        direct_params &= _is_plain(meta, found.axes.params)
    if running is not None:
        _check_running(running, found, shape)
        direct_running = all(_is_plain(meta, found.axes.groups) for meta in running[:2])
        if updates_var and found.axes.group_size == 1 and 0 not in shape:
            raise ValueError(
                f"running_var cannot be updated from groups of one element (x has shape "
                f"{shape}): its unbiased variance divides by m - 1 = 0; give more elements, "
                "or pass training=False"
            )
    dtypes = [meta[2].newbyteorder("=") for meta in (gamma, beta) if meta]
    if found.axes.params > prod(found.param_shape):  # some are to be added up
        dtypes = [np.dtype(np.float64)] * len(dtypes)
    dense = not found.copies and bool(dtype.isnative)
    return Plan(
        found,
        dtype.newbyteorder("="),
        np.dtype(arithmetic),
        empty=0 in shape,
        dense=dense,
        direct=dense and found.order == tuple(range(len(found.order))),
        direct_params=direct_params,
        direct_running=direct_running,
        wanted=(dtypes[0], dtypes[-1]) if dtypes else None,
    )


def _is_plain(meta: Meta, size: int) -> bool:
    """Whether an array is one-dimensional, contiguous and native, of so many elements."""
    shape, strides, dtype = meta
    return shape == (size,) and strides == (dtype.itemsize,) and bool(dtype.isnative)


class Repeat(NamedTuple):
    """Does what calls like one before do; all take the arguments' values, then None."""

    forward: Callable[[tuple[Any, ...]], Array]
    vjp: Callable[[tuple[Any, ...]], tuple[Array, Pullback]]
    call: Callable[[tuple[Any, ...]], Call]


class Call:
    """A checked call of one norm: ``forward()`` gives y, ``vjp()`` y and its pullback.

    Parameters
    ----------
    x, gamma, beta : array
        As the user gave them.
    rule, *args
        The norm's axes: ``rule(x.shape, *args)`` gives `normkit.axes.Roles`.
    eps : float
        Added to the variance.
    center : bool
        Subtract the mean (False: RMS).
    running : Running, optional
        Running statistics.
    frozen : bool
        Normalise with the running statistics instead of x's own.
    out : array, optional
        Where to write y.

    Raises
    ------
    TypeError, ValueError
        For any wrong argument, before anything is computed.
    """

    __slots__ = (
        "backend", "beta", "center", "eps", "frozen", "gamma", "launch", "out", "plan", "running",
        "x",
    )  # fmt: skip

    def __init__(
        self,
        x: Array,
        gamma: Array | None,
        beta: Array | None,
        rule: Rule,
        *args: object,
        eps: float = 0.0,
        center: bool = True,
        running: Running | None = None,
        frozen: bool = False,
        out: Array | None = None,
    ) -> None:
        if not type(x) is type(gamma) is type(beta) is np.ndarray:
            x = _plain("x", x)
            gamma = None if gamma is None else _like("gamma", gamma, x)
            beta = None if beta is None else _like("beta", beta, x)
        self.backend = backend_for(type(x))
        metas = None
        if running is not None:
            if not type(x) is type(running.mean) is type(running.spread) is np.ndarray:
                running = _like_running(running, x)
            metas = _meta(running.mean), _meta(running.spread), running.spread_name
        self.x, self.gamma, self.beta, self.out, self.center = x, gamma, beta, out, center
        self.eps, self.running, self.frozen = number("eps", eps, 0.0), running, frozen
        self.launch: Launch | None = None  #: of a repeated call
        self.plan = _plan(
            _meta(x),
            None if gamma is None else _meta(gamma),
            None if beta is None else _meta(beta),
            metas,
            running is not None and running.clip is None and not frozen,
            rule,
            _checked(x, rule, args),
        )
        if not eps and center and running is None and self.plan.layout.axes.group_size == 1:
            self.eps = 1.0  # a group of one element gives beta, not 0/0
        if running is not None and not frozen:
            _check_updated(running.mean, running.spread, running.spread_name, x, gamma, beta)
        if out is not None:
            self.out = _check_out(out, x)
            mean, spread, spread_name = running[:3] if running else (None, None, "")
            _check_written(self.out, x, gamma, beta, mean, spread, spread_name)

    def forward(self) -> Array:
        """The normalised array; running statistics are updated once."""
        y = self._forward(keep=False)[0]
        return y if type(y) is np.ndarray else unwrap(y)

    def vjp(self) -> tuple[Array, Pullback]:
        """The normalised array, and the function from dy to the gradients."""
        if self.out is not None and _same_memory(self.out, self.x):
            raise ValueError("vjp: out is x, which the pullback still needs: give another array")
        y, stats, corrections = self._forward(keep=True)
        return unwrap(y), Pullback(lambda: self, stats, corrections)

    def _forward(self, keep: bool) -> tuple[Array, Stats | None, tuple[Array, Array] | None]:
        """y, the statistics and, if they do not hold them, r and d of Batch Renormalization."""
        x, plan, running = self.x, self.plan, self.running
        xp = np
        if type(x) is not np.ndarray:
            xp, elsewhere = namespace(x), self.backend.elsewhere(x)
            if elsewhere is not None:
                with elsewhere:
                    return self._forward(keep)
        y = self.like_x(xp) if self.out is None else self.out
        if plan.empty:
            return y, None, None
        if self.launch is not None:
            mean, spread = running[:2] if running else (None, None)
            return y, self.launch(x, y, self.gamma, self.beta, mean, spread, keep), None
        packed = x if plan.direct else self.pack(x, plan.native)
        view, target = self.target(y)
        gamma, beta = (self.gamma, self.beta) if plan.direct_params else self.params()
        stats, corrections = None, None
        axes, backend = plan.layout.axes, self.backend
        if running is None:
            stats = backend.forward(
                packed, axes, gamma, beta, target, eps=self.eps, center=self.center, keep=keep
            )
        elif self.frozen:
            given = self._given(running, xp)
            if keep:
                stats = backend.given(*given)
                backend.normalize(packed, axes, stats, gamma, beta, target)
            else:
                backend.infer(packed, axes, *given, gamma, beta, target)
        elif running.clip and not (backend.renormalizes and plan.direct_running):
            stats = backend.moments(packed, axes, eps=self.eps, center=True)
            if running.clip != BATCH_NORM:
                mean, std, _ = self._given(running, xp)
                corrections = backend.renorm(stats, mean, std, running.clip)
                r, d = self.per_param(*corrections, xp)
                gamma, beta = backend.affine(gamma, beta, r, d, plan.arithmetic)
            backend.normalize(packed, axes, stats, gamma, beta, target)
            self._update(running, stats.mean, stats.rstd, None)
        else:
            update, fused = self._entry(running), plan.direct_running
            stats = backend.forward(
                packed, axes, gamma, beta, target, eps=self.eps, center=True,
                keep=keep or not fused, update=update if fused else None,
            )  # fmt: skip
            if not fused:
                assert stats is not None
                self._update(running, stats.mean, stats.var, update.factor)
        if target is not view:
            view[...] = target
        return y, stats, corrections

    def repeat(self, arguments: dict[str, Any]) -> Repeat | None:
        """What runs calls that differ from this one, of these `arguments`, in their arrays' data.

        Only the plainest calls have it: theirs is the overhead that shows.
        """
        launch = self._prepare()
        if launch is None:
            return None
        old = self.running or Running(None, None, "", 0.0)
        name, momentum, clip = old[2:]
        arrays = {"x": self.x, "gamma": self.gamma, "beta": self.beta}
        arrays |= {"running_mean": old.mean, name: old.spread, "out": self.out}
        if any(a is not None and a is not arguments.get(key) for key, a in arrays.items()):
            return None  # made from the arguments, we know not how
        others = [id(a) for a in arguments.values() if type(a) is type(self.x) and a is not self.x]
        if len(set(others)) < len(others):
            return None  # which of them is which?
        keys = list(arguments)
        places = (-1 if a is None else keys.index(key) for key, a in arrays.items())
        pick = operator.itemgetter(*places)
        kept, updates = self.running is not None, self.running is not None and not self.frozen
        same = self.plan, self.backend, self.center, self.eps, self.frozen, launch
        xp, kind, shape = namespace(self.x), type(self.x), self.x.shape
        direct, native = self.plan.direct, self.plan.native
        elsewhere = None if xp is np else self.backend.elsewhere

        def check(
            x: Array, gamma: Array, beta: Array, mean: Array, spread: Array, out: Array
        ) -> None:
            """What shapes, strides and dtypes do not tell."""
            if updates:
                _check_updated(mean, spread, name, x, gamma, beta)
            if out is not None:
                _check_written(out, x, gamma, beta, mean, spread, name)

        def run(values: tuple[Any, ...], keep: bool) -> tuple[Array, Stats | None, tuple[Any, ...]]:
            x, gamma, beta, mean, spread, y = found = pick(values)
            if updates or y is not None:
                check(*found)
            if elsewhere is not None and (there := elsewhere(x)) is not None:
                with there:
                    return run(values, keep)
            if y is None:
                y = kind(shape, native) if direct else xp.empty_like(x)
            return y, launch(x, y, gamma, beta, mean, spread, keep), found

        def forward(values: tuple[Any, ...]) -> Array:
            return run(values, False)[0]

        def vjp(values: tuple[Any, ...]) -> tuple[Array, Pullback]:
            y, stats, found = run(values, True)
            return y, Pullback(functools.partial(made, found), stats)

        def made(found: tuple[Any, ...]) -> Call:
            call = Call.__new__(Call)
            call.x, call.gamma, call.beta, mean, spread, call.out = found
            call.plan, call.backend, call.center, call.eps, call.frozen, call.launch = same
            call.running = Running(mean, spread, name, momentum, clip) if kept else None
            return call

        def call(values: tuple[Any, ...]) -> Call:
            found = pick(values)
            check(*found)
            return made(found)

        return Repeat(forward, vjp, call)

    def _prepare(self) -> Launch | None:
        plan, running = self.plan, self.running
        if plan.empty or not (plan.dense and plan.direct_params):
            return None
        if self.out is not None and self.out.strides != self.x.strides:
            return None
        eps: float | None = self.eps
        update = None
        if running is not None:
            renorm = running.clip is not None and not self.frozen
            if not plan.direct_running or (renorm and not self.backend.renormalizes):
                return None
            update = self._entry(running)
            eps = None if running.clip and self.frozen else self.eps
        return self.backend.prepare(
            self.x, plan.layout.axes, self.gamma, self.beta, update,
            eps=eps, center=self.center, frozen=self.frozen,
        )  # fmt: skip

    def _entry(self, running: Running) -> Update:
        """How statistics of this call enter running ones."""
        size = self.plan.layout.axes.group_size
        factor = None if self.frozen or running.clip else size / (size - 1)
        return Update(running.mean, running.spread, factor, running.momentum, running.clip)

    def like_x(self, xp: Any) -> Array:
        """A new array of x's dtype, in native byte order, and layout."""
        x, native = self.x, self.plan.native
        if self.plan.direct and xp is not type(x):  # a `Portable`, whose layout the plan knows not
            return xp.empty(x.shape, native)
        return xp.empty_like(x, dtype=native)

    def pack(self, array: Array, dtype: Any) -> Array:
        """`array` (of x's shape) C-contiguous in x's memory order: a view where the layout fits."""
        x, plan = self.x, self.plan
        if plan.direct and array.dtype == dtype and (array is x or array.strides == x.strides):
            return array
        view = plan.layout.view(array)
        if view.dtype != dtype:
            with _quiet():
                return view.astype(dtype, order="C")
        return view if view.flags.c_contiguous else view.copy(order="C")

    def target(self, result: Array) -> tuple[Array, Array]:
        """`result` (of x's shape) in memory order, and where to write it: there, if contiguous."""
        new = self.out is None or result is not self.out
        if self.plan.direct and (new or result.strides == self.x.strides):
            return result, result
        view = self.plan.layout.view(result)
        if view.flags.c_contiguous and view.dtype == self.plan.native:
            return view, view
        return view, namespace(view).empty(view.shape, dtype=self.plan.native)

    def params(self) -> tuple[Array | None, Array | None]:
        """gamma and beta in memory order."""
        if self.plan.direct_params:
            return self.gamma, self.beta
        pack, xp = self.plan.layout.pack_param, namespace(self.x)
        gamma, beta = (
            None if p is None else pack(p.astype(p.dtype.newbyteorder("="), copy=False), xp)
            for p in (self.gamma, self.beta)
        )
        return gamma, beta

    def _given(self, running: Running, xp: Any) -> tuple[Array, Array, float | None]:
        """Running mean and spread as contiguous (groups,) arrays, and what to add to the spread."""
        mean, spread = running.mean, running.spread
        if not self.plan.direct_running:
            mean, spread = (
                self.plan.layout.pack_groups(a.astype(a.dtype.newbyteorder("="), copy=False), xp)
                for a in (mean, spread)
            )
        return mean, spread, None if running.clip else self.eps

    def per_param(self, r: Array, d: Array, xp: Any) -> tuple[Array, Array]:
        """r and d of Batch Renormalization, constants for the gradient, one a parameter."""
        layout = self.plan.layout
        if layout.axes.params == layout.axes.groups:  # which are in one order
            return r, d
        return (
            layout.pack_param(layout.unpack_groups(r), xp),
            layout.pack_param(layout.unpack_groups(d), xp),
        )

    def grad(self, grad: Array, param: Array | None) -> Array | None:
        """The gradient of a parameter, shaped and typed like it."""
        if param is None:
            return None
        plan = self.plan
        if plan.direct_params and grad.dtype == param.dtype:
            return grad
        with _quiet():
            if not plan.direct_params:
                grad = plan.layout.unpack_param(grad)
            return grad.astype(param.dtype.newbyteorder("="), copy=False)

    def _update(self, running: Running, mean: Array, spread: Array, factor: float | None) -> None:
        layout = self.plan.layout
        mean, spread = layout.unpack_groups(mean), layout.unpack_groups(spread)
        if mean.ndim > running.mean.ndim:  # instance norm: statistics per sample and channel
            with _quiet():
                mean, spread = mean.mean(axis=0), spread.mean(axis=0)
        update = Update(running.mean, running.spread, factor, running.momentum)
        self.backend.average(update, mean, spread)


class Pullback:
    """From dy to the gradients of x, gamma and beta; may be called any number of times.

    It keeps x and gamma by reference and the statistics by value.
    """

    def __init__(
        self,
        call: Callable[[], Call],
        stats: Stats | None,
        corrections: tuple[Array, Array] | None = None,
    ) -> None:
        self._call, self._stats, self._corrections = call, stats, corrections

    def __call__(self, dy: Array) -> Grads:
        """Gradients for the gradient `dy` of y.

        Parameters
        ----------
        dy : array
            Of x's shape, in any supported dtype and layout.

        Returns
        -------
        Grads
            ``(x, gamma, beta)`` in the dtypes of x, gamma and beta, x's laid out like x; None for
            a parameter that was not given.
        """
        return self._gradients(self._call(), dy)

    def _gradients(self, call: Call, dy: Array) -> Grads:
        stats, x, plan = self._stats, call.x, call.plan
        xp = np
        if type(x) is not np.ndarray:
            xp, elsewhere = namespace(x), call.backend.elsewhere(x)
            if elsewhere is not None:
                with elsewhere:
                    return self._gradients(call, dy)
        try:
            dy = _like("dy", dy, x)
            _arithmetic("dy", dy.dtype)
            if dy.shape != x.shape:
                raise ValueError(f"dy has shape {dy.shape}: expected that of x, {x.shape}")
        except (TypeError, ValueError) as error:
            raise type(error)(f"pullback: {error}") from None
        dx = call.like_x(xp)
        if stats is None:
            return _grads(
                dx,
                *(
                    None if p is None else xp.zeros_like(p, dtype=p.dtype.newbyteorder("="))
                    for p in (call.gamma, call.beta)
                ),
            )
        dtype = plan.native if dy.dtype == plan.native else plan.arithmetic
        view, target = call.target(dx)
        gamma, _ = call.params()
        wanted, r, d = plan.wanted, None, None
        if call.running is not None and call.running.clip:
            r, d = (stats.r, stats.d) if self._corrections is None else self._corrections
        if r is not None and d is not None:
            r, d = call.per_param(r, d, xp)
            with _quiet():
                gamma, _ = call.backend.affine(gamma, None, r, d, plan.arithmetic)
            wanted = wanted and (np.dtype(np.float64),) * 2
        sums = call.backend.gradients(
            call.pack(dy, dtype),
            call.pack(x, plan.native),
            plan.layout.axes,
            stats,
            gamma,
            target,
            center=call.center,
            frozen=call.frozen,
            affine=wanted,
        )
        if target is not view:
            view[...] = target
        if sums is None:
            return _grads(dx, None, None)
        dgamma, dbeta = sums
        if r is not None:
            with _quiet():
                dgamma = r * dgamma + d * dbeta
        return _grads(dx, call.grad(dgamma, call.gamma), call.grad(dbeta, call.beta))


def _grads(dx: Array, dgamma: Array | None, dbeta: Array | None) -> Grads:
    grads = Grads(dx, dgamma, dbeta)
    return grads if type(dx) is np.ndarray else unwrap(grads)


def norm(declare: Callable[..., Call], *, pure: bool = False) -> Callable[..., Array]:
    """Make a function that declares a `Call` the norm itself, which runs it.

    Parameters
    ----------
    declare : callable
        ``declare(x, gamma, beta, ...)`` gives the `Call`.
    pure : bool
        It depends on the shapes, strides and dtypes of its arrays and on the values of its other
        arguments alone. A call like one before is then not declared and checked again, which is
        half the overhead of a small one.

    Examples
    --------
    A norm of one's own, with every layout, dtype, backend and its gradient:

    >>> import numpy as np, normkit as nk
    >>> from normkit.axes import over
    >>> @nk.norm
    ... def power_norm(x, gamma=None, beta=None, *, axis=-1, eps=0.0, out=None):
    ...     return nk.Call(x, gamma, beta, over, axis, eps=eps, center=False, out=out)
    >>> power_norm(np.array([[3.0, 4.0]])).round(4)
    array([[0.8485, 1.1314]])
    """

    name = declare.__name__
    parameters = inspect.signature(declare).parameters
    pure &= all(p.kind is not p.VAR_POSITIONAL for p in parameters.values())
    known: dict[Any, Repeat | None] = {}  #: by signature; None for what is declared every time

    def named(error: Exception) -> Exception:
        message = str(error)  # Python's own, on a wrong signature, begin with the name
        return type(error)(message if message.startswith(name) else f"{name}: {message}")

    def find(signature: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Call:
        again = known.get(signature)
        try:
            if again is not None:
                return again.call((*args, *options.values(), None))
            call: Call = declare(*args, **options)
        except (TypeError, ValueError) as error:
            raise named(error) from None
        if signature is not None and signature not in known:
            if len(known) >= _KNOWN:
                known.clear()
            known[signature] = call.repeat(dict(zip(parameters, args, strict=False)) | options)
        return call

    @functools.wraps(declare)
    def checked(*args: Any, **options: Any) -> Call:
        return find(_signature(args, options) if pure else None, args, options)

    @functools.wraps(declare)
    def run(*args: Any, **options: Any) -> Array:
        signature = _signature(args, options) if pure else None
        again = known.get(signature)
        if again is None:
            return find(signature, args, options).forward()
        try:
            return again.forward((*args, *options.values(), None))
        except (TypeError, ValueError) as error:
            raise named(error) from None

    @functools.wraps(declare)
    def differentiated(*args: Any, **options: Any) -> tuple[Array, Pullback]:
        signature = _signature(args, options) if pure else None
        again = known.get(signature)
        if again is None or options.get("out") is not None:
            return find(signature, args, options).vjp()
        try:
            return again.vjp((*args, *options.values(), None))
        except (TypeError, ValueError) as error:
            raise named(error) from None

    run.declare, run.differentiated = checked, differentiated  # type: ignore[attr-defined]
    return run


_KNOWN = 4096  #: signatures that a norm knows at most
#: Types whose values, with the type, tell one call from another: True == 1 == 1.0.
_VALUES = frozenset({bool, int, float, str, type(None)})


def _signature(args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, ...] | None:
    """What checking a call looks at, who owns memory apart; None if it is not that simple."""
    found: list[Any] = [chosen_backend(), *options]
    for value in (*args, *options.values()):
        kind = type(value)
        if kind is np.ndarray:
            found.append(_meta(value))
        elif kind in _VALUES or (kind is tuple and all(type(v) is int for v in value)):
            found += kind, value
        elif (of := fingerprint(kind)) is not None:
            found.append(of(value))
        else:
            return None
    return tuple(found)


def vjp(norm: Callable[..., Array], x: Array, *args: Any, **options: Any) -> tuple[Array, Pullback]:
    """A norm's result and its pullback (vector-Jacobian product).

    Parameters
    ----------
    norm : callable
        A norm of normkit, one made with `normkit.norm`, or a `functools.partial` of one.
    x : array
        What to normalise.
    *args, **options
        The norm's other arguments.

    Returns
    -------
    y : array
        The same bits as ``norm(x, *args, **options)``. Running statistics are updated once, here.
    pullback : callable
        ``dx, dgamma, dbeta = pullback(dy)``, a `Grads`. It keeps x and gamma by reference (do not
        overwrite them before the last call) and the statistics by value.

    Raises
    ------
    TypeError, ValueError
        As the norm itself; TypeError if `norm` is not one.

    Examples
    --------
    >>> import numpy as np, normkit as nk
    >>> y, pullback = nk.vjp(nk.layer_norm, np.array([[1.0, 2.0, 4.0]]), np.ones(3))
    >>> dx, dgamma, dbeta = pullback(np.ones_like(y))
    >>> dbeta is None
    True
    """
    direct = getattr(norm, "differentiated", None)
    if direct is not None:
        found: tuple[Array, Pullback] = direct(x, *args, **options)
        return found
    return declared("vjp", norm)(x, *args, **options).vjp()


def declared(caller: str, norm: Callable[..., Array]) -> Callable[..., Call]:
    """What makes the `Call` of a norm, or of a `functools.partial` of one."""
    inner = norm.func if isinstance(norm, functools.partial) else norm
    declare: Callable[..., Call] | None = getattr(inner, "declare", None)
    if declare is None:
        raise TypeError(
            f"{caller}: norm={norm!r} is no norm: pass a normkit norm such as layer_norm"
        )
    if isinstance(norm, functools.partial):
        declare = functools.partial(declare, *norm.args, **norm.keywords)
    return declare


def _checked(x: Array, rule: Rule, args: tuple[object, ...]) -> tuple[object, ...]:
    """`args`, refused by `rule` itself if they are nothing that a cache can tell apart."""
    for arg in args:
        if type(arg) is int or arg is None:
            continue
        if isinstance(arg, (list, set, dict, np.ndarray)):
            raise TypeError(f"axes are an int or a tuple of ints, not {type(arg).__name__}: {arg}")
        if not (isinstance(arg, tuple) and all(type(a) is int for a in arg)):
            rule(x.shape, *args)
    return args


def _plain(argument: str, array: Any) -> Array:
    """`array` as its library's own array type; subclasses are seen through, masks refused."""
    if type(array) is np.ndarray:
        return array
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(
            f"{argument} is a masked array, whose mask would be ignored: "
            f"pass {argument}.filled(value) or {argument}.data"
        )
    if isinstance(array, np.ndarray):
        return array.view(np.ndarray)
    if isinstance(array, np.generic):
        raise TypeError(
            f"{argument}={array!r} is a scalar: pass an array, numpy.asarray({argument})"
        )
    try:
        backend_for(type(array))
    except TypeError as error:
        raise TypeError(f"{argument}: {error}") from None
    return adopt(array)


def _like(argument: str, array: Any, x: Array) -> Array:
    """`array`, if it is of x's library and on x's device."""
    kind = type(array)
    if kind is type(x) and (kind is np.ndarray or array.device == x.device):
        return array
    mine, other = library(type(array)), library(type(x))
    if mine != other and is_array_library(mine):
        raise TypeError(
            f"{argument} is a {mine} array and x a {other} array: "
            "convert one, so that all arrays of a call are of one library"
        )
    array = _plain(argument, array)
    if getattr(array, "device", None) != getattr(x, "device", None):
        raise TypeError(f"{argument} is on {array.device} and x on {x.device}: move one of them")
    return array


def _owner(array: Any) -> Any:
    while isinstance(array.base, type(array)):
        array = array.base
    return array


def _overlap(a: Array, b: Array) -> bool:
    """Whether two arrays share memory."""
    xp = namespace(a)
    if xp is np:
        return np.shares_memory(a, b)
    if isinstance(a, Portable):
        return a.may_share_memory(a, b)
    if not (a.size and b.size):
        return False
    # CuPy's may_share_memory takes arrays that came by way of DLPack for arrays of their own
    (low, high), (other_low, other_high) = xp.byte_bounds(a), xp.byte_bounds(b)
    return bool(low < other_high and other_low < high)


def _apart(written: tuple[Array, ...], read: tuple[Array | None, ...]) -> bool:
    """Whether what is written plainly shares no memory: much cheaper than asking for overlaps.

    What is only read may be one array twice.
    """
    if type(written[0]) is not np.ndarray:
        return _on_device_apart(written, read)
    owners = []
    for array in written + read:
        if array is not None:
            if array.base is not None:
                array = _owner(array)
                if array.base is not None:
                    return False
            owners.append(id(array))
    own = set(owners[: len(written)])
    return len(own) == len(written) and own.isdisjoint(owners[len(written) :])


def _on_device_apart(written: tuple[Array, ...], read: tuple[Array | None, ...]) -> bool:
    """The same for CuPy's arrays, of which even those without a base may share memory."""
    if isinstance(written[0], Portable):
        return False
    bounds = namespace(written[0]).byte_bounds
    spans = [bounds(array) for array in written + read if array is not None]
    for i in range(len(written)):
        low, high = spans[i]
        for other_low, other_high in spans[i + 1 :]:
            if low < other_high and other_low < high:
                return False
    return True


def _same_memory(a: Array, b: Array) -> bool:
    """Whether two arrays are one: the same elements at the same addresses."""
    if a is b:
        return True
    if _meta(a) != _meta(b) or _apart((a,), (b,)):
        return False
    if isinstance(a, Portable):
        return _overlap(a, b)
    if isinstance(a, np.ndarray):
        return bool(a.__array_interface__["data"][0] == b.__array_interface__["data"][0])
    return bool(a.data.ptr == b.data.ptr)


def _writeable(argument: str, array: Array) -> None:
    if not getattr(array.flags, "writeable", True):  # CuPy's always are
        raise ValueError(f"{argument} is read-only, but is written to: pass a writeable copy")


def _like_running(running: Running, x: Array) -> Running:
    """`running` with plain arrays of x's library."""
    mean = _like("running_mean", running.mean, x)
    spread = _like(running.spread_name, running.spread, x)
    if mean is running.mean and spread is running.spread:
        return running
    return running._replace(mean=mean, spread=spread)


def _check_running(running: tuple[Meta, Meta, str], layout: Layout, x_shape: Ints) -> None:
    mean, spread, spread_name = running
    for argument, (shape, _, dtype) in (("running_mean", mean), (spread_name, spread)):
        if dtype.name not in ("float32", "float64"):
            raise TypeError(
                f"{argument} has dtype {dtype}: expected float32 or float64; "
                f'convert it first, for example {argument}.astype("float32")'
            )
        if shape != layout.param_shape:
            raise ValueError(
                f"{argument} has shape {shape}: expected {layout.param_shape} "
                f"for x of shape {x_shape}"
            )


def _check_updated(
    mean: Array, spread: Array, spread_name: str, x: Array, gamma: Array | None, beta: Array | None
) -> None:
    """Whether running statistics can be updated in place."""
    _writeable("running_mean", mean)
    _writeable(spread_name, spread)
    if _apart((mean, spread), (x, gamma, beta)):
        return
    both = (("running_mean", mean), (spread_name, spread))
    inputs = (("x", x), ("gamma", gamma), ("beta", beta))
    for argument, array in both:
        for name, other in inputs:
            if other is not None and _overlap(array, other):
                raise ValueError(f"{argument} overlaps {name}: it is updated in place, so copy it")
    if _overlap(mean, spread):
        raise ValueError(f"running_mean overlaps {spread_name}: give each its own array")


def _check_out(out: Array, x: Array) -> Array:
    """`out` as an array of x's library, shape and dtype."""
    out = _like("out", out, x)
    if out.shape != x.shape or out.dtype != x.dtype:
        raise (ValueError if out.dtype == x.dtype else TypeError)(
            f"out has shape {out.shape} and dtype {out.dtype}: expected those of x, "
            f"{x.shape} and {x.dtype}"
        )
    return out


def _check_written(
    out: Array, x: Array, gamma: Array | None, beta: Array | None,
    mean: Array | None, spread: Array | None, spread_name: str,
) -> None:  # fmt: skip
    """Whether `out` can be written to while the others are read."""
    _writeable("out", out)
    if _apart((out,), (None if out is x else x, gamma, beta, mean, spread)):
        return
    others = {"x": x, "gamma": gamma, "beta": beta, "running_mean": mean, spread_name: spread}
    if _same_memory(out, x):
        del others["x"]
    for argument, array in others.items():
        if array is not None and _overlap(out, array):
            raise ValueError(
                f"out overlaps {argument}: give an array of its own"
                + (", or x itself" if argument == "x" else "")
            )
