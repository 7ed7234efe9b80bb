"""Normalization layers as plain functions on NumPy and CuPy arrays.

>>> import numpy as np, normkit as nk
>>> nk.layer_norm(np.array([[1.0, 3.0]], dtype="float32"), eps=0.0)
array([[-1.,  1.]], dtype=float32)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from normkit.call import Call, Grads, norm, vjp
from normkit.dispatch import backends, register_backend, use_backend
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
    from normkit.ahead import warmup
    from normkit.explanation import explain

__version__ = "0.1.0"

__all__ = [
    "Call",
    "Grads",
    "Moments",
    "RenormSchedule",
    "backends",
    "batch_norm",
    "batch_renorm",
    "explain",
    "group_norm",
    "instance_norm",
    "layer_norm",
    "layers",
    "norm",
    "normalize",
    "register_backend",
    "rms_norm",
    "use_backend",
    "vjp",
    "warmup",
]


#: Found on first use, as their dataclasses cost more to make than all the rest: name -> module
_ON_USE = {"explain": "explanation", "warmup": "ahead"}


def __getattr__(name: str) -> Any:
    if name == "layers":
        return import_module("normkit.layers")
    if name in _ON_USE:
        return getattr(import_module(f"normkit.{_ON_USE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
