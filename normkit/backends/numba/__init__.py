"""The CPU backend: which kernel, over how many parts, on how many threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from itertools import product
from typing import Any

import numba
import numpy as np

from normkit.axes import Axes
from normkit.backends.base import BATCH_NORM, Array, Backend, Launch, Stats, Step, Update
from normkit.backends.numba import kernels as k
from normkit.backends.numba.threads import Pool

_PART = 1 << 16  #: elements of a group that are worth a task of their own
_MOST_PARTS = 64
_FEW_PARTS, _PART_ROWS = 12, 1 << 12  #: of columns: their sums then are below 1 % of the data
_SHARED = 12  #: parts from which on sharing them, by three launches, is faster than one launch
_BLOCK = 1 << 12  #: elements that are worth a task without sums,
_PREPARED = 3 << 12  #: and those of one that makes tables of its own
_NEAR = 1 << 19  #: elements of a slab that a cache keeps
#: bytes of a sample that are better read twice in the order of memory than once in leaps, which
#: are so many
_FAR_BYTES, _LEAPS = 1 << 22, 16
#: parts of all groups then, of so many bytes of each at least: their sums are below 1 % of that
_LEAST_ACROSS, _PARTS_ACROSS, _PART_BYTES = 4, 16, 1 << 11
_ALIKE = 256  #: least elements of a row with one parameter that is not stored with its neighbours
_KEPT = 1 << 16  #: elements of a constant that is worth keeping
_NONE = Stats(None, None)
_RUN = 1024  #: runs of parameters are repeated up to this length


@dataclass(frozen=True)
class Work:
    """How the kernels go about one geometry: but for `blocks`, which no result depends on, the same
    whatever the size of an outermost batch.
    """

    dtype: str
    real: Any  #: dtype of the arithmetic
    family: k.Family  #: of kernels
    axes: Axes  #: as given, but for `repeat` and `tile`
    repeat: int  #: each parameter is repeated so often, to make short runs vectors of parameters,
    tile: int  #: and then all of them so often, to make short vectors long
    units: int  #: independent units of work: groups, or slabs of columns
    parts: int  #: fixed parts of a unit, summed separately
    sum_tasks: int  #: of summing all parts
    stretches: int  #: tasks of dx from those sums
    blocks: int  #: parts of a group, or of a window of columns, in y from given statistics
    windows: int  #: tasks of that

    @cached_property
    def elements(self) -> int:
        """Elements of x."""
        return self.axes.groups * self.axes.group_size

    @cached_property
    def as_given(self) -> bool:
        """Whether the kernels read parameters neither repeated nor tiled."""
        return self.repeat == self.tile == 1

    @cached_property
    def rows(self) -> bool:
        """Whether groups are rows, not columns."""
        return self.family is not k.COLUMNS

    @cached_property
    def forward(self) -> Any:
        """The compiled kernel of a whole group or slab, forward,"""
        return self.compiled(self.family.forward)

    @cached_property
    def general(self) -> Any:
        """that which also serves without a result, or with running statistics,"""
        return self.compiled(self.family.general)

    def whole(self, update: Update | None) -> Any:
        """either of them,"""
        return self.forward if update is None else self.general

    @cached_property
    def apply(self) -> Any:
        """and that by statistics that are given."""
        return self.compiled(self.family.apply)

    def compiled(self, kernel: Any) -> Any:
        """A kernel of the family, forward."""
        return k.compiled(kernel, k.Forward, self.dtype, "")

    @cached_property
    def links(self) -> int:
        """Where those kernels find the ones that they leave work to,"""
        kernels = self.family.left_forward
        return k.links(*[(kernel, k.Forward, self.dtype, "") for kernel in kernels]).address

    @cached_property
    def links_backward(self) -> dict[str, int]:
        """and where the backward ones do, by the dtype of dy."""
        kernels = self.family.left_backward
        return {
            dy: k.links(*[(kernel, k.Backward, self.dtype, dy) for kernel in kernels]).address
            for dy in (self.dtype, self.real.name)
        }

    def numbers(self, eps: float | None, center: bool, parts: int, again: int = 0) -> Any:
        """What the kernels take after the running statistics."""
        return self.axes, self.links, eps or 0.0, center, again, parts

    def scarce(self, pool: Pool) -> bool:
        """Whether the parts of a unit should be shared by threads, for want of units."""
        if self.parts == 1 or self.units * self.parts < _SHARED:
            return False
        threads = pool.threads(self.elements)
        return threads > 1 and self.units < 4 * threads and self.units % threads > 0

    def partial(self) -> Array:
        """Memory for the sums of all parts."""
        _, _, k1, r1, _, _ = self.axes
        columns = 1 if self.rows else k.slab_groups.py_func(k1, r1) * r1
        return np.empty(2 * self.units * self.parts * columns)

    def by_parts(self, pool: Pool) -> bool:
        """Whether forward shares them: also where groups or slabs share rows, which memory gives
        and takes slowly in pieces, and no cache keeps one from its sums to its result.
        """
        if self.family is k.ACROSS:
            return True
        pieces = not self.rows and self.axes.k1 * self.axes.r1 > k.SLAB
        far = pieces and self.elements >= self.units * _NEAR
        return self.scarce(pool) or (far and pool.threads(self.elements) > 1)


@lru_cache(maxsize=4096)
def _work(axes: Axes, dtype: Any, *, sums: bool = False, given: bool = False) -> Work:
    """How to go about `axes`; with `sums` about gradients, those of parameters among them; with
    `given` about a result by statistics that are given.
    """
    k0, r0, k1, r1, params, span = axes
    if params == 1:
        span = r0 * k1 * r1  # whatever it is: no batch may change the formula
    by_param = sums and span == 1  # columns then give what the parameters need
    if by_param and r0 == k1 == 1 and params <= k.SLAB and r1 > k.CHUNK:
        r0, r1 = r1 // params, params
    by_run = span % r1 == 0 and k1 * r1 % (params * span) == 0  # each stretch has one parameter
    rows = r0 == 1 or r1 >= (k.GIVEN if given and by_run else k.SHORT)
    slabs = r1 <= k.NARROW_SLAB or k1 * r1 <= k.SLAB
    if by_param and r0 > 1 and slabs and k1 * r1 % params == 0:
        rows = False
    repeat = tile = 1
    if rows:
        if 1 < span < k.SHORT // 2 and params > 1:
            repeat, params, span = span, params * span, 1
        if span == 1 and 1 < params < min(r1, _RUN):
            repeats = r1 // params
            tile = max(t for t in range(1, _RUN // params + 1) if repeats % t == 0)
            if params * tile < k.SHORT and r1 <= k.CHUNK:
                tile = repeats
            params *= tile
        units, elements = axes.groups, r0 * r1
    else:
        groups = k.slab_groups.py_func(k1, r1)
        units, elements = k0 * -(-k1 // groups), r0 * groups * r1
    most = elements if rows else min(r0, max(_FEW_PARTS, r0 // _PART_ROWS))
    parts = max(1, min(_MOST_PARTS, 4 * (elements // _PART), most))
    size = dtype.itemsize if dtype != np.float64 else 0  # whose sums read x twice anyway
    leaps = rows and by_run and r0 >= _LEAPS and r1 <= k.CHUNK and k1 <= k.KNOWN
    parts_across = min(_PARTS_ACROSS, r0 * r1 * size // _PART_BYTES)
    far = parts_across >= _LEAST_ACROSS and r0 * k1 * r1 * size >= _FAR_BYTES
    family = k.ROWS if rows else k.COLUMNS
    if k1 == r0 == parts == 1 and size:
        if params == 1 and r1 >= _ALIKE:
            family = k.ALIKE_ROWS
        elif 1 == span < r1 == params:
            usual = k.USUAL_ROWS if r1 >= k.SHORT_ROW else k.ROWS
            family = k.ROWS_OF_FEW if r1 <= k.FEW else usual
    if leaps and far and not given:
        family, parts = k.ACROSS, parts_across
    real = np.dtype(np.float64 if dtype == np.float64 else np.float32)
    axes = Axes(k0, r0, k1, r1, params, span)
    sum_tasks = (k0 if family is k.ACROSS else units) * parts
    stretches = units * (r0 if rows and r0 > 1 else parts)
    blocks, windows = parts, stretches
    if not rows:
        windows = k0 * -(-k1 * r1 // k.WINDOW)
        blocks = r0 * min(k1 * r1, k.WINDOW) // (_BLOCK if windows == k0 else _PREPARED)
        blocks = max(1, min(r0, blocks, max(parts, _MOST_PARTS // max(1, windows))))
        windows *= blocks
    name = dtype.name
    return Work(
        name, real, family, axes, repeat, tile, units, parts, sum_tasks, stretches, blocks, windows
    )


@lru_cache(maxsize=64)
def _name(dtype: Any) -> str:
    return str(dtype.name)


@lru_cache(maxsize=256)
def _constant(value: float, count: int, real: Any) -> Array:
    constant = np.full(count, value, real)
    constant.flags.writeable = False
    return constant


def _default(value: float, work: Work) -> Array:
    """A parameter that was not given; what is kept for the next call is small."""
    count = work.axes.params
    return (
        _constant(value, count, work.real) if count <= _KEPT else np.full(count, value, work.real)
    )


def _params(gamma: Array | None, beta: Array | None, work: Work) -> tuple[Array, Array, int]:
    """gamma and beta as the kernels read them, and of which kinds they are."""
    gamma, narrow_gamma = _param(gamma, 1.0, work)
    beta, narrow_beta = _param(beta, 0.0, work)
    return gamma, beta, k.NARROW_GAMMA * narrow_gamma | k.NARROW_BETA * narrow_beta


def _param(param: Array | None, default: float, work: Work) -> tuple[Array, bool]:
    """A parameter as the kernels read it, and whether they are to widen it themselves."""
    if param is None:
        return _default(default, work), False
    if work.as_given and param.dtype == work.real:
        return param, False
    name = _name(param.dtype)
    if work.as_given and name == work.dtype and param.size <= k.ROW_LIMIT:
        return param, True
    kernel = k.compiled(k.widen, k.Widen, name, _name(work.real))
    wide = np.empty(work.axes.params, work.real)
    call = (param, wide, param.size, work.repeat, work.tile)
    kernel.run(kernel.address, call, -(-param.size // k.CHUNK))
    return wide, False


def _running(update: Update | None, eps: float | None, kinds: int = 0) -> tuple[Any, ...]:
    """Running statistics as the kernels take them, and kinds of other things beside theirs."""
    if update is None:
        return None, None, kinds, 0.0, 0.0, BATCH_NORM
    mean, spread, factor, momentum, clip = update
    kinds |= k.WIDE_MEAN if mean.dtype.itemsize == 8 else 0
    kinds |= k.WIDE_SPREAD if spread.dtype.itemsize == 8 else 0
    kinds |= k.DEVIATION if eps is None or clip else 0
    return mean, spread, kinds, factor or 1.0, momentum, clip or BATCH_NORM


def _corrects(update: Update | None) -> bool:
    """Whether there are an r and a d."""
    return update is not None and update.clip not in (None, BATCH_NORM)


def _compile(*kernel: Any) -> None:
    _ = k.compiled(*kernel).share  # for one thread and for several


class Numba(Backend):
    name = "numba"
    arrays = ("numpy",)
    renormalizes = True

    def __init__(self) -> None:
        self._pool = Pool()

    def moments(self, x: Array, axes: Axes, *, eps: float, center: bool) -> Stats:
        work = _work(axes, x.dtype)
        stats = self._stats(work, var=True)
        if work.by_parts(self._pool):
            self._by_parts(work, x, stats, _running(None, eps), eps, center)
        else:
            call = (x, None, None, None, *stats, None, *_running(None, eps))
            call += work.numbers(eps, center, work.parts)
            self._pool.run(work.general, call, work.units, work.elements)
        return stats

    def normalize(
        self, x: Array, axes: Axes, stats: Stats, gamma: Array | None, beta: Array | None, y: Array
    ) -> None:
        stats = stats._replace(r=None, d=None)
        self._apply(_work(axes, x.dtype, given=True), x, gamma, beta, y, stats)

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
    ) -> Stats:
        work = _work(axes, x.dtype)
        if work.by_parts(self._pool):
            stats = self._stats(work, _corrects(update), var=True)
            self._by_parts(work, x, stats, _running(update, eps), eps, center)
            self._apply(work, x, gamma, beta, y, stats)
            return stats
        stats = self._stats(work, _corrects(update), var=True) if keep else _NONE
        gamma, beta, kinds = _params(gamma, beta, work)
        call = (
            x, y, gamma, beta, *stats, None, *_running(update, eps, kinds),
            *work.numbers(eps, center, work.parts),
        )  # fmt: skip
        self._pool.run(work.whole(update), call, work.units, work.elements)
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
        update = Update(mean, spread, None, 0.0)
        self._apply(_work(axes, x.dtype, given=True), x, gamma, beta, y, _NONE, update, eps)

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
        if type(self) is not Numba:  # whose other methods may do otherwise
            return None
        work = _work(axes, x.dtype, given=frozen)
        if not frozen and work.by_parts(self._pool):  # several launches
            return None
        *as_read, kinds = _params(gamma, beta, work)
        direct = all(p is None or p is read for p, read in zip((gamma, beta), as_read, strict=True))
        run, elements, corrects = self._pool.run, work.elements, _corrects(update)
        if frozen:
            kernel, parts, tasks = work.apply, work.blocks, work.windows
        else:
            kernel, parts, tasks = work.whole(update), work.parts, work.units
        numbers = _running(update, eps, kinds)[2:]
        numbers += work.numbers(eps, center, parts)

        def launch(
            x: Array,
            y: Array,
            gamma: Array | None,
            beta: Array | None,
            mean: Array | None,
            spread: Array | None,
            keep: bool,
        ) -> Stats | None:
            if gamma is None or beta is None or not direct:
                gamma, beta, _ = _params(gamma, beta, work)
            stats = self._stats(work, corrects) if keep and not frozen else _NONE
            call = (x, y, gamma, beta, *stats, None, mean, spread, *numbers)
            run(kernel, call, tasks, elements)
            return self.given(mean, spread, eps) if keep and frozen else stats

        return launch

    @staticmethod
    def _stats(work: Work, corrects: bool = False, var: bool = False) -> Stats:
        empty, groups = np.empty, work.axes.groups
        residual = r = d = None
        if work.real == np.float64:  # else the mean needs none
            residual = empty(groups)
        if corrects:
            r, d = empty(groups), empty(groups)
        return Stats(empty(groups), empty(groups), empty(groups) if var else None, residual, r, d)

    def _apply(
        self,
        work: Work,
        x: Array,
        gamma: Array | None,
        beta: Array | None,
        y: Array,
        stats: Stats,
        update: Update | None = None,
        eps: float | None = 0.0,
    ) -> None:
        """y from given statistics: those of the groups, or running ones."""
        gamma, beta, kinds = _params(gamma, beta, work)
        call = (
            x, y, gamma, beta, *stats, None, *_running(update, eps, kinds),
            *work.numbers(eps, True, work.blocks),
        )  # fmt: skip
        self._pool.run(work.apply, call, work.windows, work.elements)

    def _by_parts(
        self,
        work: Work,
        x: Array,
        stats: Stats,
        running: tuple[Any, ...],
        eps: float,
        center: bool,
    ) -> None:
        """Moments, the parts of a unit shared by threads."""
        units, parts, family = work.units, work.parts, work.family
        partial = work.partial()
        arrays = (x, None, None, None, *stats, partial, *running)
        for again in range(2 if work.real == np.float64 and center else 1):
            call = (*arrays, *work.numbers(eps, center, parts, again))
            for kernel, tasks in (family.sums, work.sum_tasks), (family.finish, units):
                self._pool.run(work.compiled(kernel), call, tasks, work.elements)

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
        work = _work(axes, x.dtype, sums=affine is not None)
        parts, units, family = work.parts, work.units, work.family
        k0, r0, k1, r1, params, span = work.axes
        gamma, narrow = _param(gamma, 1.0, work)
        kinds = k.NARROW_GAMMA * narrow
        dy_name = _name(dy.dtype)
        links = work.links_backward[dy_name]

        def run(
            kernel: Any,
            tasks: int,
            partial: Any,
            sums: Any,
            grads: tuple[Any, ...] = (None,) * 3,
            rows: int = 0,
            of_part: bool = False,
        ) -> None:
            arrays = (dy, x, dx, gamma, stats.mean, stats.residual, stats.rstd, partial, sums)
            numbers = (kinds, work.axes, links, center, frozen, of_part, parts, rows)
            compiled = k.compiled(kernel, k.Backward, work.dtype, dy_name)
            self._pool.run(compiled, arrays + grads + numbers, tasks, work.elements)

        whole = work.rows and span == r0 == k1 == 1
        if affine and whole and (max(params, r1) <= k.ROW_MOST or params == r1):
            chunk = max(1, params) if params <= k.ROW_MOST else k.CHUNK
            rows = min(k.ROW_BLOCK, max(1, _PART // max(1, min(r1, chunk))))
            rows *= max(1, -(-k0 // (_MOST_PARTS * rows)))
            tasks, partial = -(-k0 // rows) * -(-params // chunk), None
            if chunk < params and not frozen:
                partial = work.partial()
                run(family.grad_sums, work.sum_tasks, partial, None)
            space = k.grads_space.py_func(chunk)
            # With lines to spare; a thread uses, and so has pages for, its first task's only.
            grads = np.empty(2 * tasks * space + 64, work.real)
            usual = work.real != np.float64 and not k.are_few.py_func(work.axes, frozen)
            kernel = k.rows_usual_backward_params if usual else k.rows_backward_params
            if 0 < k0 <= min(rows, k.ROW_BLOCK) and work.as_given and {*affine} == {work.real}:
                found = np.empty(params, work.real), np.empty(params, work.real)
                run(kernel, tasks, partial, None, (grads, *found), rows)
                return found
            shares = np.empty((-(-k0 // rows), 2, params))
            run(kernel, tasks, partial, shares, (grads, None, None), rows)
            return self._fold_shares(shares, work, affine)
        by_column = not work.rows and k1 * r1 % (params * span) == 0
        apart = not (work.rows or by_column)  # rows of columns with parameters of their own
        sums: Array | None = None
        if affine and work.rows and span > 1:
            pieces = -(-min(r1, span) // k.CHUNK) * max(1, span // r1)
            sums = np.empty((x.size // (params * span), params, pieces, 2))
        elif affine and by_column:
            pieces = span // r1 if span % r1 == 0 else span  # of as many columns as are alike
            sums = np.empty((k0 * k1 * r1 // (params * span), params, pieces, 2))
        needs_sums = sums is not None or not frozen
        if not needs_sums or family is k.ACROSS or work.scarce(self._pool):
            partial = None
            if needs_sums:
                partial = work.partial()
                run(family.grad_sums, work.sum_tasks, partial, sums)
            kernel = family.grads_any if r0 == 1 or apart else family.grads
            run(kernel, work.stretches, partial, sums, of_part=True)
        else:
            run(family.grads_any if apart else family.backward, units, None, sums)
        if not affine:
            return None
        if sums is None and work.rows and span == 1:
            count = max(1, min(_MOST_PARTS, x.size // params, x.size // _PART))
            shares = np.empty((count, 2, params))
            run(k.slab_params, count * -(-params // k.NARROW_SLAB), None, shares, rows=count)
            return self._fold_shares(shares, work, affine)
        if sums is None:
            sums = np.empty((x.size // (params * span), params, 1, 2))
            run(k.param_sums, x.size // span, None, sums)
        outer, params, pieces, _ = sums.shape
        numbers = (outer, 1, params, pieces, 2 * params * pieces, 0, 2 * pieces, 2, 1)
        return self._fold(sums, affine, numbers)

    def _fold_shares(
        self, shares: Array, work: Work, affine: tuple[Any, Any]
    ) -> tuple[Array, Array]:
        """dgamma and dbeta from (shares, 2, params) sums for what `_param` made of gamma, beta."""
        tile, repeat, size = work.tile, work.repeat, work.axes.params
        params = size // (tile * repeat)
        numbers = (len(shares), tile, params, repeat, 2 * size, size // tile, repeat, 1, size)
        return self._fold(shares, affine, numbers)

    def _fold(
        self, sums: Array, affine: tuple[Any, Any], numbers: tuple[int, ...]
    ) -> tuple[Array, Array]:
        """dgamma and dbeta in their dtype, or in float64 if those differ."""
        dtype = affine[0] if affine[0] == affine[1] else np.dtype(np.float64)
        _, _, params, *_ = numbers
        dgamma, dbeta = np.empty(params, dtype), np.empty(params, dtype)
        compiled = k.compiled(k.fold, k.Fold, _name(dtype), "")
        call = (sums, dgamma, dbeta, *numbers)
        self._pool.run(compiled, call, -(-params // k.NARROW_SLAB), sums.size)
        return dgamma, dbeta

    def steps(self, operation: str, x: Array, axes: Axes, *_: Any, **options: Any) -> list[Step]:
        if operation not in ("moments", "normalize", "infer", "forward"):
            return []  # no kernel's, or part of one of these
        work = _work(axes, x.dtype, given=operation in ("normalize", "infer"))
        family, unit = work.family, "group" if work.rows else "slab"
        threads = self._pool.threads(work.elements)

        def step(kernel: Any, does: str, tasks: int, unit: str) -> Step:
            shared = f" on {min(threads, tasks)} threads" if threads > 1 and tasks > 1 else ""
            return Step(kernel.__name__, f"{does}: {tasks} {unit}{'s' * (tasks != 1)}{shared}")

        by_parts = work.by_parts(self._pool)
        if operation == "forward" and not by_parts:
            done = f"statistics and result, {unit} by {unit}"
            return [step(family.forward, done, work.units, unit)]
        found = []
        if operation not in ("normalize", "infer"):
            if by_parts:
                found.append(step(family.sums, "sums", work.sum_tasks, "part"))
            kernel = family.finish if by_parts else family.general
            found.append(step(kernel, "statistics", work.units, unit))
            if by_parts and work.real == np.float64 and options["center"]:
                found *= 2  # about an element, then about the mean
        if operation != "moments":
            found.append(step(family.apply, "result", work.windows, "piece"))
        return found

    def copy_seconds(self, size: int) -> float:
        return self._pool.copy_seconds(size)

    def kernels(self, dtype: str) -> Iterator[tuple[str, Callable[[], object]]]:
        real = "float64" if dtype == "float64" else "float32"
        families = (k.ROWS, k.COLUMNS) if dtype == "float64" else k.FAMILIES
        forward = dict.fromkeys(kernel for family in families for kernel in family.every_forward)
        backward = dict.fromkeys(kernel for family in families for kernel in family.every_backward)
        backward |= dict.fromkeys((k.param_sums, k.slab_params))
        if dtype != "float64":
            backward |= dict.fromkeys((k.rows_usual_backward_params,))
        needed: list[tuple[Any, ...]] = [(kernel, k.Forward, dtype, "") for kernel in forward]
        needed += product(backward, [k.Backward], [dtype], dict.fromkeys([dtype, real]))
        needed += [(k.fold, k.Fold, of_params, "") for of_params in k.DTYPES]
        needed += product([k.widen], [k.Widen], k.DTYPES, [real])
        for kernel in needed:
            yield f"{kernel[0].__name__} of {dtype}", partial(_compile, *kernel)

    def about(self) -> dict[str, str]:
        folder = k.enter.stats.cache_path
        return {"version": numba.__version__, **self._pool.about(), "cache": folder}


backend = Numba()
