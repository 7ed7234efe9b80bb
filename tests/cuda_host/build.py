"""Compile a kernel for the host, once: the results stay in .cache/cuda_host."""

import ctypes as c
import functools
import hashlib
import platform
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
CACHE = HERE.parents[1] / ".cache" / "cuda_host"
MACHINE = ["-std=c++17", "-fPIC", "-mfma", "-mf16c", "-fno-strict-aliasing"]
# As NVRTC under -fmad=false, nothing is contracted into an fma. Shared variables of two modules
# stay apart (-fno-gnu-unique, -Bsymbolic). What the sanitizers call is in checker.cpp.
KERNEL = [
    *MACHINE, "-O1", "-g1", "-gdwarf-4", "-fno-var-tracking", "-w", "-ffp-contract=off",
    "-fno-gnu-unique", "-ftrivial-auto-var-init=pattern", "-fstack-clash-protection",
    "-fsanitize=thread", "--param=tsan-distinguish-volatile=1",
    "-fsanitize=alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero",
    "-fsanitize=float-cast-overflow",
]  # fmt: skip
DYNAMIC = re.compile(
    r"extern\s+__shared__\s+(?:(?:__align__|alignas)\s*\(\d+\)\s*)?"
    r"([\w\s:]+?)\s*\b(\w+)\s*\[\s*\]\s*;"
)


@functools.cache
def unavailable() -> str | None:
    """Why kernels cannot run on this machine, or None."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return "the CUDA emulation switches its fibers by x86-64 instructions, on Linux"
    if shutil.which("g++") is None or shutil.which("addr2line") is None:
        return "the CUDA emulation compiles kernels with g++ and binutils, which are not installed"
    if not {"fma", "f16c"} <= set(Path("/proc/cpuinfo").read_text().split()):
        return "the CUDA emulation uses the FMA and F16C instructions, which this processor lacks"
    return None


class BuildError(Exception):
    """A kernel that g++ rejects: the compiler's messages."""


def compile_once(name: str, flags: list[str], sources: dict[str, str]) -> Path:
    """The path of a library made from texts (the last one; the others are what it includes)."""
    *_, (main, text) = sources.items()
    key = hashlib.sha256("\0".join([*flags, *sources.values()]).encode()).hexdigest()[:24]
    library = CACHE / f"{name}-{key}.so"
    if library.exists():
        return library
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        source, partial, linked = (Path(folder, file) for file in ("k.cpp", "k.o", "k.so"))
        source.write_text(text)
        for command in (
            ["g++", *flags, f"-I{HERE}", "-c", source, "-o", partial],
            ["g++", "-shared", "-Wl,-Bsymbolic", partial, "-o", linked],
        ):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise BuildError(f"{main}: g++ says\n{done.stderr}")
        linked.replace(library)
    return library


def read(*names: str) -> dict[str, str]:
    return {name: (HERE / name).read_text() for name in names}


@functools.cache
def runtime() -> c.CDLL:
    """Fibers, scheduler and checker; global, since every kernel calls them."""
    sources = read("host.h", "runtime.h", "runtime.cpp", "checker.cpp")
    sources["both.cpp"] = '#include "runtime.cpp"\n#include "checker.cpp"\n'
    library = c.CDLL(str(compile_once("runtime", [*MACHINE, "-O2", "-g"], sources)), c.RTLD_GLOBAL)
    library.host_allocate.restype = c.c_void_p
    library.host_allocate.argtypes = [c.c_size_t]
    library.host_free.argtypes = [c.c_void_p, c.c_size_t]
    return library


@functools.lru_cache(maxsize=4096)
def kernel(source: str, expression: str) -> c.CDLL:
    """The library of one kernel, named by a C++ expression such as ``scale<float, 4>``."""
    runtime()
    body = DYNAMIC.sub(_pointer, source)
    text = f'#include "cuda.h"\n#line 1 "kernel.cu"\n{body}\nHOST_KERNEL({expression})\n'
    path = compile_once("kernel", KERNEL, {**read("host.h", "cuda.h"), expression: text})
    return c.CDLL(str(path))


def _pointer(declaration: re.Match[str]) -> str:
    element, name = declaration.groups()
    return f"static {element}* const {name} = reinterpret_cast<{element}*>(host::dynamic_shared);"
