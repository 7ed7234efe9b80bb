"""Backends that others bring: found, chosen, reported when broken, and used throughout a call."""

import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import array_api_strict as strict
import numpy as np
import pytest
from cases import SMALL, Case
from custom_backend import Standard

import normkit as nk
from normkit import dispatch
from normkit.backends.base import Backend, Stats, Update
from normkit.backends.reference import Reference
from normkit.testing import CASES, check_backend

EXAMPLE = Path(__file__).parents[1] / "examples" / "custom_backend.py"


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """What a test registers or reads is gone after it."""
    yield
    dispatch._registered.clear()
    for cached in (dispatch.load, dispatch._find, dispatch._entries):
        cached.cache_clear()


def standard() -> Standard:
    return Standard(strict, "array_api_strict")


# A package of another's, installed


BROKEN = "import a_module_that_nobody_has\n"
SAYS = "from custom_backend import Standard\n\nclass {0}(Standard):\n    def __init__(self):\n"
NAMED = SAYS + "        super().__init__()\n        self.name = {1!r}\n"
WRONG = (
    NAMED + "    def write(self, target, values):\n        super().write(target, 1.001 * values)\n"
)
#: distribution -> (the entry point's name, the class, the module's source)
PACKAGES = {
    "good": ("array_api_strict", "Good", NAMED.format("Good", "good")),
    "rival": ("array_api_strict", "Rival", NAMED.format("Rival", "rival")),
    "namesake": ("array_api_strict", "Namesake", NAMED.format("Namesake", "good")),
    "wrong": ("array_api_strict", "Wrong", WRONG.format("Wrong", "wrong")),
    "broken": ("toys", "Broken", BROKEN),
    "usurper": ("array_api_strict", "Usurper", NAMED.format("Usurper", "numba")),
    "notone": ("array_api_strict", "NotOne", "class NotOne: pass\n"),
    "stranger": ("toys", "Stranger", NAMED.format("Stranger", "stranger")),
}


def wheel(name: str, folder: Path) -> Path:
    """A package with an entry point, as pip takes it."""
    entry, kind, source = PACKAGES[name]
    info = f"{name}-1.5.dist-info"
    files = {
        f"{name}_plugin.py": source,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.5\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": f"[{dispatch.GROUP}]\n{entry} = {name}_plugin:{kind}\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{file},,\n" for file in [*files, f"{info}/RECORD"])
    path = folder / f"{name}-1.5-py3-none-any.whl"
    with ZipFile(path, "w") as archive:
        for file, text in files.items():
            archive.writestr(file, text)
    return path


Run = Callable[[str], str]


@pytest.fixture
def environment(tmp_path: Path) -> Callable[..., Run]:
    """Make a fresh environment with packages installed; what runs code in it and gives its output.

    It sees what is installed here, so that nothing is downloaded.
    """
    pytest.importorskip("pip")

    def make(*names: str) -> Run:
        home = tmp_path / "venv"
        venv.create(home, with_pip=False, symlinks=True)
        paths = {"base": str(home), "platbase": str(home)}
        packages = Path(sysconfig.get_path("purelib", "venv", paths))
        seen = [str(Path(nk.__file__).parents[1]), *filter(None, sys.path)]
        (packages / "seen.pth").write_text("\n".join(seen))
        python = shutil.which("python", path=sysconfig.get_path("scripts", "venv", paths))
        assert python is not None
        pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-index"]
        wheels = [str(wheel(name, tmp_path)) for name in names]
        subprocess.run([*pip, "--no-deps", *wheels], check=True, capture_output=True)

        def run(script: str) -> str:
            command = [python, "-W", "error", "-c", SETUP + script]
            done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
            assert done.returncode == 0, done.stderr
            return done.stdout

        return run

    return make


SETUP = f"""
import sys
import array_api_strict as xp, numpy as np, normkit as nk
sys.path.append({str(EXAMPLE.parent)!r})
x = xp.asarray(np.arange(12.0).reshape(3, 4))

def error(call, *args):
    try:
        call(*args)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        return f"{{type(error).__name__}}: {{error}}"

def use(name):
    with nk.use_backend(name):
        return nk.layer_norm(x)

"""


def test_an_installed_plugin_is_found_and_used(environment: Any) -> None:
    run = environment("good")
    said = run(
        """
from normkit.testing import check_backend
y, pullback = nk.vjp(nk.layer_norm, x)
print(type(y).__module__, type(pullback(x).x).__module__, nk.backends()["good"])
print(use("good") is not None, len(check_backend("good", xp, ["float32"])) > 100)
"""
    )
    assert said.splitlines() == [
        "array_api_strict._array_object array_api_strict._array_object "
        "Availability(available=True, version='1.5', reason='')",
        "True True",
    ]


def test_plugins_are_read_on_a_miss_only(environment: Any) -> None:
    run = environment("good")
    said = run(
        """
from normkit.dispatch import _entries
for a in (np.ones((3, 4)), x, x):
    nk.layer_norm(a)
    print("good_plugin" in sys.modules, _entries.cache_info().misses)
"""
    )
    assert said.splitlines() == ["False 0", "True 1", "True 1"]


def test_a_broken_plugin_is_named_and_disturbs_nobody(environment: Any) -> None:
    run = environment("broken", "good")
    said = run(
        """
print(nk.backends()["toys"])
print(error(nk.layer_norm, type("Array", (), {"__module__": "toys.arrays"})()))
print(nk.backends()["good"].available, nk.layer_norm(x).shape)
print(error(use, "godo"))
"""
    ).splitlines()
    for line in (said[0], said[1], said[3]):
        assert "'broken_plugin:Broken' (broken 1.5) for toys arrays cannot be used" in line
        assert "No module named 'a_module_that_nobody_has'" in line
    assert said[0].startswith("Availability(available=False")
    assert said[1].startswith("RuntimeError")
    assert said[2] == "True (3, 4)"
    assert said[3].startswith("ValueError: no backend is called 'godo'")


def test_two_plugins_for_one_library_ask_for_a_choice(environment: Any) -> None:
    run = environment("good", "rival")
    said = run(
        """
print(error(nk.layer_norm, x))
for name in ("good", "rival"):
    print(use(name).shape, nk.backends()[name])
"""
    ).splitlines()
    for line in said:
        for name in ("good_plugin:Good' (good 1.5)", "rival_plugin:Rival' (rival 1.5)"):
            assert name in line
    assert said[0].startswith("RuntimeError: 2 plug-ins serve array_api_strict arrays")
    assert all(line.startswith("(3, 4) Availability(available=True") for line in said[1:])


def test_two_plugins_of_one_name(environment: Any) -> None:
    run = environment("good", "namesake")
    said = run(
        """
print(nk.backends()["good"])
print(error(use, "good"))
"""
    ).splitlines()
    for line in said:
        assert "2 plug-ins are called 'good': " in line
        assert "'good_plugin:Good' (good 1.5)" in line
        assert "'namesake_plugin:Namesake' (namesake 1.5)" in line
        assert "uninstall" in line


@pytest.mark.parametrize(
    ("name", "entry", "said"),
    [
        ("usurper", "array_api_strict", "its name 'numba' is that of a built-in backend"),
        ("notone", "array_api_strict", "not a normkit.backends.base.Backend"),
        ("stranger", "toys", "it says that it serves arrays of array_api_strict"),
    ],
)
def test_a_plugin_that_is_none(environment: Any, name: str, entry: str, said: str) -> None:
    run = environment(name)
    got = run(f"print(nk.backends()[{entry!r}]); print(nk.backends()['numba'].available)")
    assert got.startswith("Availability(available=False")
    assert f"({name} 1.5)" in got
    assert said in got
    assert got.endswith("True\n")


def test_wrong_numbers_are_caught(environment: Any) -> None:
    run = environment("wrong")
    said = run(
        """
from normkit.testing import check_backend
print(nk.backends()["wrong"].available, error(check_backend, "wrong", xp, ["float32"]))
"""
    )
    assert said.startswith("True AssertionError")
    assert "checks failed" in said
    assert "batch_norm of (16, 5, 7, 3), float32, C order, mean 0: y is " in said


# Registered at run time


def test_registered_backends() -> None:
    with pytest.raises(TypeError, match="not array_api_strict"):
        nk.layer_norm(strict.ones((2, 3)))
    nk.register_backend(standard())
    assert nk.layer_norm(strict.ones((2, 3))).shape == (2, 3)
    assert nk.backends()["standard-array_api_strict"].available

    class Other(Reference):
        name = "other"

    nk.register_backend(Other)  # a class will do; numba goes on serving NumPy
    assert dispatch.backend_for(np.ndarray).name == "numba"
    with nk.use_backend("other") as used:
        assert dispatch.backend_for(np.ndarray) is used
        nk.layer_norm(np.eye(3))
    nk.register_backend(Other)  # the same anew


@pytest.mark.parametrize(
    ("backend", "error", "said"),
    [
        (np, TypeError, "not a normkit.backends.base.Backend"),
        (int, TypeError, "0 is not a"),
        (type("Mine", (Reference,), {"name": "numba"}), ValueError, "built-in"),
        (type("Mine", (Reference,), {"name": "taken"}), ValueError, "has the name of 'taken'"),
    ],
)
def test_what_cannot_be_registered(backend: Any, error: type[Exception], said: str) -> None:
    nk.register_backend(type("Taken", (Reference,), {"name": "taken"}))
    before = dict(dispatch._registered)
    with pytest.raises(error, match=said):
        nk.register_backend(backend)
    assert dispatch._registered == before


def test_a_backend_is_chosen_by_itself() -> None:
    class Unregistered(Reference):
        name = "unregistered"

    mine = Unregistered()
    with nk.use_backend(mine):
        assert dispatch.backend_for(np.ndarray) is mine
    with nk.use_backend(standard()):
        nk.layer_norm(strict.ones((2, 3)))
        with pytest.raises(TypeError, match=r"arrays of array_api_strict, not numpy\.ndarray"):
            nk.layer_norm(np.eye(3))


# Third parties' arrays


@pytest.mark.parametrize("case", SMALL[::3], ids=str)
def test_arrays_without_strides(case: Case) -> None:
    inputs = case.inputs("float64")
    given = {name: strict.asarray(a.copy()) for name, a in inputs.items()}
    with nk.use_backend("reference"):
        want = case.run(inputs)
    with nk.use_backend(standard()):
        got = case.run(given)
    for name, values in want.items():
        assert type(got[name]) is type(given["x"]), name
        np.testing.assert_allclose(np.asarray(got[name]), values, rtol=1e-9, atol=1e-9)


class Fast(Standard):
    """Has the optional operations as well, and counts them."""

    calls = 0

    def given(self, mean: Any, spread: Any, eps: float | None) -> Stats:
        self.calls += 1
        mean, spread = (self.xp.astype(a, self.xp.float64) for a in (mean, spread))
        return Stats(mean, 1 / (spread if eps is None else (spread + eps) ** 0.5))

    def average(self, update: Update, mean: Any, spread: Any) -> None:
        self.calls += 1
        spread = 1 / spread if update.factor is None else spread * update.factor
        for old, new in ((update.mean, mean), (update.spread, spread)):
            old[...] = self.xp.astype(old + update.momentum * (new - old), old.dtype)

    def infer(self, x: Any, axes: Any, mean: Any, spread: Any, eps: Any, *rest: Any) -> None:
        self.calls += 1
        self.normalize(x, axes, self.given(mean, spread, eps), *rest)


def test_optional_operations_are_used() -> None:
    backend = Fast(strict, "array_api_strict")
    check_backend(backend, strict, ["float64"])
    assert backend.calls > 50


def test_torch_tensors() -> None:
    torch = pytest.importorskip("torch")
    xp = pytest.importorskip("array_api_compat.torch")
    backend = Standard(xp, "torch")
    check_backend(backend, xp, ["bfloat16", "float32"])
    x = torch.ones(2, 4, 3, 3).to(memory_format=torch.channels_last)
    with nk.use_backend(backend):
        out = torch.empty_like(x)
        assert nk.group_norm(x, num_groups=2, out=out) is out
        assert nk.group_norm(x, num_groups=2).stride() == x.stride()


def test_bad_arguments_of_third_parties() -> None:
    x, c = strict.ones((2, 3, 4)), strict.ones(3)
    integers = strict.ones((2, 3, 4), dtype=strict.int64)
    with nk.use_backend(standard()):
        for call, error, said in (
            (lambda: nk.layer_norm(integers), TypeError, "x has dtype int64: expected float16"),
            (lambda: nk.batch_norm(x, np.ones(3)), TypeError, "gamma is a numpy array and x a arr"),
            (lambda: nk.batch_norm(x, x), ValueError, r"gamma has shape \(2, 3, 4\)"),
            (lambda: nk.batch_norm(x, out=c), ValueError, "out has shape"),
            (lambda: nk.vjp(nk.batch_norm, x, out=x), ValueError, "out is x"),
            (
                lambda: nk.batch_norm(x, running_mean=c, running_var=c),
                ValueError,
                "running_mean overlaps running_var",
            ),
        ):
            with pytest.raises(error, match=said):
                call()


# The table itself


@pytest.mark.parametrize("name", ["numba", "reference"])
def test_built_in_backends_conform(name: str) -> None:
    results = check_backend(name, np)
    assert {result.norm for result in results} == {case.name for case in CASES}


class Naive(Reference):
    """The variance as E[x^2] - E[x]^2, in the arithmetic type."""

    name = "naive"

    def moments(self, x: Any, axes: Any, *, eps: float, center: bool) -> Any:
        stats = super().moments(x, axes, eps=eps, center=center)
        x = x.astype(np.float32).reshape(axes[:4])
        mean = x.mean(axis=(1, 3)) * center
        var = np.maximum((x * x).mean(axis=(1, 3)) - mean * mean, 0).ravel()
        return stats._replace(var=var, rstd=1 / np.sqrt(var + eps))


class Leaky(Reference):
    """Lets a NaN into the other groups."""

    name = "leaky"

    def normalize(self, x: Any, axes: Any, stats: Any, gamma: Any, beta: Any, y: Any) -> None:
        super().normalize(x, axes, stats, gamma, beta, y)
        y += 0 * x.sum(dtype=np.float64).astype(y.dtype)


class Forgetful(Reference):
    """Does not centre the gradient."""

    name = "forgetful"

    def gradients(self, *args: Any, center: bool, **options: Any) -> Any:
        return super().gradients(*args, center=False, **options)


class Failing(Reference):
    name = "failing"

    def given(self, *args: Any) -> Any:
        raise OSError("no such luck")


@pytest.mark.parametrize(
    ("backend", "said"),
    [
        (Naive, "batch_norm of (16, 5, 7, 3), float32, C order, mean 10000: y is"),
        (Leaky, "float32, C order, mean 0: a nan stays in its group: y"),
        (Forgetful, "batch_norm of (16, 5, 7, 3), float32, C order, mean 0: dx is"),
        (Failing, "training=False, float32, C order, mean 0: OSError: no such luck"),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_is_wrong_is_named(backend: type[Backend], said: str) -> None:
    with pytest.raises(AssertionError, match="checks failed") as caught:
        check_backend(backend(), np, ["float32"])
    assert said in str(caught.value)
