"""Choose and write golden.npz: ``NORMKIT_ORACLES=folder python tests/make_golden.py``.

Of each norm x dtype x source x training, and of each norm x tag, the smallest case that has at
least 24 elements (if there is one); and every error case.
"""

import json
import math
from collections.abc import Iterable

import numpy as np
import oracles
from oracles import Arrays, Case

LARGEST = 24_000  # bytes of one case


def stored(case: Case) -> Arrays:
    return case.inputs | case.outputs | case.native_outputs


def representative(cases: Iterable[Case]) -> list[Case]:
    def size(case: Case) -> int:
        return sum(a.nbytes for a in stored(case).values())

    small = [c for c in cases if size(c) <= LARGEST and "generate" not in c.params]
    chosen: dict[tuple[object, ...], Case] = {}
    for case in sorted(small, key=lambda c: (math.prod(c.shape) < 24, size(c), c.name)):
        keys = [(case.op, case.dtype, case.source, case.training)]
        keys += [(case.op, tag) for tag in case.tags]
        keys += [(case.name,)] if case.raises else []
        for key in keys:
            chosen.setdefault(key, case)
    return sorted({c.name: c for c in chosen.values()}.values(), key=lambda c: c.name)


def write(cases: list[Case]) -> None:
    buffers: dict[str, bytearray] = {}
    places: dict[tuple[str, bytes], int] = {}

    def place(a: np.ndarray) -> list[object]:
        """Append the values to the buffer of their dtype, once, as float32 where that is exact."""
        with np.errstate(over="ignore"):
            single = a.astype(np.float32)
        exact = a.dtype == np.float64 and np.array_equal(single, a, equal_nan=True)
        values = single if exact else a
        code, data = values.dtype.str[1:], values.tobytes()
        buffer = buffers.setdefault(code, bytearray())
        if (code, data) not in places:
            places[code, data] = len(buffer) // values.itemsize
            buffer += data
        return [code, places[code, data], list(a.shape), *(["f8"] if exact else [])]

    index = []
    for case in cases:
        entry = vars(case) | {
            "outputs": {k: v for k, v in case.outputs.items() if not k.startswith("save_")}
        }
        entry["tolerances"] = {k: case.tolerances[k] for k in entry["outputs"]}
        for field in "inputs", "outputs", "native_outputs":
            entry[field] = {name: place(a) for name, a in entry[field].items()}
        index.append(entry)
    np.savez_compressed(
        oracles.GOLDEN,
        index=np.frombuffer(json.dumps(index).encode(), np.uint8),
        **{f"buf_{code}": np.frombuffer(data, code) for code, data in buffers.items()},
    )


if __name__ == "__main__":
    write(representative(case for case in oracles.load() if not oracles.skip_reason(case)))
