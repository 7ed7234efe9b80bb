"""The command line, and compiling ahead."""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import array_api_strict as strict
import numpy as np
import pytest
from custom_backend import Standard

import normkit as nk
from normkit import dispatch
from normkit.__main__ import errors, main
from normkit.backends.numba import kernels
from normkit.backends.reference import Reference
from normkit.testing import check_backend

REFERENCE = ["--backend", "reference", "--dtype", "float32"]


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    yield
    dispatch._registered.clear()
    dispatch.load.cache_clear()
    dispatch._find.cache_clear()


def test_facts(capsys: Any) -> None:
    assert main([]) == 0
    said = capsys.readouterr().out
    assert f"normkit {nk.__version__}" in said
    assert f"NumPy {np.__version__}" in said
    for name, found in nk.backends().items():
        assert name in said
        assert found.version in said
        assert " ".join(found.reason.split()) in " ".join(said.split())
    for fact in ("threading layer: ", "threads: ", "cache: "):
        assert fact in said
    assert kernels.enter.stats.cache_path in said


def test_verify(capsys: Any) -> None:
    assert main(["verify", *REFERENCE]) == 0
    said = capsys.readouterr()
    assert "reference: " in said.out
    assert "all passed" in said.out
    rows = [line.split() for line in said.out.splitlines()]
    assert ["norm", "dtype", "mean", "0", "mean", "100", "mean", "10000", "mean", "1e+06"] in rows
    assert {row[0] for row in rows if row[1:2] == ["float32"]} == {
        "batch_norm",
        "batch_renorm",
        "layer_norm",
        "instance_norm",
        "group_norm",
        "rms_norm",
    }
    assert said.err == ""  # nobody is watching


def test_verify_takes_plugins(capsys: Any) -> None:
    nk.register_backend(Standard)
    assert main(["verify", "--backend", "standard-array_api_strict", "--dtype", "float64"]) == 0
    assert "on array_api_strict arrays, all passed" in capsys.readouterr().out


class Wrong(Reference):
    """Forgets eps."""

    name = "wrong"

    def moments(self, x: Any, axes: Any, *, eps: float, center: bool) -> Any:
        return super().moments(x, axes, eps=0.0, center=center)


def test_verify_fails(capsys: Any) -> None:
    nk.register_backend(Wrong)
    assert main(["verify", "--backend", "wrong", "--dtype", "float64"]) == 1
    said = capsys.readouterr().out
    assert "FAILED" in said
    assert "\nlayer_norm of (40, 37), float64, C order, mean 0: y is " in said


def test_errors_are_the_largest() -> None:
    results = check_backend(Standard(), strict, ["float32", "float64"])
    lines = errors(results)
    worst = max(r.error for r in results if r[1:4] == ("layer_norm", "float32", 1e4))
    (row,) = (line.split() for line in lines if line.startswith("layer_norm     float32"))
    assert row[4] == f"{worst:.1e}"


def test_progress(capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    main(["verify", *REFERENCE])
    lines = capsys.readouterr().err.split("\r")[1:]
    assert lines[0].startswith("[" + 30 * " " + "] 0/")
    assert "batch_norm of (16, 5, 7, 3)" in lines[0]
    assert lines[-1].startswith("[" + 30 * "#" + "] ")
    assert lines[-1].endswith("\n")


@pytest.mark.parametrize("wrong", [["check"], ["verify", "--dtype", "int8"]])
def test_wrong_arguments(wrong: list[str], capsys: Any) -> None:
    with pytest.raises(SystemExit) as left:
        main(wrong)
    assert left.value.code == 2
    assert "invalid choice" in capsys.readouterr().err


def test_it_runs_as_a_module(python: Callable[..., Any]) -> None:
    for arguments, code in (([], 0), (["verify", *REFERENCE], 0), (["--no-such-option"], 2)):
        assert python("-m", "normkit", *arguments).returncode == code


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_after_warmup_nothing_is_compiled(dtype: str) -> None:
    done = []
    nk.warmup(dtype, backend="numba", progress=lambda *step: done.append(step))
    assert [step[0] for step in done] == list(range(len(done)))
    assert {step[1] for step in done} == {len(done) - 1}
    assert f"rows_forward of {dtype}" in [name for *_, name in done]
    before = kernels.compiled.cache_info().misses, kernels._entry.cache_info().misses
    check_backend("numba", np, [dtype])
    assert (kernels.compiled.cache_info().misses, kernels._entry.cache_info().misses) == before


def test_warmup_of_what_has_nothing_to_compile() -> None:
    nk.warmup([np.float32, np.dtype("float16")], backend="reference")


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"dtypes": "int8"}, ValueError, "'int8' is none of float16"),
        ({"dtypes": [np.int64]}, ValueError, "'int64' is none of float16"),
        ({"backend": "nunba"}, ValueError, "no backend is called 'nunba'"),
    ],
)
def test_bad_warmup(arguments: Any, error: Any, said: str) -> None:
    with pytest.raises(error, match=said):
        nk.warmup(**arguments)
