"""Pictures of results: ``python -m benchmarks.plots PREFIX RESULTS.json [MORE.json]``.

Speed by size for each norm, beside a copy; speed-up over each peer, row by row. Given results of a
CPU and of a GPU, both stand in one picture.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from benchmarks.cases import DIRECTIONS, NORMS
from benchmarks.report import Results, ceiling, gigabytes, hardware, peers, read, speedup
from benchmarks.timing import OURS, Row

#: colours that the colour-blind can tell apart
COLOURS = dict(zip(DIRECTIONS, ("#0072b2", "#d55e00", "#009e73"), strict=True))
PEER, COPY = "#999999", "black"
MARKS = {"cpu": "o", "gpu": "^"}
STYLE: dict[str, Any] = {
    "font.size": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
    "axes.grid": True,
    "grid.color": "#e5e5e5",
    "axes.axisbelow": True,
    "legend.frameon": False,
}
WIDTH, DPI = 8.6, 150
LEAST = 10_000  #: elements of rows that are compared; below, a call's own cost is most of it
PLAIN = FuncFormatter(lambda value, _: f"{value:g}")


def draw(runs: list[Results], prefix: Path) -> list[Path]:
    """Write every picture that the results are enough for; their paths."""
    made = []
    with rc_context(STYLE):
        for name, figure in _figures(runs):
            path = Path(f"{prefix}-{name}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=DPI)
            made.append(path)
    return made


def _figures(runs: list[Results]) -> Iterator[tuple[str, Figure]]:
    if any(len(_curve(run["rows"], norm, "forward")) > 1 for run in runs for norm in NORMS):
        yield "sizes", by_size(runs)
    for run in runs:
        if peers(run["rows"]):
            yield "peers" if len(runs) == 1 else f"{run['device']}-peers", by_peer(run)


def _curve(rows: list[Row], norm: str, direction: str) -> list[Row]:
    """One float32 row a size, ascending."""
    found = {
        row["elements"]: row
        for row in rows
        if (row["norm"], row["direction"], row["dtype"]) == (norm, direction, "float32")
        and "size" in row["where"].split()
        and row["layout"] != "NHWC"
    }
    return [found[elements] for elements in sorted(found)]


def by_size(runs: list[Results]) -> Figure:
    """GB/s over the number of elements: a panel a norm, with the copy as the ceiling."""
    figure = Figure(figsize=(WIDTH, 5.2), layout="constrained")
    panels = figure.subplots(2, 3, sharex=True, sharey=True).flat
    for panel, norm in zip(panels, NORMS, strict=True):
        for run in runs:
            _curves(panel, run, norm)
        panel.set_title(norm, loc="left")
        panel.set(xscale="log", yscale="log")
        panel.yaxis.set_major_formatter(PLAIN)
    for panel in figure.axes[3:]:
        panel.set_xlabel("elements")
    figure.supylabel("GB/s, on the bytes that must move", fontsize="medium")
    machines = "; ".join(map(hardware, runs))
    figure.suptitle(f"normkit, float32: {machines}", fontsize="medium", x=0.02, ha="left")
    first = figure.axes[0]
    if len(runs) > 1:
        for run in runs:
            mark, device = MARKS[run["device"]], run["device"].upper()
            first.plot([], [], color=PEER, ls="", marker=mark, ms=4, label=device)
    handles = dict(zip(*reversed(first.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=7)
    return figure


def _curves(panel: Any, run: Results, norm: str) -> None:
    rows = _curve(run["rows"], norm, "forward")
    copies = [(row["elements"], gigabytes(row, ceiling(row))) for row in rows]
    best = [
        (row["elements"], gigabytes(row, min(row["us"][who] for who in row["ratio"])))
        for row in rows
        if row["ratio"]
    ]
    panel.plot(*_xy(copies), "--", color=COPY, label="copy")
    panel.plot(*_xy(best), color=PEER, label="best peer, forward")
    for direction, colour in COLOURS.items():
        ours = [
            (row["elements"], gigabytes(row, row["us"][OURS]))
            for row in _curve(run["rows"], norm, direction)
        ]
        mark = MARKS[run["device"]]
        panel.plot(*_xy(ours), color=colour, marker=mark, ms=3.5, label=direction)


def _xy(points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def by_peer(run: Results) -> Figure:
    """How many times as long each peer takes: a dot a row, a line at the geometric mean."""
    names = peers(run["rows"])
    figure = Figure(figsize=(WIDTH, 1.1 + 0.62 * len(names)), layout="constrained")
    axes = figure.subplots()
    for i, who in enumerate(names):
        for j, direction in enumerate(DIRECTIONS):
            ratios = [
                ratio
                for row in run["rows"]
                if row["direction"] == direction
                and row["elements"] >= LEAST
                and (ratio := speedup(row, who)) is not None
            ]
            if not ratios:
                continue
            y = i + 0.26 * (j - 1)
            colour = COLOURS[direction]
            heights = [y + 0.1 * ((7 * k) % 11 / 5 - 1) for k in range(len(ratios))]  # spread out
            axes.plot(ratios, heights, ".", ms=4, color=colour, alpha=0.4, mew=0)
            mean = geometric_mean(ratios)
            axes.plot([mean] * 2, [y - 0.13, y + 0.13], color=colour, lw=3)
            at = {"xy": (1.005, y), "xycoords": ("axes fraction", "data"), "va": "center"}
            axes.annotate(f"{mean:.2f}", **at, color=colour)
    axes.axvline(1, color="black", lw=1)
    axes.set(xscale="log", ylim=(len(names) - 0.5, -0.5))
    axes.set_yticks(range(len(names)), names)
    axes.xaxis.set_major_formatter(PLAIN)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("time of the peer over normkit's (left of the line normkit is slower)")
    title = f"a dot a row of 10⁴ elements or more, a bar at their geometric mean: {hardware(run)}"
    figure.suptitle(title, fontsize="medium", x=0.02, ha="left")
    handles = [axes.plot([], [], color=COLOURS[d], lw=3)[0] for d in DIRECTIONS]
    figure.legend(handles, DIRECTIONS, loc="outside lower center", ncols=3)
    return figure


def main() -> None:
    prefix, *paths = map(Path, sys.argv[1:])
    print(*draw([read(path) for path in paths], prefix), sep="\n")


if __name__ == "__main__":
    main()
