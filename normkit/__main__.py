"""What normkit finds here (``python -m normkit``), whether it is right, and compiling ahead."""

from __future__ import annotations

import argparse
import platform
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np

import normkit as nk
from normkit.call import ARITHMETIC
from normkit.dispatch import load
from normkit.explanation import in_bytes, table
from normkit.testing import Result, conformance


def show(done: int, total: int, name: str) -> None:
    """A progress bar, where somebody is there to see it."""
    if not sys.stderr.isatty():
        return
    width = shutil.get_terminal_size().columns - 1
    bar = "#" * (30 * done // max(1, total))
    line = f"[{bar:<30}] {done}/{total} {name}"
    print("\r" + line[:width].ljust(width), end="" if done < total else "\n", file=sys.stderr)


def facts() -> Iterator[str]:
    """Versions, backends, why one is unavailable, where compiled kernels are kept."""
    yield f"normkit {nk.__version__}, Python {platform.python_version()}, NumPy {np.__version__}"
    rows = []
    for name, found in nk.backends().items():
        lines = ["available" if found.available else "not available"]
        lines += wrap(found.reason, 80)
        if found.available:
            about = load(name).about()
            if "cache" in about:
                about["cache"] += f", {in_bytes(_size(Path(about['cache'])))}"
            lines += [f"{fact}: {value}" for fact, value in about.items() if fact != "version"]
        rows.append((name, found.version or "-", lines[0]))
        rows += [("", "", line) for line in lines[1:]]
    yield from table(rows)


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _namespace(library: str) -> Any:
    """What makes arrays of a library, in the standard's way where that is not its own."""
    compatible = f"array_api_compat.{library}"
    known = find_spec("array_api_compat") and library not in ("numpy", "cupy")
    return import_module(compatible if known and find_spec(compatible) else library)


def errors(results: Sequence[Result]) -> list[str]:
    """The largest errors by norm and dtype, a column for each mean of x."""
    largest: dict[tuple[str, str], dict[float, float]] = defaultdict(lambda: defaultdict(float))
    for result in results:
        of = largest[result.norm, result.dtype]
        of[result.offset] = max(of[result.offset], result.error)
    offsets = sorted({result.offset for result in results})
    head = ("norm", "dtype", *(f"mean {offset:g}" for offset in offsets))
    rows = [
        (*key, *(f"{of[offset]:.1e}" if offset in of else "-" for offset in offsets))
        for key, of in largest.items()
    ]
    return table([head, *rows])


def verify(names: Sequence[str], dtypes: Sequence[str]) -> int:
    """Check backends against the reference; the number of failures."""
    failures = 0
    for name in names or [name for name, found in nk.backends().items() if found.available]:
        backend = load(name)
        xp = _namespace(backend.arrays[0])
        checks = conformance(xp, dtypes or None)
        results: list[Result] = []
        for check in checks:
            show(len(results), len(checks), f"{name}: {check}")
            results.append(check.run(backend, xp))
        show(len(results), len(checks), name)
        problems = [result.problem for result in results if result.problem]
        failures += len(problems)
        said = f"{len(problems)} FAILED" if problems else "all passed"
        print(f"\n{name}: {len(results)} checks on {backend.arrays[0]} arrays, {said}")
        print("Largest errors, relative to the largest value:")
        print(*errors(results), *problems, sep="\n")
    return failures


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; its exit status."""
    parser = argparse.ArgumentParser(prog="python -m normkit", description=__doc__)
    commands = parser.add_subparsers(dest="command")
    for command, does in (
        ("verify", "check every available backend against the reference; status 1 if one is wrong"),
        ("warmup", "compile ahead what calls may need"),
    ):
        added = commands.add_parser(command, help=does, description=does)
        added.add_argument("--backend", action="append", help="this one only; may be repeated")
        added.add_argument("--dtype", action="append", choices=ARITHMETIC, help="likewise")
    given = parser.parse_args(arguments)
    if given.command == "verify":
        return int(verify(given.backend or (), given.dtype or ()) > 0)
    if given.command == "warmup":
        for backend in given.backend or [None]:
            nk.warmup(given.dtype or tuple(ARITHMETIC), backend=backend, progress=show)
        return 0
    print(*facts(), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
