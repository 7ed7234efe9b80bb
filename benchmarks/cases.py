"""What is timed: one table of shapes, times norm, layout, dtype and direction."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

DIRECTIONS = ("forward", "backward", "inference")
DTYPES = ("float32", "float16", "bfloat16")

#: rows of (batch, ..., features) for layer and RMS norm; NCHW images for the others
ROWS = {"small": ((392, 256), (98, 1023)), "large": ((8192, 1024), (9973, 1023))}
IMAGES = {
    "small": ((8, 32, 20, 20), (31, 65, 7, 7)),
    "large": ((32, 64, 56, 56), (128, 256, 14, 14), (31, 97, 55, 57)),
}
NORMS = {
    "batch": IMAGES,
    "batch_renorm": IMAGES,
    "layer": ROWS,
    "instance": IMAGES,
    "group": IMAGES,
    "rms": ROWS,
}


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    norm: str
    shape: tuple[int, ...]
    channels_last: bool
    dtype: str
    direction: str
    size: str

    @property
    def name(self) -> str:
        layout = "rows" if len(self.shape) == 2 else "NHWC" if self.channels_last else "NCHW"
        shape = "x".join(map(str, self.shape))
        return f"{self.norm} {self.direction} {self.dtype} {layout} {shape}"

    @property
    def params(self) -> int:
        """Elements of gamma and beta: the channels of an image, the features of a row."""
        return self.shape[1]

    @property
    def param_dtype(self) -> str:
        """Of gamma and beta; PyTorch's batch norm wants that of its statistics."""
        return "float32" if self.norm.startswith("batch") else self.dtype

    @property
    def options(self) -> dict[str, int]:
        """What `normalize` needs beside arrays."""
        groups = next(g for g in (8, 5, 1) if self.params % g == 0)
        return {"num_groups": groups} if self.norm == "group" else {}

    def bytes(self) -> int:
        """The least that must move: x in and y out, or dy and x in and dx out."""
        arrays = 3 if self.direction == "backward" else 2
        size = 4 if self.dtype == "float32" else 2
        return arrays * size * int(np.prod(self.shape))


def cases() -> Iterator[Case]:
    """Every row, large ones last."""
    for size in ("small", "large"):
        for norm, shapes in NORMS.items():
            for shape in shapes[size]:
                for channels_last in (False, True)[: len(shape) // 2]:
                    for dtype in DTYPES:
                        for direction in DIRECTIONS:
                            yield Case(norm, shape, channels_last, dtype, direction, size)
