"""Who is timed beside normkit: each peer turns a case and its arrays into a function to call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple

from benchmarks.cases import Array, Case


class Contestant(NamedTuple):
    """What is timed, and how its result is read as arrays of the inputs' library and axes."""

    run: Callable[[], Any]
    arrays: Callable[[Any], tuple[Array, ...]]


class Unsupported(Exception):
    """The peer has no such operation; says why in a few words."""


Make = Callable[[Case, dict[str, Array]], Contestant]


@dataclass(frozen=True)
class Peer:
    """A library that may be installed."""

    name: str
    make: str  #: module and function in this package
    packages: tuple[str, ...]  #: whose versions matter
    devices: tuple[str, ...]

    def load(self) -> Make:
        """ImportError if the library is absent."""
        module, make = self.make.split(".")
        found: Make = getattr(import_module(f"{__name__}.{module}"), make)
        return found

    @property
    def version(self) -> str:
        return ", ".join(f"{name} {import_module(name).__version__}" for name in self.packages)


PEERS = (
    Peer("NumPy", "expression.contestant", ("numpy",), ("cpu",)),
    Peer("CuPy", "expression.contestant", ("cupy",), ("gpu",)),
    Peer("PyTorch", "pytorch.eager", ("torch",), ("cpu", "gpu")),
    Peer("torch.compile", "pytorch.compiled", ("torch",), ("cpu", "gpu")),
    Peer("JAX", "jax.contestant", ("jax", "jaxlib"), ("cpu",)),  # its streams hide from CUDA events
    Peer("ONNX Runtime", "onnxruntime.contestant", ("onnxruntime",), ("cpu",)),
)


def plain(result: Any) -> tuple[Array, ...]:
    """An array, or several, as a tuple of arrays."""
    return tuple(result) if isinstance(result, tuple) else (result,)
