"""The CUDA backend: kernels of our own (kernels/*.cuh), compiled and launched through CuPy."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache, lru_cache
from operator import itemgetter
from typing import Any

import numpy as np

from normkit.axes import Axes
from normkit.backends.base import Array, Backend, Launch, Stats, Step, Update
from normkit.backends.cuda import planner
from normkit.backends.cuda.planner import ARITHMETIC, Device, Program

Plan = Callable[..., Program]  #: of a key: what operation, on what
Run = Callable[[tuple[Array | None, ...]], tuple[Array, ...]]


class Table:
    """`Stats` whose arrays are the rows of one, as kernels take them; cut out when asked for."""

    def __init__(self, values: Array) -> None:
        self.values = values

    @property
    def mean(self) -> Array:
        return self.values[0]

    @property
    def rstd(self) -> Array:
        return self.values[1]

    @property
    def var(self) -> Array:
        return self.values[2]

    @property
    def residual(self) -> Array:
        return self.values[3]

    @property
    def r(self) -> Array | None:
        return self.values[4] if len(self.values) > 4 else None

    @property
    def d(self) -> Array | None:
        return self.values[5] if len(self.values) > 4 else None


class Cuda(Backend):
    """Looks up the program of an operation and runs it: all else is decided once."""

    name = "cuda"
    arrays = ("cupy",)
    renormalizes = True

    def __init__(self, device: Device) -> None:
        self.device = device
        self._bound = lru_cache(maxsize=8192)(self._bind)

    def elsewhere(self, x: Array) -> AbstractContextManager[Any] | None:
        return self.device.elsewhere(x)

    def moments(self, x: Array, axes: Axes, *, eps: float, center: bool) -> Any:
        key = axes, _name(x.dtype), self._aligned(x), eps, center
        return Table(self._run(planner.moments, key, x)[0])

    def normalize(
        self, x: Array, axes: Axes, stats: Stats, gamma: Array | None, beta: Array | None, y: Array
    ) -> None:
        key = axes, _name(x.dtype), _dtype(gamma), _dtype(beta), self._aligned(x, y, gamma, beta)
        self._run(planner.normalize, key, x, y, gamma, beta, self._values(stats))

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
    ) -> Any:
        launch = self._launch(x, axes, gamma, beta, update, eps=eps, center=center, frozen=False)
        mean, spread = (None, None) if update is None else update[:2]
        return launch(x, y, gamma, beta, mean, spread, keep)

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
        if dy.dtype != x.dtype:  # float32 for half data: as if x and dx were float32 too
            wide = self.device.empty(x.shape, dy.dtype)
            options: Any = {"center": center, "frozen": frozen, "affine": affine}
            sums = self.gradients(dy, x.astype(dy.dtype), axes, stats, gamma, wide, **options)
            dx[...] = wide
            return sums
        dtype = _name(x.dtype)
        wanted = None
        if affine:
            wanted = _name(affine[0]) if affine[0] == affine[1] else ARITHMETIC[dtype]
        aligned, limits = self._aligned(x, dy, dx, gamma), self.device.limits
        key = axes, dtype, _dtype(gamma), wanted, aligned, center, frozen, limits
        sums = self._run(planner.gradients, key, x, dy, dx, gamma, self._values(stats))
        return (sums[0], sums[1]) if sums else None

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
        given = Update(mean, spread, None, 0.0)
        launch = self._launch(x, axes, gamma, beta, given, eps=eps, center=True, frozen=True)
        launch(x, y, gamma, beta, mean, spread, False)

    def prepare(self, *args: Any, **options: Any) -> Launch | None:
        methods = "forward", "infer", "given"
        if any(getattr(type(self), name) is not getattr(Cuda, name) for name in methods):
            return None  # they may do otherwise
        return self._launch(*args, **options)

    def _launch(
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
    ) -> Launch:
        """`forward` or, `frozen`, `infer`, on arrays like these of the same device."""
        like = axes, _name(x.dtype), _dtype(gamma), _dtype(beta)
        of = None if update is None else _kinds(*update[:2]) if frozen else _of(update)
        runs: dict[tuple[bool, bool], Run] = {}

        def bind(aligned: bool, keep: bool) -> Run:
            plan: Plan = planner.infer if frozen else planner.forward
            rest = (of, eps) if frozen else (eps, center, keep, self.device.limits, of)
            run = self._bound(self.device.current(), plan, (*like, aligned, *rest))
            runs[aligned, keep] = run
            return run

        def launch(
            x: Array,
            y: Array,
            gamma: Array | None,
            beta: Array | None,
            mean: Array | None,
            spread: Array | None,
            keep: bool,
        ) -> Any:
            aligned = self._aligned(x, y, gamma, beta)
            run = runs.get((aligned, keep)) or bind(aligned, keep)
            results = run((x, y, gamma, beta, mean, spread))
            if keep and frozen:
                return self.given(mean, spread, eps)
            return Table(results[0]) if results else None

        return launch

    def given(self, mean: Array, spread: Array, eps: float | None) -> Any:
        key = mean.size, _kinds(mean, spread), eps
        return Table(self._run(planner.given, key, mean, spread)[0])

    def average(self, update: Update, mean: Array, spread: Array) -> None:
        arrays = update.mean, update.spread, mean, spread
        if mean.dtype != np.float64 or not all(a.flags.c_contiguous for a in arrays):
            super().average(update, mean, spread)
            return
        self._run(planner.average, (mean.size, _of(update)), *arrays)

    def renorm(
        self, stats: Stats, mean: Array, std: Array, clip: tuple[float, float]
    ) -> tuple[Array, Array]:
        key = mean.size, _kinds(mean, std)._replace(clip=clip)
        r, d = self._run(planner.renorm, key, self._values(stats), mean, std)
        return r, d

    def affine(
        self, gamma: Array | None, beta: Array | None, r: Array, d: Array, dtype: Any
    ) -> tuple[Array, Array]:
        key = r.size, _dtype(gamma), _dtype(beta), _name(dtype)
        scaled, shifted = self._run(planner.affine, key, gamma, beta, r, d)
        return scaled, shifted

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
        dtype, affine = _name(x.dtype), (_dtype(gamma), _dtype(beta))
        aligned, eps = self._aligned(x, gamma, beta), 1e-5  # which no launch depends on
        if operation == "moments":
            program = planner.moments(axes, dtype, self._aligned(x), eps, center)
        elif operation == "normalize":
            program = planner.normalize(axes, dtype, *affine, aligned)
        elif operation == "affine":
            program = planner.affine(axes.params, *affine, ARITHMETIC[dtype])
        elif operation == "forward":
            of = None if running is None else _of(running)
            limits = self.device.limits
            program = planner.forward(axes, dtype, *affine, aligned, eps, center, keep, limits, of)
        else:
            assert running is not None
            count, of = running.mean.size, _of(running)
            if operation == "average":
                program = planner.average(count, of)
            elif operation == "renorm":
                program = planner.renorm(count, of)
            else:
                program = planner.infer(axes, dtype, *affine, aligned, of, eps)
        return [
            Step(a.kernel, f"grid {a.grid[0]}, block {a.threads}, {a.shared} bytes shared")
            for a in program.launches
        ]

    def _values(self, stats: Stats) -> Array:
        if isinstance(stats, Table):
            return stats.values
        values = self.device.empty((4, stats.mean.size), np.float64)
        rest = 0.0 if stats.residual is None else stats.residual
        values[0], values[1], values[3] = stats.mean, stats.rstd, rest
        return values

    def _aligned(self, *arrays: Array | None) -> bool:
        address, addresses = self.device.address, 0
        for array in arrays:
            if array is not None:
                addresses |= address(array)
        return addresses % 16 == 0

    def _run(self, plan: Plan, key: tuple[Any, ...], *arrays: Array | None) -> tuple[Array, ...]:
        """The results of a program: compiled at the first call of its kind, then one look-up."""
        run: Run = self._bound(self.device.current(), plan, key)
        return run(arrays)

    def _bind(self, device: int, plan: Plan, key: tuple[Any, ...]) -> Run:
        """A program as a function of its arrays, for the current device."""
        program, null = plan(*key), self.device.null
        names = [*program.given, *program.new, None]
        launches = [
            (self.device.bind(launch), itemgetter(*map(names.index, launch.arrays)))
            for launch in program.launches
        ]
        casts = [(names.index(name), dtype) for name, dtype in program.casts.items()]
        made = [
            (self.device.zeros if name in program.zeros else self.device.empty, *of)
            for name, of in program.new.items()
        ]
        given = len(program.given)
        results = slice(given, given + program.results)

        def run(arrays: tuple[Array | None, ...]) -> tuple[Array, ...]:
            every = (*arrays, *[new(shape, dtype) for new, shape, dtype in made], null)
            if casts:
                every = _cast(every, casts)
            for launch, pick in launches:
                launch(pick(every))
            return every[results]

        return run


def _cast(arrays: tuple[Any, ...], casts: list[tuple[int, str]]) -> tuple[Any, ...]:
    changed = list(arrays)
    for i, dtype in casts:
        changed[i] = changed[i].astype(dtype)
    return tuple(changed)


@cache
def _name(dtype: Any) -> str:  # NumPy spells it out anew each time
    return str(dtype.name)


def _of(update: Update) -> planner.Update:
    return _kinds(*update[:2])._replace(
        factor=update.factor, momentum=update.momentum, clip=update.clip
    )


def _kinds(mean: Array, spread: Array) -> planner.Update:
    return planner.Update(_name(mean.dtype), _name(spread.dtype))


def _dtype(array: Array | None) -> str | None:
    return None if array is None else _name(array.dtype)


def __getattr__(attribute: str) -> Cuda:
    """`backend`, once it is asked for: plans can be read without CuPy."""
    if attribute != "backend":
        raise AttributeError(f"module {__name__!r} has no attribute {attribute!r}")
    from normkit.backends.cuda.device import CuPyCuda  # imports cupy

    globals()["backend"] = found = CuPyCuda()
    return found
