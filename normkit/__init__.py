"""Normalization layers as plain functions on NumPy and CuPy arrays.

>>> import numpy as np, normkit as nk
>>> nk.layer_norm(np.array([[1.0, 3.0]], dtype="float32"), eps=0.0)
array([[-1.,  1.]], dtype=float32)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from normkit.call import Call, Grads, norm, vjp
from normkit.dispatch import use_backend
from normkit.moments import Moments
from normkit.norms import (
    batch_norm,
    batch_renorm,
    group_norm,
    instance_norm,
    layer_norm,
    normalize,
    rms_norm,
)
from normkit.renorm import RenormSchedule

if TYPE_CHECKING:
    from normkit import layers

__version__ = "0.1.0"

__all__ = [
    "Call",
    "Grads",
    "Moments",
    "RenormSchedule",
    "batch_norm",
    "batch_renorm",
    "group_norm",
    "instance_norm",
    "layer_norm",
    "layers",
    "norm",
    "normalize",
    "rms_norm",
    "use_backend",
    "vjp",
]


def __getattr__(name: str) -> Any:
    if name == "layers":  # on first use: its dataclasses cost more to make than all the rest
        return import_module("normkit.layers")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
