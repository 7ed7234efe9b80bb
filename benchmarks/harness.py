"""One run of the table, for any device: rows in, results out, written as they come."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable, Collection
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks import report
from benchmarks.cases import Case
from benchmarks.peers import PEERS, Make
from benchmarks.report import Results
from benchmarks.timing import Device, Pass, row_of, time_row

#: bytes an element that a check needs at most: the reference's, in the widest type
NEEDED = 160


def peers(device: str, names: Collection[str]) -> tuple[dict[str, Make], dict[str, str], list[str]]:
    """The peers that can be imported, of those asked for; their versions; why the others cannot."""
    makers, versions, absent = {}, {}, []
    for peer in PEERS:
        if device not in peer.devices or peer.name not in names:
            continue
        try:
            makers[peer.name] = peer.load()
            versions[peer.name] = peer.version
        except ImportError as error:
            absent.append(f"{peer.name}: {error}")
    return makers, versions, absent


def begin(device: Device, versions: dict[str, str], skipped: list[str]) -> Results:
    """Results without rows."""
    ours = ", ".join(f"{name} {version(name)}" for name in ("numpy", "numba"))
    return {
        "device": device.name,
        "machine": device.machine() | {"python": platform.python_version()},
        "when": datetime.now(UTC).isoformat(timespec="minutes"),
        "versions": {"normkit": f"with {ours}"} | versions,
        "skipped": skipped,
        "failed": [],
        "rows": [],
    }


def run(
    table: list[Case],
    device: Device,
    makers: dict[str, Make],
    rounds: int,
    results: Results,
    prefix: Path | None = None,
    passes: int = 1,
    time_is_up: Callable[[], bool] = lambda: False,
) -> None:
    """Time every case into `results`, replacing earlier rows, saved to a prefix.

    Every pass is over the whole table: its samples are of other minutes and places of memory.
    """
    results |= {"rounds": rounds, "passes": passes}
    rows = {row["case"]: row for row in results["rows"]}
    taken: dict[str, list[Pass]] = {}
    turns = [case for case in table if _fits(case, device, results)] * passes
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    progress = Progress(*columns, TimeRemainingColumn(), console=report.console(), transient=True)
    with progress:
        task = progress.add_task("", total=len(turns))
        for done, case in enumerate(turns):
            if time_is_up():
                who = ", ".join(makers)
                rest = f"{len(turns) - done} rows from {case.name} on, beside {who}"
                results["skipped"].append(f"{rest}: no time left")
                break
            progress.update(task, description=case.name, completed=done)
            try:
                found = time_row(case, device, makers, rounds)
            except Exception as error:  # the next row may do better; this one is reported
                results["failed"].append(f"{case.name}: {type(error).__name__}: {error}")
                continue
            finally:
                device.release()
            taken.setdefault(case.name, []).append(found)
            rows[case.name] = row = row_of(case, makers, taken[case.name])
            results["rows"][:] = rows.values()
            if not progress.console.is_terminal:
                print(f"{done + 1}/{len(turns)} {report.line(row)}", file=sys.stderr, flush=True)
            if prefix:
                report.write(Path(f"{prefix}.json"), results)
    if prefix:
        report.write(Path(f"{prefix}.json"), results)


def conclude(results: Results, prefix: Path | None, compare: Path | None = None) -> int:
    """Show and write everything; the exit status."""
    report.show(results)
    if compare:
        report.console().print(report.comparison(report.read(compare), results))
    if prefix:
        Path(f"{prefix}.md").write_text(report.markdown(results))
        if find_spec("matplotlib"):
            from benchmarks import plots

            print(*plots.draw([results], prefix), sep="\n")
        else:
            print("no matplotlib: no pictures")
    return int(bool(results["failed"]))


def _fits(case: Case, device: Device, results: Results) -> bool:
    """Whether there is memory for a case; if not, that is noted."""
    needed = NEEDED * case.elements
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    fits = device.name != "cpu" or needed <= memory
    if not fits:
        results["skipped"].append(f"{case.name}: needs {needed >> 30} GB of memory")
    return fits
