"""What is known of the CUDA backend without a GPU: ``python tests/cuda_report.py``.

How representative calls are launched, which planted bugs the emulation catches, and which kernels
the tests reach, by regime, direction and dtype.
"""

from collections import Counter, defaultdict

import numpy as np
import test_cuda_backend as backend
from cuda_host import HostDevice, KernelFault
from test_cuda_host import BUGS, DIFFER, ORDERS, results

import normkit as nk
from normkit.axes import Axes
from normkit.backends.cuda import planner
from normkit.backends.cuda.planner import Program

LAST = {"channel_axis": -1}
REPRESENTATIVE = [
    (backend.Call(nk.layer_norm, (65536, 1024)), "bfloat16"),
    (backend.Call(nk.rms_norm, (16384, 4096)), "bfloat16"),
    (backend.Call(nk.layer_norm, (512, 131072)), "float32"),
    (backend.Call(nk.layer_norm, (1 << 20, 64)), "float32"),
    (backend.Call(nk.batch_norm, (256, 64, 56, 56)), "bfloat16"),
    (backend.Call(nk.batch_norm, (256, 56, 56, 64), LAST), "bfloat16"),
    (backend.Call(nk.batch_norm, (32, 64, 14, 14)), "float32"),
    (backend.Call(nk.instance_norm, (64, 64, 112, 112)), "bfloat16"),
    (backend.Call(nk.group_norm, (64, 256, 56, 56), {"num_groups": 32}), "bfloat16"),
    (backend.Call(nk.group_norm, (64, 56, 56, 256), LAST | {"num_groups": 32}), "bfloat16"),
]
MODES = "FIXED", "ALONG", "EACH", "ANY"
STAGES = {
    "1": "sums",
    "2": "apply",
    "3": "both",
    "5": "crossed",
    "11": "both, parameters",
    "19": "both, in a wave",
}


def plans() -> None:
    print("Plans on an H200 (132 multiprocessors), or with waves: each line a launch\n")
    for call, dtype in REPRESENTATIVE:
        axes = geometry(call)
        print(f"{call!r} {dtype}, axes {tuple(axes)}")
        for limits in (backend.H200, backend.H200._replace(waves=True)):
            forward = planner.forward(axes, dtype, dtype, dtype, True, 1e-5, True, True, limits)
            backward = planner.gradients(axes, dtype, dtype, dtype, True, True, False, limits)
            for direction, program in (("forward", forward), ("backward", backward)):
                if not limits.waves:
                    show(direction, program)
                elif any(launch.cooperative for launch in program.launches):
                    show(f"{direction}, or", program)


def geometry(call: backend.Call) -> Axes:
    with nk.use_backend("reference"):  # which looks at the shape alone here
        x = np.empty(call.shape, np.float32)
        axes: Axes = call.norm.declare(x, **call.options).plan.layout.axes
    return axes


def show(direction: str, program: Program) -> None:
    for launch in program.launches:
        shared = f", {launch.shared} B shared" if launch.shared else ""
        grid = f"{launch.grid[0]:7} x {launch.threads:4}"
        print(f"  {direction:12} {grid}{shared:17} {launch.kernel}")


def bugs() -> None:
    print("\nPlanted bugs: what the emulation says of them, in every order of threads and blocks\n")
    caught: Counter[str] = Counter()
    for bug in BUGS:
        found = set()
        for order in ORDERS:
            try:
                results(bug, True, HostDevice(check=True, **order))
            except KernelFault as fault:
                found.add(fault.kind)
        if bug.kind == DIFFER:
            outputs = {y for o in ORDERS for y in results(bug, True, HostDevice(check=True, **o))}
            found = {DIFFER} if len(outputs) > 1 else set()
        caught["caught" if found else "missed"] += 1
        print(f"  {bug.name:58} {', '.join(sorted(found)) or 'MISSED'}")
    print(f"\n  {caught['caught']} of {caught.total()} caught")


def coverage() -> None:
    print("\nKernels that the tests run, by regime, direction and dtype of x\n")
    table: dict[str, Counter[str]] = defaultdict(Counter)
    for launched in backend.reached():
        kind = backend.regime(launched)
        if len(kind) == 1:
            table[kind[0].removeprefix("nk::")]["all"] += 1
            continue
        direction, walk, vector, mode, wide, stage = kind
        team = {"Columns": "", "Runs": ""}.get(walk, "block" if wide == "1" else "warp")
        regime = f"{walk} {team} {'' if vector == 'vector' else vector}".strip()
        row = f"{direction:9} {regime:16} {MODES[int(mode)]:6} {STAGES[stage]}"
        dtype = next(d for d, c in planner.CTYPE.items() if launched.split("<")[1].startswith(c))
        table[row][dtype] += 1
    columns = [*planner.CTYPE, "all"]
    print(f"  {'':50}" + "".join(f"{name:>10}" for name in columns))
    for row, counts in sorted(table.items()):
        print(f"  {row:50}" + "".join(f"{counts[name] or '':>10}" for name in columns))


if __name__ == "__main__":
    plans()
    bugs()
    coverage()
