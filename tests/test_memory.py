"""Memory that a call takes beside its result and statistics."""

import tracemalloc

import numpy as np
import pytest

pytest.importorskip("rich", reason="the shapes are the benchmarks', which need rich")

from benchmarks.cases import Case, cases, function, inputs, select
from benchmarks.gpu import axes_of

LARGE = [
    case
    for case in select(cases(), "large, cliff")
    if case.direction != "backward" and case.dtype in ("float32", "bfloat16")
]


@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.name)
def test_a_large_forward_takes_no_memory_but_its_result_and_statistics(case: Case) -> None:
    given = inputs(case)
    run = function(case, given)
    run()  # compiles, and remembers the call
    tracemalloc.start()
    y = run()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    statistics = 4 * axes_of(case).groups * np.dtype("float64").itemsize
    assert peak <= 1.01 * y.nbytes + statistics
