"""How long a fresh interpreter takes from its start to the first result of layer norm."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec

SETUP = 'import numpy; x = numpy.ones((32, 1024), "float32"); '
NORMKIT = "import normkit; normkit.layer_norm(x)"
PROGRAMS = {
    "import numpy": "",
    "import normkit": "import normkit",
    "normkit": NORMKIT,
    "torch": "import torch; torch.nn.functional.layer_norm(torch.from_numpy(x), (1024,))",
    "jax": "import jax; jax.jit(lambda x: jax.nn.standardize(x))(x).block_until_ready()",
}
TIMES = 5


def measure() -> dict[str, float]:
    """Median seconds of each program; "normkit, cold" is without compiled kernels on disk."""
    installed = {
        name: program
        for name, program in PROGRAMS.items()
        if name not in ("torch", "jax") or find_spec(name)
    }
    for program in installed.values():  # disk caches, the system's too
        _seconds(program)
    samples: dict[str, list[float]] = {name: [] for name in installed}
    for _ in range(TIMES):
        for name, program in installed.items():
            samples[name].append(_seconds(program))
    found = {name: round(statistics.median(taken), 3) for name, taken in samples.items()}
    with tempfile.TemporaryDirectory() as empty:
        return found | {"normkit, cold": round(_seconds(NORMKIT, NUMBA_CACHE_DIR=empty), 3)}


def _seconds(program: str, **environment: str) -> float:
    begin = time.perf_counter()
    command = [sys.executable, "-c", SETUP + program]
    subprocess.run(command, env=os.environ | environment, check=True)
    return time.perf_counter() - begin
