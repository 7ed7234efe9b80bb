"""Normalization layers as plain functions on NumPy and CuPy arrays.

>>> import numpy as np, normkit as nk
>>> nk.layer_norm(np.array([[1.0, 3.0]], dtype="float32"), eps=0.0)
array([[-1.,  1.]], dtype=float32)
"""

from normkit.call import Call, Grads, norm, vjp
from normkit.dispatch import use_backend
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

__version__ = "0.1.0"

__all__ = [
    "Call",
    "Grads",
    "RenormSchedule",
    "batch_norm",
    "batch_renorm",
    "group_norm",
    "instance_norm",
    "layer_norm",
    "norm",
    "normalize",
    "rms_norm",
    "use_backend",
    "vjp",
]
