"""The benchmark harness: its table, its contestants' results on small shapes, its comparisons."""

import json
import os
from dataclasses import replace
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rich", reason="benchmarks need rich: nothing of them was tested")

from benchmarks import harness, report
from benchmarks.cases import DIRECTIONS, EVERY, NORMS, Case, cases, function, inputs, select
from benchmarks.peers import PEERS, Contestant, Peer, Unsupported
from benchmarks.timing import LONG, OUT, TOLERANCE, Cpu, check, ratios, row_of, spread, time_row

FULL = os.environ.get("NORMKIT_FULL") == "1"
SLOW = "torch.compile"  # seconds a case: NORMKIT_FULL=1


def small(case: Case) -> Case:
    """The same row with a shape that takes no time."""
    groups = 2 if case.norm == "group_norm" else 1
    return replace(case, shape=(4, 6, 3, 5)[: len(case.shape)], groups=groups)


RESULTS = sorted((Path(report.__file__).parent / "results").glob("*.json"))

SMALL = {  # each once
    small(case): None
    for case in cases("any")
    if FULL or case.dtype == "float32" or (case.dtype, case.direction) == ("bfloat16", "forward")
}


@pytest.fixture(autouse=True)
def threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


class Still(Cpu):
    """A device that waits for nobody."""

    settle = wake = measure = 0.0


def results(**us: float) -> dict[str, Any]:
    """Made-up results: a row a word."""
    rows = [
        {
            "case": case,
            "where": "small",
            "dtype": "float32",
            "direction": "forward",
            "bytes": 8000,
            "us": {"normkit": time, "PyTorch": 10.0, "copy": 2.0, "copy, 1 thread": 1.0},
            "spread": {"normkit": 0.01},
            "ratio": {"PyTorch": 10.0 / time},
            "ratio spread": {"PyTorch": 0.2},
            "error": {"normkit": 1e-7, "PyTorch": 1e-7},
            "absent": {},
        }
        for case, time in us.items()
    ]
    machine = {"hardware": "none", "threads": 1, "allocator": "tuned"}
    return {"device": "cpu", "machine": machine, "rows": rows} | {
        "versions": {},
        "skipped": [],
        "failed": [],
    }


def test_the_table_has_every_norm_direction_dtype_and_layout_once() -> None:
    table = list(cases("any"))
    assert len({case.name for case in table}) == len(table)
    for judged in ("small", "large"):
        met = {(c.norm, c.direction, c.dtype) for c in table if c.where.split()[0] == judged}
        assert met == {(n, d, t) for n in NORMS for d in DIRECTIONS for t in EVERY}
    sizes = {"small": 1e5, "large": 1e7}
    assert all(
        0.4 < c.elements / sizes[w] < 1.7 for c in table if (w := c.where.split()[0]) in sizes
    )
    assert {c.layout for c in table} == {"NC", "NCHW", "NHWC"}


def test_select_keeps_rows_with_all_words() -> None:
    found = select(cases(), "layer backward bfloat16 small")
    assert {c.problem for c in found} == {
        "layer_norm bfloat16 NC 392x256",
        "layer_norm bfloat16 NC 98x1023",
    }
    either = select(cases(), "layer bfloat16 small, tiny rms")
    assert {c.problem.rsplit(" ", 1)[0] for c in either} == {
        "layer_norm bfloat16 NC",
        "rms_norm float32 NC",
    }
    assert select(cases(), "tiny rms,") == select(cases(), "tiny rms")
    quick = select(cases(), "", quick=True)
    assert {c.norm for c in quick} == set(NORMS)
    assert {c.dtype for c in quick} == {"float32"}


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_inputs_lie_in_memory_as_the_case_says(layout: str) -> None:
    case = Case("batch_norm", (4, 6, 3, 5), layout, "bfloat16", "forward")
    given = inputs(case)
    assert given["x"].shape == given["dy"].shape == case.shape
    order = (0, 1, 2, 3) if layout == "NCHW" else (0, 2, 3, 1)
    assert given["x"].transpose(order).flags.c_contiguous
    assert {name: a.dtype.name for name, a in given.items()} == {
        **dict.fromkeys(("x", "dy"), "bfloat16"),
        **dict.fromkeys(("gamma", "beta", "mean", "spread"), "float32"),
    }
    assert not np.array_equal(given["x"], inputs(case)["x"])  # fresh ones


@pytest.mark.parametrize(
    ("direction", "arrays"), [("forward", 2), ("backward", 3), ("inference", 2)]
)
def test_bytes_are_the_least_that_move(direction: str, arrays: int) -> None:
    case = Case("batch_norm", (4, 6, 3, 5), "NCHW", "float16", direction)
    assert case.bytes == arrays * 360 * 2


@pytest.mark.parametrize(
    "peer",
    [p for p in PEERS if "cpu" in p.devices and (FULL or p.name != SLOW)],
    ids=lambda p: p.name,
)
def test_a_peer_agrees_with_the_reference(peer: Peer) -> None:
    try:
        make = peer.load()
    except ImportError as error:
        pytest.skip(f"{error}: {peer.name} was not tested")
    assert peer.version
    agreed = set()
    for case in SMALL:
        found = check(case, inputs(case), {peer.name: make})
        reason = found.absent.get(peer.name, "")
        assert not reason.startswith("wrong"), (case.name, reason)
        if not reason:
            assert found.errors[peer.name] < TOLERANCE[case.dtype]
            agreed.add((case.norm, case.direction))
    if peer.name == "ONNX Runtime":
        assert agreed == {(norm, "inference") for norm in NORMS if norm != "batch_renorm"}
    else:
        assert agreed == {(norm, direction) for norm in NORMS for direction in DIRECTIONS}


def test_a_wrong_or_failing_or_lacking_peer_is_not_timed() -> None:
    case = Case("layer_norm", (4, 6), "NC", "float32", "inference")

    def wrong(case: Case, given: dict[str, Any]) -> Contestant:
        return Contestant(lambda: function(case, given)() * 1.01, lambda y: (y,))

    def misshapen(case: Case, given: dict[str, Any]) -> Contestant:
        return Contestant(lambda: function(case, given)()[:1], lambda y: (y,))

    def failing(case: Case, given: dict[str, Any]) -> Contestant:
        raise MemoryError("no more")

    def lacking(case: Case, given: dict[str, Any]) -> Contestant:
        raise Unsupported("no such operator")

    contestants = {f.__name__: f for f in (wrong, misshapen, failing, lacking)}
    row = row_of(case, contestants, [time_row(case, Still(), contestants, 2)])
    assert set(row["us"]) == {"normkit", OUT, "copy", "copy, 1 thread"}
    assert row["absent"] == {
        "wrong": row["absent"]["wrong"],
        "misshapen": "ValueError: result of shape (1, 6), not (4, 6)",
        "failing": "MemoryError: no more",
        "lacking": "no such operator",
    }
    assert row["absent"]["wrong"].startswith("wrong by 1")
    assert all(time > 0 for time in row["us"].values())


def test_ratios_are_of_the_same_round() -> None:
    slowing = {"normkit": [1.0, 2.0, 4.0], "slower": [1.5, 3.0, 6.0], "long": [9.0]}
    assert ratios(slowing, "slower") == [1.5] * 3  # though its times overlap with normkit's
    assert ratios(slowing, "long") == [9.0]


class Counting(Still):
    """A device on which every sample takes a microsecond longer."""

    calls = 0

    def microseconds(self, run: Any) -> float:
        self.calls += 1
        return float(self.calls)


class Scripted(Still):
    """A device on which a call takes as long as its result says, or 1 µs."""

    def microseconds(self, run: Any) -> float:
        found = run()
        return next(found) if isinstance(found, cycle) else 1.0


def test_samples_of_passes_are_pooled_and_few_are_taken_of_long_calls() -> None:
    case, calls = Case("layer_norm", (4, 6), "NC", "float32", "inference"), []

    def peer(*theirs: float) -> Any:
        def make(case: Case, given: dict[str, Any]) -> Contestant:
            y, times = function(case, given)(), cycle(theirs)
            return Contestant(lambda: calls.append(0) or times, lambda _: (y,))

        return make

    first = time_row(case, Scripted(), {"peer": peer(1.1, 1.2)}, 4)
    second = time_row(case, Scripted(), {"peer": peer(0.9), "late": peer(3)}, 5)
    assert (first.times["peer"], second.times["peer"]) == ([1.1, 1.2, 1.1, 1.2], [0.9] * 5)
    row = row_of(case, ["peer", "late"], [first, second])
    assert row["ratio"] == {"peer": 0.9, "late": 3}  # which was absent, or wrong, in the first pass
    assert row["spread"] == dict.fromkeys(second.times, 0) | {"peer": 0.1667}
    lost = second._replace(
        times={"normkit": [1.0], "copy": [1.0]}, errors={}, absent={"peer": "no"}
    )
    row = row_of(case, ["peer"], [first, lost])
    assert (row["ratio"]["peer"], row["absent"]) == (pytest.approx(1.15), {})
    assert set(row["error"]) >= set(row["ratio"])
    calls.clear()
    found = time_row(case, Scripted(), {"peer": peer(3 * LONG, LONG, 2 * LONG, 0.1)}, 5)
    assert found.times["peer"] == [3 * LONG, LONG, 2 * LONG]
    assert len(calls) == 3 + 1  # and the check


@pytest.mark.parametrize(
    ("count", "half"), [(1, 0), (2, 0.5), (6, 2.5), (8, 3.5), (9, 3), (20, 4.5)]
)
def test_spread_is_the_interval_of_the_median(count: int, half: float) -> None:
    """By the tables of the sign test: of 20 samples from the 6th to the 15th, and so on."""
    samples = [1.0 + i for i in range(count)]
    assert spread(samples[::-1]) * np.median(samples) == pytest.approx(half)


def test_a_run_is_written_as_it_goes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = select(cases(), "layer_norm tiny")
    done = harness.begin(Still(), {}, [])
    harness.run(
        table, Still(), {}, 2, done, tmp_path / "part", time_is_up=lambda: len(done["rows"]) == 2
    )
    assert report.read(tmp_path / "part.json") == json.loads(json.dumps(done))
    assert [row["case"] for row in done["rows"]] == [case.name for case in table[:2]]
    assert "1 rows from layer_norm inference" in done["skipped"][0]
    harness.run(table, Still(), {}, 2, done, tmp_path / "part", 2)  # replaces two rows, adds one
    assert [row["case"] for row in done["rows"]] == [case.name for case in table]
    assert "6/6 layer_norm inference" in capsys.readouterr().err
    counting = Counting()
    harness.run(table[:1], counting, {}, 2, done, passes=2)
    assert counting.calls == 2 * 2 * 4  # of normkit, with out=, and two copies
    assert done["rows"][0]["us"]["normkit"] == np.median([1, 8, 9, 16])
    assert harness.conclude(done, None) == 0
    assert table[0].name in capsys.readouterr().out


def test_compare_names_what_changed_beyond_its_spread() -> None:
    old = results(same=10, blurred=10, slower=10, faster=10, gone=10)
    new = results(same=10.4, blurred=12, slower=12, faster=8, new=1)
    new["rows"][1]["spread"]["normkit"] = 0.2
    new["rows"][2]["spread"]["normkit"] = 0.15  # not twice that
    changed = {row["case"]: ratio for ratio, row in report.compare(old, new)}
    assert changed == {"slower": pytest.approx(1.2), "faster": pytest.approx(0.8)}
    assert "4 rows in both: 1 slower, 1 faster" in str(report.comparison(old, new).title)


def test_a_report_marks_losses(capsys: pytest.CaptureFixture[str]) -> None:
    made = results(won=5, lost=20)
    assert report.speedup(made["rows"][0], "best") == 2
    assert report.ceiling(made["rows"][0]) == 1
    assert report.worst(made) == ["0.50 ±20 %, PyTorch: lost"]
    report.show(made)
    printed = capsys.readouterr().out
    assert "▼ 0.50" in printed
    assert "1.00  0.50 (1)" in printed  # geometric mean, least, losses
    assert "| won " in report.markdown(made)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_committed_results_can_be_shown(
    path: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    found = report.read(path)
    report.show(found)
    assert found["rows"][-1]["case"] in capsys.readouterr().out
    if find_spec("matplotlib"):
        from benchmarks import plots

        assert plots.draw([found], tmp_path / "drawn")


def test_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="no matplotlib: nothing was drawn")
    from benchmarks import plots

    done = harness.begin(Still(), {}, [])
    make = {"NumPy": PEERS[0].load()}
    harness.run(select(cases(), "layer_norm 256", quick=True), Still(), make, 2, done)
    names = [path.name for path in plots.draw([done], tmp_path / "one")]
    assert names == ["one-sizes.png", "one-peers.png"]
    both = plots.draw([done, done | {"device": "gpu"}], tmp_path / "two")
    assert [path.name for path in both] == [
        "two-sizes.png",
        "two-cpu-peers.png",
        "two-gpu-peers.png",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in both)


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["benchmarks", "--list", "--peers", "NumPy"], "NumPy: numpy"),
        (["benchmarks.gpu", "--plan", "--filter", "instance"], "instance_norm bfloat16 NCHW 64x64"),
    ],
)
def test_commands_that_time_nothing(python: Any, command: list[str], expected: str) -> None:
    done = python("-m", *command, timeout=300)
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout
