"""What is said of results: the table, its summary, and the comparison with older ones."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import rich.box
from rich.console import Console
from rich.table import Table

from benchmarks.peers import PEERS
from benchmarks.timing import OURS, OUT, Row

Results = dict[str, Any]  #: of one run: machine, versions, rows, skipped

#: what two runs may differ by, whatever their spread
NOISE = 0.05


def console() -> Console:
    """The terminal; wide enough for every column where there is none."""
    found = Console()
    return found if found.is_terminal else Console(width=200)


def read(path: Path) -> Results:
    found: Results = json.loads(path.read_text())
    return found


def write(path: Path, results: Results) -> None:
    """A line a row; all at once, so that a run which is cut short leaves a whole file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    rows = ",\n".join(json.dumps(row) for row in results["rows"])
    rest = json.dumps(results | {"rows": []}, indent=1)
    part.write_text(rest.replace('"rows": []', f'"rows": [\n{rows}\n]') + "\n")
    part.replace(path)


def peers(rows: Iterable[Row]) -> list[str]:
    """The peers that were timed in any of the rows."""
    timed = {who for row in rows for who in row["ratio"]}
    return [peer.name for peer in PEERS if peer.name in timed]


def speedup(row: Row, who: str) -> float | None:
    """How many times as long a peer takes, the median of rounds; "best" is the fastest of them."""
    ratios: dict[str, float] = row["ratio"]
    return min(ratios.values(), default=None) if who == "best" else ratios.get(who)


def ceiling(row: Row) -> float:
    """Microseconds of the faster copy of as many bytes."""
    return min(us for who, us in row["us"].items() if who.startswith("copy"))


def gigabytes(row: Row, us: float) -> float:
    """GB/s on the least bytes that the row must move."""
    return float(row["bytes"] / us / 1e3)


def line(row: Row) -> str:
    """A row in short."""
    us = row["us"][OURS]
    best = speedup(row, "best")
    beside = f", best peer {best:.2f} times that" if best else ""
    return f"{row['case']}: {us:.1f} µs, {100 * ceiling(row) / us:.0f} % of a copy{beside}"


def hardware(results: Results) -> str:
    """What the figures were measured on."""
    machine = results["machine"]
    threads = f", {machine['threads']} threads" if "threads" in machine else ""
    return f"{machine['hardware']}{threads}"


def table(results: Results) -> Table:
    """Every row: how fast, how close to a copy, how many times as fast as each peer, how exact."""
    rows = results["rows"]
    who = peers(rows)
    found = Table(
        title=f"{hardware(results)}, allocator: {results['machine']['allocator']}",
        caption="peers: their time over normkit's (▼: normkit is slower), ±%, and their error; "
        "errors are the largest over the largest value, against float64",
        box=rich.box.SIMPLE_HEAD,
    )
    found.add_column("case", overflow="fold")
    for heading in ("µs", "±%", "GB/s", "% of copy", "out= µs", "error", *who):
        found.add_column(heading, justify="right")
    for row in rows:
        us = row["us"]
        cells = [row["case"], f"{us[OURS]:.1f}", f"{100 * row['spread'][OURS]:.0f}"]
        cells += [f"{gigabytes(row, us[OURS]):.1f}", f"{100 * ceiling(row) / us[OURS]:.0f}"]
        cells += [f"{us[OUT]:.1f}" if OUT in us else "", f"{row['error'][OURS]:.0e}"]
        found.add_row(*cells, *(_peer(row, name) for name in who))
    return found


def _peer(row: Row, who: str) -> str:
    ratio = speedup(row, who)
    if ratio is None:
        return "wrong" if row["absent"].get(who, "").startswith("wrong") else ""
    shown = f"[red]▼ {ratio:.2f}[/]" if ratio < 1 else f"[green]{ratio:.2f}[/]"
    return f"{shown} ±{100 * row['ratio spread'][who]:.0f} [dim]{row['error'][who]:.0e}[/]"


def summary(results: Results) -> Table:
    """Geometric means over the rows of one size, dtype and direction, losses counted."""
    rows = results["rows"]
    who = [*peers(rows), "best"]
    found = Table(
        title="time of each peer over normkit's: geometric mean, least, (rows that normkit loses)",
        box=rich.box.SIMPLE_HEAD,
    )
    for heading in ("size", "dtype", "direction", "rows", *who, "% of copy"):
        found.add_column(heading, justify="right" if heading in ("rows", *who) else "left")
    for key, group in _grouped(rows, lambda row: (row["where"].split()[0], row["dtype"])):
        for direction, some in _grouped(group, lambda row: (row["direction"],)):
            cells = [*key, *direction, str(len(some))]
            for name in who:
                ratios = [ratio for row in some if (ratio := speedup(row, name)) is not None]
                cells.append(_mean(ratios) if ratios else "")
            share = geometric_mean([ceiling(row) / row["us"][OURS] for row in some])
            found.add_row(*cells, f"{100 * share:.0f}")
    return found


def _mean(ratios: list[float]) -> str:
    return f"{geometric_mean(ratios):.2f}  {min(ratios):.2f} ({sum(r < 1 for r in ratios)})"


def _grouped(
    rows: Iterable[Row], key: Callable[[Row], tuple[str, ...]]
) -> Iterator[tuple[tuple[str, ...], list[Row]]]:
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return iter(groups.items())


def worst(results: Results, count: int = 5) -> list[str]:
    """The rows that lose most to the best of the peers."""
    best = [
        min((ratio, row["ratio spread"][who], who, row["case"]) for who, ratio in found.items())
        for row in results["rows"]
        if (found := row["ratio"])
    ]
    lost = sorted(one for one in best if one[0] < 1)[:count]
    return [
        f"{ratio:.2f} ±{100 * spread:.0f} %, {who}: {name}" for ratio, spread, who, name in lost
    ]


def compare(old: Results, new: Results) -> Iterator[tuple[float, Row]]:
    """(new time over old, row) of all rows in both whose times differ by more than their spread."""
    before = {row["case"]: row for row in old["rows"]}
    for row in new["rows"]:
        if then := before.get(row["case"]):
            ratio = row["us"][OURS] / then["us"][OURS]
            blur = math.hypot(row["spread"][OURS], then["spread"][OURS])
            if not 1 / (1 + max(NOISE, blur)) <= ratio <= 1 + max(NOISE, blur):
                yield ratio, row


def comparison(old: Results, new: Results) -> Table:
    """What became slower, worst first, then what became faster."""
    before = {row["case"]: row for row in old["rows"]}
    both = [row for row in new["rows"] if row["case"] in before]
    changed = sorted(compare(old, new), key=lambda pair: -pair[0])
    slower = sum(ratio > 1 for ratio, _ in changed)
    found = Table(
        title=f"{len(both)} rows in both: {slower} slower, {len(changed) - slower} faster, "
        "beyond their spread",
        box=rich.box.SIMPLE_HEAD,
    )
    found.add_column("case", overflow="fold")
    for heading in ("µs before", "now", "now/before", "the copy's"):
        found.add_column(heading, justify="right")
    for ratio, row in changed:
        then = before[row["case"]]
        colour = "red" if ratio > 1 else "green"
        found.add_row(
            row["case"],
            f"{then['us'][OURS]:.1f}",
            f"{row['us'][OURS]:.1f}",
            f"[{colour}]{ratio:.2f}[/]",
            f"{ceiling(row) / ceiling(then):.2f}",
        )
    return found


def absences(results: Results) -> list[str]:
    """Who did not take part, and why, each reason once."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in results["rows"]:
        for who, reason in row["absent"].items():
            reasons.setdefault((who, reason), []).append(row["case"])
    lines = [
        f"{who}, {len(names)} rows ({names[0]}{', ...' if len(names) > 1 else ''}): {reason}"
        for (who, reason), names in reasons.items()
    ]
    return [*results["skipped"], *lines]


def markdown(results: Results) -> str:
    """The summary and the table, for a file."""
    page = io.StringIO()
    out = Console(file=page, width=400)
    for made in (summary(results), table(results)):
        title, made.title, made.caption, made.box = made.title, None, None, rich.box.MARKDOWN
        page.write(f"{title}\n")
        out.print(made)
        page.write("\n")
    lines = [f"{who}: {what}" for who, what in results["versions"].items()]
    if "passes" in results:
        lines.append(f"samples of a row: {results['passes']} passes of {results['rounds']} rounds")
    lines += [*first_use(results), *results.get("checks", [])]
    lines += [f"failed: {what}" for what in results["failed"]]
    lines += [f"not timed: {what}" for what in absences(results)]
    found = [*page.getvalue().splitlines(), *(f"- {text}" for text in lines)]
    return "".join(f"{text.rstrip()}\n" for text in found)


def first_use(results: Results) -> list[str]:
    """Seconds of fresh interpreters."""
    found = results.get("first use", {})
    return [f"{seconds:.2f} s from the start of: {name}" for name, seconds in found.items()]


def show(results: Results) -> None:
    """Print everything."""
    out = console()
    if results["rows"]:
        out.print(table(results), summary(results))
    for who, version in results["versions"].items():
        out.print(f"{who}: {version}", highlight=False)
    if lost := worst(results):
        out.print("slowest beside the best peer:", *lost, sep="\n  ", highlight=False)
    for title, lines in (
        ("first use", first_use(results)),
        ("not timed", absences(results)),
        ("FAILED", results["failed"]),
    ):
        if lines:
            out.print(f"{title}:", *lines, sep="\n  ", highlight=False, markup=False)
