"""Compile CUDA kernels as CuPy does, with no driver and no GPU; read what ptxas made of them."""

import functools
import hashlib
import importlib
import importlib.util
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

CACHE = Path(__file__).parents[1] / ".cache" / "nvrtc"
INSTALL = "pip install 'normkit[cuda-check]'"


@functools.cache
def unavailable() -> str | None:
    """Why nothing can be compiled here, or None."""
    if importlib.util.find_spec("cupy") is None or importlib.util.find_spec("nvidia") is None:
        return f"NVRTC and CuPy are not installed ({INSTALL})"
    missing = [name for name in ("nvdisasm", "cuobjdump") if not _tool(name).exists()]
    return f"{' and '.join(missing)} not installed ({INSTALL})" if missing else None


def _tool(name: str) -> Path:
    return Path(next(iter(importlib.import_module("nvidia").__path__)), "cu13", "bin", name)


class CompileError(Exception):
    """What NVRTC rejects: the architecture, the kernels and the compiler's log."""


@dataclass(frozen=True)
class Kernel:
    """What the compiler made of one kernel."""

    registers: int
    stack: int  # bytes of a thread in local memory
    spilled: int  # bytes that spills store and load
    threads: int  # of a block at most, by __launch_bounds__ (1024 without)
    opcodes: dict[str, int]  # how often; none if not disassembled

    def wide(self, opcode: str) -> int:
        """How many of the loads ("LDG") or stores ("STG") move 16 bytes."""
        return sum(n for o, n in self.opcodes.items() if o.startswith(opcode) and ".128" in o)


def kernels(
    source: str,
    expressions: Sequence[str],
    arch: int,
    options: tuple[str, ...],
    disassemble: bool = False,
) -> dict[str, Kernel]:
    """Compile specialisations of one source; the results are kept in .cache/nvrtc.

    To disassemble takes a third of the time that it takes to compile.
    """
    key = repr((source, expressions, options_of_cupy(options, arch), _version(), disassemble))
    path = CACHE / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"
    if not path.exists():
        found = _kernels(source, expressions, arch, options, disassemble)
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=CACHE, delete=False) as f:
            json.dump({name: asdict(kernel) for name, kernel in found.items()}, f)
        Path(f.name).replace(path)
    return {name: Kernel(**fields) for name, fields in json.loads(path.read_text()).items()}


def cubin(
    source: str, expressions: Sequence[str], arch: int, options: tuple[str, ...]
) -> tuple[bytes, str, dict[str, str]]:
    """The object code, the compiler's log, and the mangled name of each expression."""
    from cupy.cuda import nvrtc

    program = nvrtc.createProgram(source, "kernel.cu", (), ())
    try:
        for name in expressions:
            nvrtc.addNameExpression(program, name)
        nvrtc.compileProgram(program, (*options_of_cupy(options, arch), "--ptxas-options=-v"))
        # CuPy takes the object code for a C string and drops its last byte, a zero.
        code = bytes(nvrtc.getCUBIN(program)) + b"\0"
        names = {name: nvrtc.getLoweredName(program, name) for name in expressions}
        return code, nvrtc.getProgramLog(program), names
    except nvrtc.NVRTCError as error:
        log = nvrtc.getProgramLog(program)
        raise CompileError(f"sm_{arch}: {', '.join(expressions)}: {error}\n{log}") from None
    finally:
        nvrtc.destroyProgram(program)


@functools.cache
def options_of_cupy(options: tuple[str, ...], arch: int) -> tuple[str, ...]:
    """The options that CuPy passes to NVRTC when a RawModule asks for `options`."""
    from cupy._core import core
    from cupy.cuda import compiler

    class Stop(Exception):
        pass

    def architecture(arch: str) -> tuple[str, str]:  # the original asks the driver
        return f"-arch=sm_{arch}", "cubin"

    def program(self: Any, options: tuple[str, ...], log: Any = None) -> None:
        raise Stop(options)

    with (
        mock.patch.object(compiler, "_get_arch_for_options_for_nvrtc", architecture),
        mock.patch.object(compiler, "_preprocess", return_value=""),
        mock.patch.object(compiler._NVRTCProgram, "compile", program),
        mock.patch.dict("os.environ", CUPY_CACHE_IN_MEMORY="1"),
    ):
        try:
            core.compile_with_cache("", options, arch=str(arch), name_expressions=("k",))
        except Stop as stop:
            return tuple(stop.args[0])
    raise AssertionError("CuPy compiled nothing")


def _version() -> tuple[int, int]:
    from cupy.cuda import nvrtc

    version: tuple[int, int] = nvrtc.getVersion()
    return version


def _kernels(
    source: str,
    expressions: Sequence[str],
    arch: int,
    options: tuple[str, ...],
    disassemble: bool,
) -> dict[str, Kernel]:
    code, log, mangled = cubin(source, expressions, arch, options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(code)
        f.flush()
        elf = _run("cuobjdump", "-elf", f.name)
        sass = _run("nvdisasm", "-c", "-ndf", f.name) if disassemble else ""
    found = {}
    for expression, name in mangled.items():
        report = _section(log, rf"entry function '{name}'", "entry function")
        registers, stack, stores, loads = (
            int(re.findall(rf"(\d+) {what}", report)[0])
            for what in ("registers", "bytes stack", "bytes spill stores", "bytes spill loads")
        )
        info = _section(elf, rf"\n\.nv\.info\.{name}\n", r"\n\.\S+\n")
        bounds = re.search(r"EIATTR_MAX_THREADS\s+Format:\s+\S+\s+Value:\s+0x(\w+)", info)
        text = _section(sass, rf"\n\.text\.{name}:", r"\n\.text\.") if disassemble else ""
        opcodes = Counter(re.findall(r"/\*\w+\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", text))
        threads = int(bounds.group(1), 16) if bounds else 1024
        found[expression] = Kernel(registers, stack, stores + loads, threads, dict(opcodes))
    return found


def _run(tool: str, *args: str) -> str:
    return subprocess.run([_tool(tool), *args], capture_output=True, text=True, check=True).stdout


def _section(text: str, start: str, end: str) -> str:
    """The text from the one pattern to the next other one."""
    begin = re.search(start, text)
    assert begin, f"no {start}"
    stop = re.compile(end).search(text, begin.end())
    return text[begin.start() : stop.start() if stop else None]
