"""What importing normkit costs, and which module may import which."""

import ast
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import normkit

PACKAGE = Path(normkit.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}
#: each imports only from those before it
ORDER = ["axes", "backends.base", "portable", "dispatch", "call", "norms", "moments", "layers"]
CONCRETE = sorted(
    name
    for name in MODULES
    if name.startswith("backends.") and name.count(".") == 1 and name != "backends.base"
)


def test_import_loads_nothing_but_numpy(python: Callable[..., Any]) -> None:
    script = """
import sys, numpy
before = {name.partition(".")[0] for name in sys.modules}
import normkit
after = {name.partition(".")[0] for name in sys.modules}
print(*sorted(after - before))
"""
    run = python("-c", script)
    loaded = set(run.stdout.split())
    assert "normkit" in loaded, run.stderr
    assert loaded - {"normkit"} <= sys.stdlib_module_names
    assert not loaded & {"asyncio", "concurrent", "email", "http", "logging", "multiprocessing"}


def imports(path: Path) -> Iterator[str]:
    """Absolute names of the modules that a file imports, anywhere in it."""
    inside = path.relative_to(PACKAGE.parent).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            home = [*inside[: len(inside) + 1 - node.level]] if node.level else []
            module = ".".join([*home, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def own(path: Path) -> set[str]:
    """The modules of normkit that a file imports, without the package's name."""
    names = {name.removeprefix("normkit.") for name in imports(path) if name.startswith("normkit.")}
    return names & MODULES.keys() - {"backends"}


@pytest.mark.parametrize("module", ORDER)
def test_arrows_point_one_way(module: str) -> None:
    allowed = ORDER[: ORDER.index(module)]
    assert own(MODULES[module]) <= set(allowed)


def belongs(module: str, parent: str) -> bool:
    return module == parent or module.startswith(parent + ".")


@pytest.mark.parametrize("backend", CONCRETE)
def test_a_backend_knows_axes_and_the_protocol_alone(backend: str) -> None:
    for module, path in MODULES.items():
        if belongs(module, backend):
            others = {name for name in own(path) if not belongs(name, backend)}
            assert others <= {"axes", "backends.base"}, module


def test_only_dispatch_names_a_concrete_backend() -> None:
    for module, path in MODULES.items():
        for backend in CONCRETE:
            if not belongs(module, backend):
                assert not any(belongs(name, backend) for name in own(path)), module
        literals = {
            node.value
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        lazily = any(text.startswith("normkit.backends.") for text in literals)
        assert lazily == (module == "dispatch"), module


@pytest.mark.parametrize(
    ("library", "home"),
    [("numba", "backends.numba"), ("llvmlite", "backends.numba"), ("cupy", "backends.cuda")],
)
def test_heavy_libraries_are_imported_by_their_backend_alone(library: str, home: str) -> None:
    for module, path in MODULES.items():
        if any(belongs(name, library) for name in imports(path)):
            assert belongs(module, home), module
