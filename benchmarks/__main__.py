"""Time normkit beside its peers on the CPU: ``python -m benchmarks``.

Everyone runs in one process, in turns, on the same number of threads, and under allocator settings
that keep glibc from giving every large result fresh pages (page faults would otherwise be most of
what is timed; ``--allocator default`` shows that too). Results are checked before they are timed.
"""

from __future__ import annotations

import argparse
import os
import sys
from importlib.util import find_spec
from pathlib import Path

TUNABLES = "glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=8589934592"
#: what --quick leaves out: it compiles for seconds a row
SLOW = ("torch.compile",)


def processors() -> int:
    """How many this process may use; macOS cannot tell."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--filter", default="", help="words of a row's name or place; alternatives after a comma"
    )
    parser.add_argument("--quick", action="store_true", help="few rows and rounds: a minute")
    parser.add_argument(
        "--rounds", type=int, help="of everyone in turns, in each pass (7; quick: 3)"
    )
    parser.add_argument(
        "--passes", type=int, default=1, help="over all rows, each in other memory (1)"
    )
    parser.add_argument("--peers", help="only these, comma-separated; an empty word for none")
    parser.add_argument("--threads", type=int, default=processors(), help="of everyone (all)")
    parser.add_argument("--allocator", choices=("tuned", "default"), default="tuned")
    parser.add_argument("--out", type=Path, help="write PREFIX.json and plots", metavar="PREFIX")
    parser.add_argument("--compare", type=Path, help="show what is slower than in OLD.json")
    parser.add_argument("--show", type=Path, help="time nothing: show these results instead")
    parser.add_argument("--list", action="store_true", help="list the rows and the peers")
    parser.add_argument("--first-use", action="store_true", help="time fresh interpreters only")
    options = parser.parse_args()
    if options.rounds is not None and options.rounds < 2:
        parser.error(f"--rounds {options.rounds}: a spread takes at least 2")
    if options.passes < 1:
        parser.error(f"--passes {options.passes}: nothing would be timed")
    return options


def environment(options: argparse.Namespace) -> dict[str, str]:
    """What libraries read when they start, so that nobody has more threads than another."""
    names = "OMP_NUM_THREADS", "NUMBA_NUM_THREADS", "NPROC"  # the last is XLA's
    found = dict.fromkeys(names, str(options.threads)) | {"JAX_PLATFORMS": "cpu"}
    return found | {"GLIBC_TUNABLES": TUNABLES if options.allocator == "tuned" else ""}


def main() -> int:
    """Run the table and print it."""
    options = arguments()
    if find_spec("rich") is None:
        raise SystemExit('benchmarks need rich: pip install rich, or ".[bench]" for the peers too')
    wanted = environment(options)
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.environ |= wanted
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks", *sys.argv[1:]])

    from benchmarks import first_use, harness, report
    from benchmarks.cases import cases, select
    from benchmarks.peers import PEERS
    from benchmarks.timing import Cpu

    if options.show:
        return harness.conclude(report.read(options.show), options.out, options.compare)
    names = [peer.name for peer in PEERS if not (options.quick and peer.name in SLOW)]
    if options.peers is not None:
        names = [word.strip() for word in options.peers.split(",")]
    makers, versions, absent = harness.peers("cpu", names)
    table = select(cases("cpu"), options.filter, options.quick)
    if options.list:
        print(*(case.name for case in table), "", sep="\n")
        print(*(f"{who}: {version}" for who, version in versions.items()), *absent, sep="\n")
        return 0
    device = Cpu()
    results = harness.begin(device, versions, absent)
    if options.first_use or not (options.quick or options.filter):
        results["first use"] = first_use.measure()
    if not options.first_use:
        rounds = options.rounds or (3 if options.quick else 7)
        harness.run(table, device, makers, rounds, results, options.out, options.passes)
    return harness.conclude(results, options.out, options.compare)


if __name__ == "__main__":
    raise SystemExit(main())
