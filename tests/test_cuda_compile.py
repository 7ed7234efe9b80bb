"""Every kernel that the planner can ask for compiles, with no GPU, to what it was meant to be."""

import fnmatch
import itertools
import re

import nvrtc
import pytest
import test_cuda_host

from normkit.backends.cuda import planner

pytestmark = pytest.mark.skipif(nvrtc.unavailable() is not None, reason=str(nvrtc.unavailable()))

ARCH = 90
OTHERS = (75, 80, 86, 89, 100, 120)
REGISTERS = 65536  # of a multiprocessor, which a block must not exceed
TOGETHER = 16  # specialisations in one compilation: each reads the whole source

# Kernels (a pattern of "sm_90 name") that may spill, and why.
SPILLS: dict[str, str] = {}


def template_and_dtype(name: str) -> str:
    """``nk::forward<float, ..., 3>`` -> ``nk::forward<float``."""
    return re.split(r"[,>]", name)[0]


def for_arch(arch: int) -> list[str]:
    """What to compile: for ARCH all, for the others one of each template and dtype."""
    every = [name for _, name in planner.specialisations()]
    if arch == ARCH:
        return every
    kinds = itertools.groupby(sorted(every, key=template_and_dtype), template_and_dtype)
    return [group[arch % len(group)] for group in (list(names) for _, names in kinds)]


def compilations() -> list[object]:
    """Architectures with the names of some kernels of one source each."""
    found = []
    for arch in (ARCH, *OTHERS):
        wanted = for_arch(arch)
        count = -(-len(wanted) // TOGETHER)
        for i in range(count):  # costly ones are neighbours: each compilation has some
            some = wanted[i::count]
            found.append(pytest.param(arch, some, id=f"sm_{arch}-{some[0]}"))
    return found


def complaints(arch: int, expression: str, kernel: nvrtc.Kernel) -> list[str]:
    """What is wrong with a kernel; its name says the vector's length and what it does."""
    found = []
    excused = any(fnmatch.fnmatch(f"sm_{arch} {expression}", pattern) for pattern in SPILLS)
    if (kernel.spilled or kernel.stack) and not excused:
        found.append(f"spills {kernel.spilled} bytes, {kernel.stack} bytes of local memory")
    if kernel.registers * kernel.threads > REGISTERS:
        found.append(f"{kernel.registers} registers in blocks of {kernel.threads} threads")
    walk = re.search(r"nk::(?:Rows|Columns|Runs)<(\d+)>.* (\d+)>$", expression)
    n, stage = map(int, walk.groups()) if walk else (1, 0)
    vectors = n > 1 and arch == ARCH
    if vectors and not kernel.wide("LDG"):
        found.append("no load of 16 bytes")
    if vectors and stage & planner.APPLY and not kernel.wide("STG"):
        found.append("no store of 16 bytes")
    return found


@pytest.mark.parametrize(("arch", "names"), compilations())
def test_compiles(arch: int, names: list[str]) -> None:
    kernels = nvrtc.kernels(planner.source(), names, arch, planner.OPTIONS, arch == ARCH)
    wrong = {name: complaints(arch, name, kernel) for name, kernel in kernels.items()}
    assert not {name: what for name, what in wrong.items() if what}


# ---- the means of checking


def test_options_are_those_of_cupy() -> None:
    options = nvrtc.options_of_cupy(planner.OPTIONS, 86)
    assert {*planner.OPTIONS, "-ftz=true", "-arch=sm_86"} <= set(options)


def test_what_ptxas_says() -> None:
    """A kernel that must spill, one that need not, one of 16-byte vectors."""
    source = """
    template <int N> __global__ void __launch_bounds__(1024) hold(const float* x, float* y, int n) {
      float v[N];
      for (int i = 0; i < N; ++i) v[i] = x[i * n + threadIdx.x];
      __syncthreads();
      for (int i = 0; i < N; ++i) y[i * n + threadIdx.x] = v[N - 1 - i] * v[i];
    }
    __global__ void vectors(const float4* x, float4* y) { y[threadIdx.x] = x[threadIdx.x]; }
    """
    names = ["hold<8>", "hold<128>", "vectors"]
    kernels = nvrtc.kernels(source, names, ARCH, planner.OPTIONS, disassemble=True)
    few, many, vectors = kernels.values()
    assert (few.spilled, few.stack, few.threads) == (0, 0, 1024)
    assert many.spilled > 0
    assert many.stack > 0
    assert (few.wide("LDG"), few.wide("STG")) == (0, 0)
    assert (vectors.wide("LDG"), vectors.wide("STG")) == (1, 1)
    assert complaints(ARCH, "nk::f<nk::Rows<4>, 3>", few) == [
        "no load of 16 bytes",
        "no store of 16 bytes",
    ]
    assert complaints(ARCH, "hold<128>", many)[0].startswith("spills")


def test_compiler_messages() -> None:
    with pytest.raises(nvrtc.CompileError, match=r'(?s)sm_90: k: .*kernel.cu.*"undefined"'):
        nvrtc.kernels("__global__ void k() { undefined = 1; }", ["k"], ARCH, planner.OPTIONS)


def test_emulated_intrinsics_are_real() -> None:
    """What tests/cuda_host/cuda.h offers, NVRTC knows without a header."""
    nvrtc.kernels(test_cuda_host.INTRINSICS_SOURCE, ["k"], ARCH, planner.OPTIONS)
