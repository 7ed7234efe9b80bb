"""What is timed: one table of shapes, times norm, memory layout, dtype and direction."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any

import ml_dtypes  # noqa: F401  (makes np.dtype("bfloat16") known)
import numpy as np

import normkit as nk

Array = Any

DIRECTIONS = ("forward", "backward", "inference")
ROWS = ("layer_norm", "rms_norm")
BATCH = ("batch_norm", "batch_renorm")
IMAGES = (*BATCH, "instance_norm", "group_norm")
NORMS = (*ROWS, *IMAGES)
SINGLE = ("float32",)
MODELS = ("float32", "bfloat16")
COMMON = ("float32", "float16", "bfloat16")
EVERY = (*COMMON, "float64")


@dataclass(frozen=True)
class Shape:
    """A shape (batch, channels, ...), the norms it is met with, and where."""

    where: str
    shape: tuple[int, ...]
    norms: tuple[str, ...]
    dtypes: tuple[str, ...] = COMMON
    layouts: tuple[str, ...] = ("NCHW", "NHWC")  #: of images; rows have one
    groups: int = 0  #: of group norm; by default the first of 8, 5, 1 that divides


#: ``--filter`` finds words of `where`. "small" and "large" are what speed is judged by; "size" rows
#: make the curves by size; "gpu" rows are too large for a CPU's patience.
SHAPES = (
    Shape("small quick size", (392, 256), ROWS, EVERY),
    Shape("small odd", (98, 1023), ROWS),
    Shape("small quick size", (8, 32, 20, 20), IMAGES, EVERY),
    Shape("small odd", (31, 65, 7, 7), IMAGES),
    Shape("large transformer size", (8192, 1024), ROWS, EVERY),
    Shape("large odd", (9973, 1023), ROWS),
    Shape("large ResNet conv2 size", (32, 64, 56, 56), IMAGES, EVERY),
    Shape("large ResNet conv4", (128, 256, 14, 14), IMAGES),
    Shape("large odd", (31, 97, 55, 57), IMAGES),
    Shape("tiny quick size", (4, 256), ROWS, SINGLE),
    Shape("tiny tabular", (64, 16), BATCH, SINGLE),
    Shape("tiny size", (2, 8, 8, 8), IMAGES, SINGLE, ("NCHW",)),
    Shape("size", (40, 256), ROWS, SINGLE),
    Shape("size", (2, 32, 13, 13), IMAGES, SINGLE, ("NCHW",)),
    Shape("size", (1024, 1024), ROWS, SINGLE),
    Shape("size", (16, 64, 32, 32), IMAGES, SINGLE, ("NCHW",)),
    Shape("huge size", (98304, 1024), ROWS, SINGLE),
    Shape("huge size", (128, 256, 56, 56), IMAGES, SINGLE, ("NCHW",)),
    Shape("model ResNet conv1", (32, 64, 112, 112), BATCH, MODELS),
    Shape("model ResNet conv5", (32, 2048, 7, 7), BATCH, MODELS),
    Shape("model U-Net diffusion", (2, 320, 64, 64), ("group_norm",), MODELS, groups=32),
    Shape("model ConvNeXt", (8, 96, 56, 56), ("layer_norm",), MODELS),
    Shape("model transformer BERT", (4096, 768), ("layer_norm",), MODELS),
    Shape("model transformer LLaMA", (2048, 4096), ("rms_norm",), MODELS),
    Shape("model transformer decoding", (8, 4096), ROWS, MODELS),
    Shape("model style transfer", (1, 32, 512, 512), ("instance_norm",), MODELS, ("NCHW",)),
    Shape("model tabular", (65536, 64), BATCH, MODELS),
    Shape("cliff short rows", (1 << 20, 8), ROWS, SINGLE),
    Shape("cliff long rows", (8, 1 << 20), ROWS, SINGLE),
    Shape("cliff even", (4096, 2048), ROWS, SINGLE),
    Shape("cliff odd", (4096, 2047), ROWS, SINGLE),
    Shape("cliff odd", (4096, 2049), ROWS, SINGLE),
    Shape("cliff even", (128, 512, 8, 8), IMAGES, SINGLE),
    Shape("cliff odd", (128, 512, 7, 7), IMAGES, SINGLE),
    Shape("gpu short rows", (1 << 20, 64), ROWS[:1], MODELS),
    Shape("gpu short rows", (1 << 18, 256), ROWS[:1], MODELS),
    Shape("gpu transformer size", (1 << 16, 1024), ROWS, MODELS),
    Shape("gpu transformer LLaMA", (16384, 4096), ("rms_norm",), MODELS),
    Shape("gpu transformer size", (1 << 13, 8192), ROWS[:1], MODELS),
    Shape("gpu long rows", (4096, 32768), ROWS[:1], MODELS),
    Shape("gpu long rows", (512, 131072), ROWS[:1], MODELS),
    Shape("gpu odd", (16384, 4097), ROWS[:1], MODELS),
    Shape("gpu odd", (65536, 1023), ROWS[:1], MODELS),
    Shape("gpu ResNet conv2 size", (256, 64, 56, 56), BATCH, MODELS),
    Shape("gpu ResNet odd", (2048, 512, 7, 7), BATCH[:1], MODELS),
    Shape("gpu style transfer size", (64, 64, 112, 112), ("instance_norm",), MODELS, ("NCHW",)),
    Shape("gpu U-Net size", (64, 256, 56, 56), ("group_norm",), MODELS, groups=32),
)


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    norm: str
    shape: tuple[int, ...]
    layout: str
    dtype: str
    direction: str
    groups: int = 1
    where: str = field(default="", compare=False)

    @cached_property
    def problem(self) -> str:
        """What the directions have in common."""
        return f"{self.norm} {self.dtype} {self.layout} {'x'.join(map(str, self.shape))}"

    @property
    def name(self) -> str:
        norm, rest = self.problem.split(" ", 1)
        return f"{norm} {self.direction} {rest}"

    @property
    def training(self) -> bool:
        return self.direction != "inference"

    @property
    def channels(self) -> int:
        """Elements of gamma and beta."""
        return self.shape[1]

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def wide(self) -> str:
        """The dtype of statistics."""
        return "float64" if self.dtype == "float64" else "float32"

    @property
    def running(self) -> bool:
        """Whether the norm keeps running statistics here (instance norm could)."""
        return self.norm in BATCH

    @property
    def bytes(self) -> int:
        """The least that must move: x in and y out, or dy and x in and dx out."""
        arrays = 3 if self.direction == "backward" else 2
        return arrays * np.dtype(self.dtype).itemsize * self.elements

    @property
    def options(self) -> dict[str, Any]:
        """normkit's, beside arrays."""
        if self.norm in ROWS:  # over the channels, as ConvNeXt does on images
            return {} if len(self.shape) == 2 else {"axis": 1}
        return {"num_groups": self.groups} if self.norm == "group_norm" else {}


def cases(device: str = "cpu") -> Iterator[Case]:
    """Every row for a device: "cpu", "gpu" (the largest first: its time is short), or "any"."""
    shapes = {
        "cpu": [s for s in SHAPES if "gpu" not in s.where],
        "gpu": [s for s in SHAPES if "gpu" in s.where]
        + [s for s in SHAPES if {"small", "large"} & set(s.where.split()) and "size" in s.where],
        "any": SHAPES,
    }[device]
    for s in shapes:
        groups = s.groups or next(g for g in (8, 5, 1) if s.shape[1] % g == 0)
        for norm in s.norms:
            for layout in s.layouts if len(s.shape) > 2 else ("NC",):
                for dtype in s.dtypes if device != "gpu" or "gpu" in s.where else SINGLE:
                    for direction in DIRECTIONS:
                        yield Case(norm, s.shape, layout, dtype, direction, groups, s.where)


def select(table: Iterator[Case], words: str, quick: bool = False) -> list[Case]:
    """Rows whose name or place has every word of one of the alternatives between commas.

    With `quick`, few of them.
    """
    choices = [choice.split() for choice in words.split(",") if choice.strip()] or [[]]
    rows = [
        c
        for c in table
        if any(all(word in f"{c.name} {c.where}" for word in choice) for choice in choices)
    ]
    if quick:
        rows = [c for c in rows if "quick" in c.where and c.layout != "NHWC"]
        rows = [c for c in rows if c.dtype == "float32"]
    return rows


def inputs(case: Case, xp: Any = np) -> dict[str, Array]:
    """Fresh random arrays of library `xp`, laid out and typed as the case says."""
    rng = xp.random.default_rng()
    shape = case.shape if case.layout != "NHWC" else (case.shape[0], *case.shape[2:], case.channels)

    def normal(shape: tuple[int, ...], mean: float, std: float, dtype: str) -> Array:
        values = rng.standard_normal(shape, dtype=case.wide)
        values *= std
        values += mean
        return values.astype(dtype, copy=False)

    made = {
        "x": normal(shape, 1, 2, case.dtype),
        "dy": normal(shape, 0, 1, case.dtype),
    }
    if case.layout == "NHWC":
        made = {name: xp.moveaxis(array, -1, 1) for name, array in made.items()}
    dtype = case.wide if case.running else case.dtype  # PyTorch's batch norm wants its statistics'
    for name, mean in (("gamma", 1), ("beta", 0)):
        made[name] = normal((case.channels,), mean, 0.25, dtype)
    if case.running:
        made["mean"] = normal((case.channels,), 1, 0.25, case.wide)
        made["spread"] = abs(normal((case.channels,), 2, 0.25, case.wide))
    return made


def function(case: Case, given: dict[str, Array], **more: Any) -> Any:
    """A function without arguments that computes the case by normkit.

    Running statistics are copies: every training call moves them.
    """
    norm = getattr(nk, case.norm)
    args = given["x"], given["gamma"], given["beta"]
    options = case.options | more
    if case.running:
        spread = "running_var" if case.norm == "batch_norm" else "running_std"
        options |= {"running_mean": given["mean"].copy(), spread: given["spread"].copy()}
        if not case.training:
            options["training"] = False
    if case.direction == "inference":
        return lambda: norm(*args, **options)
    if case.direction == "forward":
        return lambda: nk.vjp(norm, *args, **options)[0]
    _, pullback = nk.vjp(norm, *args, **options)
    dy = given["dy"]
    return lambda: pullback(dy)


def reference(case: Case, given: dict[str, Array]) -> tuple[Array, ...]:
    """The exact result, or nearly: by the reference backend, everything in float64."""
    wide = {name: array.astype("float64") for name, array in given.items()}
    with nk.use_backend("reference"):
        result = function(case, wide)()
    return tuple(result) if isinstance(result, tuple) else (result,)
