"""The CUDA emulation itself: it catches every planted bug, and passes each one's correct twin."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from cuda_host import HostDevice, KernelFault, Launch, unavailable
from cuda_host.build import BuildError

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))

ORDERS: list[dict[str, Any]] = [
    {"order": "ascending"},
    {"order": "descending"},
    *({"order": "random", "seed": seed} for seed in range(4)),
]


def launch(
    device: HostDevice,
    source: str,
    *args: Any,
    kernel: str = "k",
    grid: tuple[int, int, int] = (1, 1, 1),
    block: tuple[int, int, int] = (128, 1, 1),
    shared: int = 0,
    cooperative: bool = False,
) -> None:
    device.launch(Launch(source, kernel, grid, block, shared, cooperative, args))


@dataclass(frozen=True)
class Bug:
    """A correct kernel, and the one replacement that breaks it."""

    name: str
    kind: str  # a pattern for the fault's kind, or DIFFER
    right: str
    wrong: str
    body: str
    grid: int = 1
    block: int = 128
    n: int = 128
    launches: int = 1

    def source(self, planted: bool) -> str:
        source = HEAD + "__global__ void k(ARGS) {" + self.body + "}\n"
        assert source.count(self.right) == 1
        return source.replace(self.right, self.wrong) if planted else source


DIFFER = "the results differ"  # from order to order, or from one launch to the next

HEAD = """
#define ARGS const float* x, float* y, float* parts, unsigned* word, int n
__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int o = 16; o > 0; o >>= 1) v += __shfl_xor_sync(~0u, v, o);
  return v;
}
// All blocks meet; one thread of each calls it. The word counts on from launch to launch.
__device__ __forceinline__ void grid_barrier(unsigned* word, unsigned blocks) {
  __threadfence();
  const unsigned generation = atomicAdd(word, 1u) / blocks;
  while (*(volatile unsigned*)word / blocks == generation) __nanosleep(32);
  __threadfence();
}
"""
COPY = """
  if (threadIdx.x < n) y[threadIdx.x] = x[threadIdx.x];
"""
REDUCE = """
  __shared__ float s[4];
  const int t = threadIdx.x, w = t / 32;
  const float a = warp_sum(x[t]);
  if (t % 32 == 0) s[w] = a;
  __syncthreads();
  const float mean = (s[0] + s[1] + s[2] + s[3]) / 128;
  __syncthreads();  // before s is used again
  const float b = warp_sum((x[t] - mean) * (x[t] - mean));
  if (t % 32 == 0) s[w] = b;
  __syncthreads();
  y[t] = mean + s[0] + s[1] + s[2] + s[3];
"""
BRANCHES = """
  if (threadIdx.x < 64) {
    y[threadIdx.x] = 1;
  } else {
    y[threadIdx.x] = 2;
  }
  __syncthreads();
"""
LOOP = """
  for (int i = threadIdx.x; i < 256; i += 128) {
    __syncthreads();
    y[i % 128] = x[i % 128];
  }
"""
SWAP = """
  __shared__ float s[128];
  const int t = threadIdx.x;
  s[t] = x[t];
  __syncwarp();
  y[t] = s[t ^ 1];
"""
HALVES = """
  float v = x[threadIdx.x];
  if (threadIdx.x % 32 < 16) {
    v += __shfl_xor_sync(0x0000ffffu, v, 1);
  } else {
    v -= __shfl_xor_sync(0xffff0000u, v, 2);
  }
  y[threadIdx.x] = v;
"""
TAIL = """
  float v = threadIdx.x < n ? x[threadIdx.x] : 0.f;
  v += __shfl_down_sync(~0u, v, 16);
  if (threadIdx.x < n) y[threadIdx.x] = v;
"""
STATIC = """
  __shared__ float s[128];
  s[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  float sum = 0;
  for (int i = 0; i < n; ++i) sum += s[i];
  y[threadIdx.x] = sum;
"""
DYNAMIC = """
  extern __shared__ __align__(16) unsigned char raw[];
  float* s = reinterpret_cast<float*>(raw);
  s[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = s[127 - threadIdx.x];
"""
VECTOR = """
  if (threadIdx.x < 31) {
    const float4 v = reinterpret_cast<const float4*>(x)[threadIdx.x];
    reinterpret_cast<float4*>(y)[threadIdx.x] = v;
  }
"""
INDEX = """
  const long long i = (long long)n * n + int(x[0]);
  y[threadIdx.x] = x[i & 127];
"""
LAST_BLOCK = """
  __shared__ bool last;
  const int t = threadIdx.x, b = blockIdx.x;
  parts[b * 32 + t] = x[b * 32 + t];
  __syncthreads();  // all parts are written
  if (t == 0) {
    __threadfence();  // before the ticket
    last = atomicInc(word, gridDim.x - 1) == gridDim.x - 1;
    __threadfence();  // after the ticket
  }
  __syncthreads();  // last is known
  if (!last) return;
  float sum = 0;
  for (int i = t; i < 128; i += 32) sum += parts[i];
  y[t] = sum;
"""
EXCHANGE = """
  const int b = blockIdx.x;
  parts[b] = x[b];
  grid_barrier(word, gridDim.x);
  y[b] = parts[(b + 1) % gridDim.x];
"""
WARPS = """
  const int t = threadIdx.x, i = blockIdx.x * 32 + t;
  parts[i] = x[i];
  __syncwarp();  // all lanes have written
  if (t == 0) grid_barrier(word, gridDim.x);
  __syncwarp();  // all blocks have
  y[i] = parts[(i + 40) % 128];
"""
FLAG = """
  if (blockIdx.x == 0) {
    parts[0] = x[1];
    __threadfence();  // before the flag
    atomicExch(word, 1u);
  } else {
    while (*(volatile unsigned*)word == 0u) __nanosleep(32);
    __threadfence();  // after the flag
    y[0] = parts[0];
  }
"""
NEIGHBOUR = """
  y[threadIdx.x] = y[threadIdx.x] + 1;
"""
ARRIVAL = """
  y[blockIdx.x] = x[blockIdx.x];
"""
COUNT = """
  atomicAdd(y, 1.f);
"""

BUGS = [
    # shared memory and __syncthreads
    Bug("no barrier before shared is read", "data race|uninitialised read",
        "s[w] = a;\n  __syncthreads();", "s[w] = a;", REDUCE),
    Bug("no barrier before shared is reused", "data race",
        "__syncthreads();  // before s is used again", "", REDUCE),
    Bug("every lane writes", "data race", "if (t % 32 == 0) s[w] = b;", "s[w] = b;", REDUCE),
    Bug("one warp does not write", "uninitialised read",
        "if (t % 32 == 0) s[w] = a;", "if (t % 32 == 0 && w) s[w] = a;", REDUCE),
    Bug("barrier in one branch", "divergent barrier",
        "= 2;", "= 2; __syncthreads();\n", BRANCHES),
    Bug("return before a barrier", "divergent barrier", "= 2;", "= 2; return;", BRANCHES),
    Bug("barrier in a loop of unequal lengths", "divergent barrier", "i < 256", "i < 200", LOOP),
    Bug("one lane in a warp operation, the others in a barrier", "deadlock",
        "= 2;", "= 2; if (threadIdx.x == 96) __syncwarp();", BRANCHES),
    # warps
    Bug("no __syncwarp", "data race|uninitialised read", "__syncwarp();", "", SWAP),
    Bug("a shuffle instead of __syncwarp", "data race",
        "__syncwarp();", "__shfl_sync(~0u, t, 0);", SWAP),
    Bug("__syncwarp of other lanes", "data race|uninitialised read",
        "__syncwarp();", "__syncwarp(t & 1 ? 0xaaaaaaaau : 0x55555555u);", SWAP),
    Bug("shuffle without its own lane", "divergent warp", "0xffff0000u", "0x0000ffffu", HALVES),
    Bug("shuffles of two branches meet", "divergent warp", "0x0000ffffu", "~0u",
        HALVES),
    Bug("shuffle from a lane outside the mask", "divergent warp",
        "(0x0000ffffu, v, 1)", "(0x0000ffffu, v, 16)", HALVES),
    Bug("shuffle without the lanes past the end", "divergent warp",
        "v += __shfl_down", "if (threadIdx.x < n) v += __shfl_down", TAIL, n=100),
    # addresses
    Bug("reads one past the end", "out of bounds", "x[threadIdx.x]", "x[threadIdx.x + 1]", COPY),
    Bug("reads one before the start", "out of bounds",
        "x[threadIdx.x]", "x[(int)threadIdx.x - 1]", COPY),
    Bug("writes one past the end", "out of bounds", "x < n", "x <= n",
        COPY.replace("= x[threadIdx.x]", "= n"), block=160),
    Bug("static shared one past the end", "out of bounds|uninitialised read",
        "i < n", "i <= n", STATIC),
    Bug("dynamic shared one past the end", "out of bounds", "s[127 -", "s[128 -", DYNAMIC),
    Bug("misaligned vector load", "misaligned", "float4*>(x)", "float4*>(x + 1)", VECTOR),
    Bug("index too narrow", "undefined behaviour", "(long long)n * n", "n * n", INDEX, n=1 << 16),
    Bug("float too large for an int", "undefined behaviour",
        "int(x[0])", "int(1e20f + x[0])", INDEX),
    Bug("null pointer", "out of bounds", "y[threadIdx.x] = x", "((float*)nullptr)[0] = x", COPY),
    Bug("writes through const", "write to const",
        "y[threadIdx.x] = x[", "const_cast<float*>(x)[threadIdx.x] = 1 + x[", COPY),
    # between blocks
    Bug("last block: no barrier before the ticket", "data race",
        "__syncthreads();  // all parts are written", "", LAST_BLOCK, 4, 32),
    Bug("last block: no fence before the ticket", "data race",
        "__threadfence();  // before the ticket", "", LAST_BLOCK, 4, 32),
    Bug("last block: no fence after the ticket", "data race",
        "__threadfence();  // after the ticket", "", LAST_BLOCK, 4, 32),
    Bug("last block: no barrier after the ticket", "data race|uninitialised read",
        "__syncthreads();  // last is known", "", LAST_BLOCK, 4, 32),
    Bug("last block: one part is missing", "uninitialised read",
        "parts[b * 32 + t] =", "if (t < 31) parts[b * 32 + t] =", LAST_BLOCK, 4, 32),
    Bug("last block: the ticket stays", DIFFER,
        "atomicInc(word, gridDim.x - 1)", "atomicAdd(word, 1u)", LAST_BLOCK, 4, 32, launches=2),
    Bug("flag: no fence before", "data race",
        "__threadfence();  // before the flag", "", FLAG, 2, 1),
    Bug("flag: no fence after", "data race",
        "__threadfence();  // after the flag", "", FLAG, 2, 1),
    Bug("flag: not volatile", "data race",
        "(volatile unsigned*)word == 0u", "word == 0u", FLAG, 2, 1),
    Bug("flag: set by a plain store", "data race",
        "atomicExch(word, 1u)", "*word = 1u", FLAG, 2, 1),
    Bug("flag: never set", "deadlock", "atomicExch(word, 1u);", "", FLAG, 2, 1),
    Bug("grid barrier: left out", "data race|uninitialised read",
        "grid_barrier(word, gridDim.x);", "", EXCHANGE, 4, 1, launches=2),
    Bug("grid barrier: no fence on arrival", "data race",
        "  __threadfence();\n  const", "  const", EXCHANGE, 4, 1, launches=2),
    Bug("grid barrier: no fence on leaving", "data race",
        "(32);\n  __threadfence();", "(32);", EXCHANGE, 4, 1, launches=2),
    Bug("grid barrier: waits for a block too many", "deadlock",
        "grid_barrier(word, gridDim.x)", "grid_barrier(word, gridDim.x + 1)", EXCHANGE, 4, 1),
    Bug("grid barrier: no __syncwarp before", "data race",
        "__syncwarp();  // all lanes have written", "", WARPS, 4, 32, launches=2),
    Bug("grid barrier: no __syncwarp after", "data race|uninitialised read",
        "__syncwarp();  // all blocks have", "", WARPS, 4, 32, launches=2),
    Bug("blocks write one place", "data race", "y[b] =", "y[0] =", EXCHANGE, 4, 1),
    Bug("in place, from a neighbour", "data race",
        "= y[threadIdx.x] + 1", "= y[(threadIdx.x + 1) & 127] + 1", NEIGHBOUR),
    Bug("results in order of arrival", DIFFER,
        "y[blockIdx.x]", "y[atomicAdd(word, 1u)]", ARRIVAL, 4, 1),
    Bug("sum in order of arrival", DIFFER, "1.f", "x[blockIdx.x]", COUNT, 64, 1),
]  # fmt: skip


def results(bug: Bug, planted: bool, device: HostDevice) -> list[bytes]:
    """The output of each launch. x is a view, with memory of the same array on both sides."""
    base = np.random.default_rng(0).standard_normal(144).astype(np.float32)
    x, word = device.array(base)[8:136], device.array(np.zeros(1, np.uint32))
    outputs = []
    for _ in range(bug.launches):
        y, parts = device.array(np.zeros(128, np.float32)), device.empty(128, np.float32)
        args = x, y, parts, word, np.int32(bug.n)
        blocks, threads = (bug.grid, 1, 1), (bug.block, 1, 1)
        launch(device, bug.source(planted), *args, grid=blocks, block=threads, shared=512)
        outputs.append(y.tobytes())
    return outputs


@pytest.mark.parametrize("bug", BUGS, ids=lambda b: b.name)
def test_planted_bug(bug: Bug) -> None:
    """Caught by its name, in every order of blocks and threads."""
    devices = [HostDevice(check=True, **order) for order in ORDERS]
    if bug.kind == DIFFER:
        assert len({y for device in devices for y in results(bug, True, device)}) > 1
        return
    for device in devices:
        with pytest.raises(KernelFault) as caught:
            results(bug, True, device)
        assert caught.value.kind in bug.kind.split("|"), str(caught.value)
        print(caught.value)


@pytest.mark.parametrize("check", [False, True], ids=["plain", "check"])
@pytest.mark.parametrize("bug", BUGS, ids=lambda b: b.name)
def test_correct_twin(bug: Bug, check: bool) -> None:
    """No false alarm, and the same bits in every order and from every launch."""
    devices = [HostDevice(check=check, **order) for order in ORDERS]
    assert len({y for device in devices for y in results(bug, False, device)}) == 1


PLAIN_KINDS = "divergent barrier|divergent warp|deadlock|misaligned"


@pytest.mark.parametrize("bug", [b for b in BUGS if b.kind in PLAIN_KINDS], ids=lambda b: b.name)
def test_caught_without_the_checker(bug: Bug) -> None:
    """What needs no watching of accesses is noticed at full speed too."""
    for order in ORDERS:
        with pytest.raises(KernelFault) as caught:
            results(bug, True, HostDevice(**order))
        assert caught.value.kind == bug.kind


def run(
    body: str, *args: Any, device: HostDevice | None = None, parameters: str = "", **options: Any
) -> None:
    source = f"template <class T> __global__ void k({parameters}) {{ {body} }}\n"
    launch(device or HostDevice(), source, *args, kernel="k<float>", **options)


def test_guard_page() -> None:
    """Even the plain run stops at the end of an array."""
    x = HostDevice().empty(4, np.float32)
    with pytest.raises(KernelFault, match=r"0 bytes past the end of argument 0 \(16 bytes\)"):
        run("x[threadIdx.x] = 1;", x, parameters="T* x", block=(5, 1, 1))


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("timeout", 'while (n) asm volatile("" ::: "memory");'),
        ("trap", "if (threadIdx.x == n) __trap();"),
        ("stack overflow", "volatile char big[1 << 18]; for (int i = 0; i < n; ++i) big[i] = 1;"),
        ("undefined behaviour", "volatile int m = n / int(threadIdx.x);"),
    ],
)
@pytest.mark.parametrize("check", [False, True])
def test_crashes(kind: str, body: str, check: bool) -> None:
    """A crash is an exception, and the next launch works."""
    device = HostDevice(check, seconds=1)
    with pytest.raises(KernelFault, match=r"block \(0, 0, 0\) thread .* at kernel.cu:1") as caught:
        run(body, np.int32(3), device=device, parameters="int n")
    assert caught.value.kind == kind
    run("", device=device)


def test_blocks_that_wait_must_be_resident() -> None:
    arrays = [HostDevice().array(np.zeros(128, np.float32)) for _ in range(3)]
    args = *arrays, HostDevice().array(np.zeros(1, np.uint32)), np.int32(0)
    source = HEAD + "__global__ void k(ARGS) {" + EXCHANGE + "}\n"
    shape = {"grid": (4, 1, 1), "block": (1, 1, 1)}
    launch(HostDevice(resident=4), source, *args, **shape)
    with pytest.raises(KernelFault, match=r"deadlock: .*3 blocks resident, 1 not st") as caught:
        launch(HostDevice(resident=3), source, *args, **shape)
    assert "block (2, 0, 0): 0 threads have returned\n    1 in a spin loop" in str(caught.value)
    with pytest.raises(KernelFault, match="4 blocks, of which 3 can be resident"):
        run("", grid=(4, 1, 1), cooperative=True, device=HostDevice(resident=3))


def test_blocks_have_their_own_shared_memory() -> None:
    """Blocks that take turns, with static and dynamic shared memory of each template instance."""
    source = """
    template <int N> __device__ float* own() { __shared__ float s[N]; return s; }
    template <int N> __global__ void k(float* y, unsigned* word) {
      extern __shared__ float d[];
      float* s = own<N>();
      *s = d[1] = blockIdx.x;
      d[0] = 1;
      __threadfence();
      atomicAdd(word, 1u);
      while (*(volatile unsigned*)word < gridDim.x) __nanosleep(1);
      y[blockIdx.x] = *s + 10 * d[1] + 100 * d[0];
    }"""
    for order in ORDERS:
        device = HostDevice(check=True, **order)
        y, word = device.empty(5, np.float32), device.array(np.zeros(1, np.uint32))
        options = {"grid": (5, 1, 1), "block": (1, 1, 1), "shared": 8, "cooperative": True}
        launch(device, source, y, word, kernel="k<7>", **options)
        assert y.tolist() == [100, 111, 122, 133, 144]


def test_python_threads_take_turns() -> None:
    source = "__global__ void k(float* y) {\n  const float* x = y;\n" + SWAP + "}\n"
    device, start = HostDevice(check=True), np.arange(128, dtype=np.float32)

    def work(_: int) -> bool:
        y = device.array(start)
        for _ in range(10):
            launch(device, source, y)
        return bool((y == start).all())

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(8)))


def test_indices_and_votes() -> None:
    source = """
    __global__ void k(int* y) {
      const int t = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
      const int b = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
      const unsigned odd = __ballot_sync(~0u, t & 1);
      y[b * 64 + t] = t + (odd == 0xaaaaaaaau && __any_sync(~0u, t == 33) == (t > 31))
                      + 100 * __syncthreads_count(t < 10);
    }"""
    y = HostDevice().empty((12, 64), np.int32)
    launch(HostDevice(check=True), source, y, grid=(2, 3, 2), block=(4, 8, 2))
    assert (y == np.arange(64) + 1001).all()


def test_shuffles() -> None:
    source = """
    template <class T> __global__ void k(T* y) {
      const int t = threadIdx.x;
      const T v = T(t) * T(1.5);
      y[t] = __shfl_sync(~0u, v, 3, 8);
      y[32 + t] = __shfl_up_sync(~0u, v, 2);
      y[64 + t] = __shfl_down_sync(~0u, v, 5, 16);
      y[96 + t] = __shfl_xor_sync(~0u, v, 7);
    }"""
    t = np.arange(32)
    expected = [t // 8 * 8 + 3, np.where(t < 2, t, t - 2), np.where(t % 16 < 11, t + 5, t), t ^ 7]
    for name, dtype in ("float", np.float32), ("double", np.float64):
        y = HostDevice().empty((4, 32), dtype)
        launch(HostDevice(), source, y, kernel=f"k<{name}>", block=(32, 1, 1))
        assert (y == 1.5 * np.array(expected)).all()


# Each in turn, so that an atomic returns what the one before it left.
INTRINSICS: dict[str, float] = {
    "sqrtf(9.f)": 3,
    "sqrt(9.0) + fabs(-1.0) + fabsf(-1.f)": 5,
    "rsqrtf(4.f) + rsqrt(4.0) + __frsqrt_rn(4.f)": 1.5,
    "__frcp_rn(4.f) + __fdividef(1.f, 2.f) + __fdiv_rn(1.f, 4.f) + __fsqrt_rn(4.f)": 3,
    "fmaf(2.f, 3.f, 4.f) + fma(2.0, 3.0, 4.0)": 20,
    "__fmaf_rn(1.f, 1.f, 1.f) + __fma_rn(1.0, 1.0, 1.0)": 4,
    "__fadd_rn(1.f, 2.f) + __fsub_rn(5.f, 1.f) + __fmul_rn(2.f, 3.f)": 13,
    "__dadd_rn(1.0, 2.0) + __dsub_rn(5.0, 1.0) + __dmul_rn(2.0, 3.0)": 13,
    "fminf(1.f, 2.f) + fmaxf(1.f, 2.f) + fmin(1.0, 2.0) + fmax(1.0, 2.0)": 6,
    "fminf(1.f, __uint_as_float(0x7fc00000u)) + fmaxf(__uint_as_float(0x7fc00000u), 1.f)": 2,
    "min(1, 2) + max(1u, 2u) + min(1.f, 2.f) + max(1.0, 2.0) + min(1ll, 2ll)": 7,
    "floorf(-1.5f) + ceilf(-1.5f) + rintf(2.5f) + floor(1.5) + ceil(1.5) + rint(3.5)": 6,
    "copysignf(2.f, -1.f) + copysign(3.0, -1.0)": -5,
    "ldexpf(1.f, 3) + ldexp(1.0, -1) + scalbnf(1.f, 3) + scalbn(1.0, -1)": 17,
    "frexpf(6.f, &i)": 0.75,
    "frexp(48.0, &i)": 0.75,
    "i": 6,
    "isnan(0.f) + isinf(__uint_as_float(0x7f800000u)) + isfinite(1.0) + signbit(-1.f)": 3,
    "__popc(255u) + __clz(1) + __ffs(8)": 43,
    "__umulhi(0x80000000u, 6u) + __umul64hi(1ull << 63, 6ull)": 6,
    "__float_as_uint(1.f) + __float_as_int(1.f) - 2 * 0x3f800000": 0,
    "__int_as_float(0x3f800000) + __longlong_as_double(__double_as_longlong(2.0))": 3,
    "make_float4(1, 2, 3, 4).w + make_uint2(1, 2).y + make_double2(1, 2).x": 7,
    "sizeof(uint4) + sizeof(ushort4) + sizeof(float2) + alignof(uint4) + alignof(ushort4)": 56,
    "alignof(double2) + alignof(int2) + alignof(short2)": 28,
    "__ldg(word) + __ldcg(word) + __ldcs(word)": 0,
    "(__stcg(word, 2u), *word)": 2,
    "(__stcs(word, 5u), *word)": 5,
    "atomicAdd(word, 3u)": 5,
    "atomicSub(word, 2u)": 8,
    "atomicExch(word, 4u)": 6,
    "atomicMax(word, 9u)": 4,
    "atomicMin(word, 5u)": 9,
    "atomicAnd(word, 4u)": 5,
    "atomicOr(word, 3u)": 4,
    "atomicInc(word, 7u)": 7,
    "atomicCAS(word, 0u, 1u)": 0,
    "*word": 1,
    "warpSize": 32,
}
_LINES = "\n".join(f"  y[{n}] = {expression};" for n, expression in enumerate(INTRINSICS))
INTRINSICS_SOURCE = f"""
__global__ void k(double* y, unsigned* word) {{
  int i = 0;
{_LINES}
}}
"""


def test_intrinsics() -> None:
    """Their values; test_cuda_compile.py holds that NVRTC knows them too."""
    y, word = HostDevice().empty(len(INTRINSICS), np.float64), np.zeros(1, np.uint32)
    launch(HostDevice(check=True), INTRINSICS_SOURCE, y, word, block=(1, 1, 1))
    assert dict(zip(INTRINSICS, y.tolist(), strict=True)) == INTRINSICS


def test_flush_to_zero() -> None:
    for ftz in True, False:
        y = HostDevice().array(np.array([2.0**-130], np.float32))
        run("*y = *y + *y;", y, parameters="T* y", block=(1, 1, 1), device=HostDevice(ftz=ftz))
        assert y[0] == (0 if ftz else 2.0**-129)


@pytest.mark.parametrize(
    ("parameter", "argument", "message"),
    [
        ("int n", 1, "1, the kernel takes i4"),
        ("float f", 1.0, "1.0, the kernel takes f4"),
        ("int n", np.int64(1), r"np.int64\(1\), the kernel takes i4"),
        ("unsigned n", np.int32(1), r"np.int32\(1\), the kernel takes u4"),
        ("double f", np.float32(1), r"np.float32\(1.0\), the kernel takes f8"),
        ("int n", None, "None, the kernel takes i4"),
        ("int n", np.zeros(1, np.int32), "an array of int32, the kernel takes i4"),
        ("const T* x", np.zeros(1), "an array of float64, the kernel takes a pointer to f4"),
        ("T* x", np.zeros(1, np.int32), "an array of int32, the kernel takes a pointer to f4"),
        ("unsigned short* x", np.zeros(1, np.float32), "an array of float32, .* pointer to w2"),
        ("T* x", np.uint64(0), r"np.uint64\(0\), the kernel takes a pointer to f4"),
    ],
)
def test_wrong_argument(parameter: str, argument: Any, message: str) -> None:
    """CuPy would pass the bits as they are."""
    with pytest.raises(TypeError, match=f"k<float>: argument 1 is {message}"):
        run("", None, argument, parameters=f"const T* __restrict__ first, {parameter}")


def test_right_arguments() -> None:
    """Null pointers, halves as raw words, anything for void, structs of the right size."""
    bf16, f16 = np.zeros(3, ml_dtypes.bfloat16), np.zeros(3, np.float16)
    geometry = np.array([(3, 2.5)], np.dtype([("n", "i4"), ("f", "f4")]))[0]
    source = """
    struct Half { unsigned short bits; };
    struct Geometry { int n; float f; };
    __global__ void k(const unsigned short* a, Half* b, void* c, float* d, Geometry g, bool e) {
      if (d || !e || g.n != 3 || g.f != 2.5f) __trap();
    }"""
    launch(HostDevice(), source, bf16, f16, bf16, None, geometry, np.bool_(True))
    with pytest.raises(TypeError, match="5 arguments for 6 parameters"):
        launch(HostDevice(), source, bf16, f16, bf16, None, geometry)


@pytest.mark.parametrize(
    "wrong",
    [
        {"block": (1025, 1, 1)},
        {"block": (0, 1, 1)},
        {"block": (1, 1, 65)},
        {"grid": (1, 65536, 1)},
        {"shared": 228 << 10},
    ],
    ids=str,
)
def test_wrong_launch(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="no GPU runs"):
        run("", **wrong)


def test_overlapping_arguments() -> None:
    """x is the const argument and the output at once: what `out=x` does."""
    x = HostDevice().array(np.arange(128, dtype=np.float32))
    run("y[threadIdx.x] = 2 * x[threadIdx.x];", x, x, parameters="const T* x, T* y",
        device=HostDevice(check=True))  # fmt: skip
    assert (x == 2 * np.arange(128)).all()


def test_array_keeps_the_order_of_axes() -> None:
    x = np.arange(2 * 3 * 4 * 5.0).reshape(2, 4, 5, 3).transpose(0, 3, 1, 2)
    copy = HostDevice().array(x, offset=1)
    assert (copy == x).all()
    assert copy.strides == x.strides
    assert copy.ctypes.data % 16 == 8


def test_compiler_messages() -> None:
    with pytest.raises(BuildError, match=r"(?s)k<float>: g\+\+ .*kernel.cu:1:.*undefined"):
        run("undefined = 1;")
