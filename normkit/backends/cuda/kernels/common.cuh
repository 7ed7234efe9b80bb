// Values, vectors of values, and sums in a fixed order. Compiled with -fmad=false: what is fused is
// written as fma, so that every specialisation gives the same bits.
namespace nk {
typedef long long i64;
typedef unsigned u32;
typedef unsigned short u16;

// ------------------------------------------------------------------------------------- values
struct half { u16 bits; };
struct bfloat { u16 bits; };

template <class T> struct Arithmetic { typedef float type; };
template <> struct Arithmetic<double> { typedef double type; };

__device__ __forceinline__ float widen(half h) {
#if NK_HOST
  _Float16 f;
  __builtin_memcpy(&f, &h.bits, 2);
  return (float)f;
#else
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h.bits));
  return f;
#endif
}
__device__ __forceinline__ float widen(bfloat h) { return __uint_as_float((u32)h.bits << 16); }
__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ double widen(double v) { return v; }

__device__ __forceinline__ void narrow(float v, half& h) {
#if NK_HOST
  _Float16 f = (_Float16)v;
  __builtin_memcpy(&h.bits, &f, 2);
#else
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h.bits) : "f"(v));
#endif
}
__device__ __forceinline__ void narrow(float v, bfloat& h) {
#if !NK_HOST && __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h.bits) : "f"(v));
#else
  const u32 u = __float_as_uint(v);
  h.bits = v != v ? 0x7fff : (u16)((u + 0x7fffu + (u >> 16 & 1)) >> 16);
#endif
}
__device__ __forceinline__ void narrow(float v, float& f) { f = v; }
__device__ __forceinline__ void narrow(double v, double& f) { f = v; }

// A value of a dtype known by its place in this list.
enum { FLOAT, DOUBLE, HALF, BFLOAT };
__device__ __forceinline__ double get(const void* p, int kind, i64 i) {
  if (kind == FLOAT) return ((const float*)p)[i];
  if (kind == DOUBLE) return ((const double*)p)[i];
  return kind == HALF ? widen(((const half*)p)[i]) : widen(((const bfloat*)p)[i]);
}
__device__ __forceinline__ void put(void* p, int kind, i64 i, double v) {
  if (kind == FLOAT) ((float*)p)[i] = (float)v;
  else if (kind == DOUBLE) ((double*)p)[i] = v;
  else if (kind == HALF) narrow((float)v, ((half*)p)[i]);
  else narrow((float)v, ((bfloat*)p)[i]);
}

// ------------------------------------------------------------------------------------ vectors
// N neighbouring values, as the whole words that memory accesses move.
template <class T, int N> struct Vec {
  typedef typename Arithmetic<T>::type A;
  static constexpr int BYTES = N * sizeof(T), WORDS = (BYTES + 3) / 4;
  u32 w[WORDS];

  __device__ __forceinline__ T get(int k) const {
    if constexpr (sizeof(T) == 8)
      return __longlong_as_double((i64)w[2 * k + 1] << 32 | w[2 * k]);
    else if constexpr (sizeof(T) == 4)
      return __uint_as_float(w[k]);
    else
      return T{(u16)(w[k / 2] >> 16 * (k % 2))};
  }
  __device__ __forceinline__ void open(A (&f)[N]) const {
#pragma unroll
    for (int k = 0; k < N; ++k) f[k] = widen(get(k));
  }
  __device__ __forceinline__ void close(const A (&f)[N]) {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      if constexpr (sizeof(T) == 8) {
        const i64 bits = __double_as_longlong(f[k]);
        w[2 * k] = (u32)bits, w[2 * k + 1] = (u32)(bits >> 32);
      } else if constexpr (sizeof(T) == 4) {
        w[k] = __float_as_uint(f[k]);
      } else {
        T h;
        narrow(f[k], h);
        w[k / 2] = k % 2 ? w[k / 2] | (u32)h.bits << 16 : h.bits;
      }
    }
  }
};

// Words s/4 ... of eight, from a place s bytes behind the first.
template <int UNIT> __device__ __forceinline__ void shift(u32 (&w)[8], u32 s) {
#pragma unroll
  for (int i = 0; i < 6; ++i) w[i] = s & 8 ? w[i + 2] : w[i];
#pragma unroll
  for (int i = 0; i < 5; ++i) w[i] = s & 4 ? w[i + 1] : w[i];
  if constexpr (UNIT == 2) {
#pragma unroll
    for (int i = 0; i < 4; ++i) w[i] = s & 2 ? w[i] >> 16 | w[i + 1] << 16 : w[i];
  }
}

// The 16 aligned bytes at q. A window that holds one value of an array is mapped as a whole; the
// emulation counts bytes, and is given those of the values [first, end) only.
template <class T> __device__ __forceinline__ uint4 window(const T* q, const T* first, const T* end) {
#if NK_HOST
  u32 w[4] = {0, 0, 0, 0};
  for (int k = 0; k < 16 / (int)sizeof(T); ++k)
    if (q + k >= first && q + k < end) __builtin_memcpy((T*)w + k, q + k, sizeof(T));
  return make_uint4(w[0], w[1], w[2], w[3]);
#else
  return *reinterpret_cast<const uint4*>(q);
#endif
}

// The first n of N values at p; the others are anything. ALIGNED: n is 0 or N, and p a multiple.
template <bool ALIGNED, int N, class T> __device__ __forceinline__ Vec<T, N> load(const T* p, int n) {
  Vec<T, N> v;
  constexpr int BYTES = Vec<T, N>::BYTES;
#pragma unroll
  for (int i = 0; i < Vec<T, N>::WORDS; ++i) v.w[i] = 0;
  if (n <= 0) return v;
  if constexpr (N == 1) {
    if constexpr (sizeof(T) == 2) v.w[0] = p->bits;
    else { typename Vec<T, 1>::A f[1] = {*p}; v.close(f); }
  } else {
#pragma unroll
    for (int i = 0; i < BYTES / 16; ++i) {           // parameters may be wider than x: two pieces
      constexpr int STEP = 16 / sizeof(T);
      const T* const at = p + i * STEP;
      if (ALIGNED) {
        const uint4 a = *reinterpret_cast<const uint4*>(at);
        v.w[4 * i] = a.x, v.w[4 * i + 1] = a.y, v.w[4 * i + 2] = a.z, v.w[4 * i + 3] = a.w;
      } else if (n > i * STEP) {
        const u32 s = (u32)(size_t)at & 15, lead = s / sizeof(T), rest = n - i * STEP;
        const T* const end = at + min(rest, (u32)STEP);
        const uint4 a = window(at - lead, at, end);
        const uint4 b = lead + rest > STEP && lead ? window(at - lead + STEP, at, end) : a;
        u32 w[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
        shift<sizeof(T)>(w, s);
        v.w[4 * i] = w[0], v.w[4 * i + 1] = w[1], v.w[4 * i + 2] = w[2], v.w[4 * i + 3] = w[3];
      }
    }
  }
  return v;
}

template <class T, int N> __device__ __forceinline__ void store_some(T* q, const Vec<T, N>& v, int from, int to) {
#pragma unroll
  for (int k = 0; k < N; ++k)
    if (k >= from && k < to) q[k] = v.get(k);
}

// The first n of N values to p. Where p is no multiple of 16 bytes, lanes exchange what they hold, so
// that all but the ends of a run are stored 16 bytes at a time: every lane of the warp must call.
// `first`, `last`: no lane before, behind this one holds the values before, behind it.
template <bool ALIGNED, int N, class T>
__device__ __forceinline__ void store(T* p, const Vec<T, N>& v, int n, bool first, bool last) {
  if constexpr (N == 1) {
    if (n > 0) *p = v.get(0);
  } else if constexpr (ALIGNED) {
    if (n > 0) *reinterpret_cast<uint4*>(p) = make_uint4(v.w[0], v.w[1], v.w[2], v.w[3]);
  } else {
    u32 w[8];
#pragma unroll
    for (int i = 0; i < 4; ++i) w[i] = __shfl_up_sync(~0u, v.w[i], 1), w[i + 4] = v.w[i];
    __syncwarp();  // p may be where the values came from
    if (n <= 0) return;
    const u32 s = (u32)(size_t)p & 15;
    const int lead = s / sizeof(T);
    Vec<T, N> out = v;
    if (lead) {
      shift<sizeof(T)>(w, 16 - s);
#pragma unroll
      for (int i = 0; i < 4; ++i) out.w[i] = w[i];
    }
    T* const q = p - lead;
    const int from = first ? lead : 0, to = min(N, lead + n);
    if (from == 0 && to == N) *reinterpret_cast<uint4*>(q) = make_uint4(out.w[0], out.w[1], out.w[2], out.w[3]);
    else store_some(q, out, from, to);
    if (last) store_some(p, v, N - lead, n);
  }
}

// gamma or beta, beside data of type T: in that type, if it is a half, or in the arithmetic's.
template <class T> struct Parameter {
  typedef typename Arithmetic<T>::type A;
  const void* p;
  int kind;
  __device__ __forceinline__ bool in_halves() const { return sizeof(T) == 2 && kind >= HALF; }
  __device__ __forceinline__ explicit operator bool() const { return p; }
  __device__ __forceinline__ A operator[](i64 i) const {
    return in_halves() ? (A)widen(((const T*)p)[i]) : ((const A*)p)[i];
  }
  // the first n of N neighbours
  template <bool ALIGNED, int N> __device__ __forceinline__ void read(i64 i, int n, A (&out)[N]) const {
    if (in_halves()) load<ALIGNED, N>((const T*)p + i, n).open(out);
    else load<ALIGNED, N>((const A*)p + i, n).open(out);
  }
};

// ----------------------------------------------------------------------- division and indices
// Exact division of 32-bit numbers by one divisor, in five instructions.
struct Div {
  u32 d, m;
  __device__ explicit Div(u32 divisor) : d(divisor), m(0xffffffffu / divisor) {}
  __device__ __forceinline__ u32 operator()(u32 n, u32& rest) const {
    u32 q = __umulhi(n, m);
    rest = n - q * d;
    if (rest >= d) ++q, rest -= d;
    return q;
  }
};

__device__ __noinline__ i64 large_index(i64 i, i64 outer, i64 inner, i64 count) {
  return (outer ? i / outer * count : 0) + i / inner % count;
}

struct Place {
  i64 i;
  u32 left;  // how many neighbours, this one among them, have this index; or more than a vector has
};

__device__ __noinline__ Place large_place(i64 i, i64 inner, i64 count) {
  return Place{i / inner % count, (u32)min(inner - i % inner, (i64)~0u)};
}

// i -> (i / outer) * count + (i / inner) % count, of elements fewer than 2**32 without 64-bit division.
struct Index {
  i64 outer, inner, count;
  bool nested, small;
  Div by_outer, by_inner, by_count;
  __device__ Index(i64 outer, i64 inner, i64 count, i64 size)
      : outer(outer), inner(inner), count(count), nested(outer < size), small(size >> 32 == 0),
        by_outer(small && nested ? (u32)outer : 1), by_inner(small ? (u32)inner : 1), by_count(small ? (u32)count : 1) {}
  __device__ __forceinline__ i64 operator()(i64 i) const {
    if (!small) return large_index(i, nested ? outer : 0, inner, count);
    u32 rest, within;
    by_count(by_inner((u32)i, rest), within);
    return (nested ? (i64)by_outer((u32)i, rest) * count : 0) + within;
  }
  // The same for neighbours, one after the other; not nested.
  __device__ __forceinline__ Place place(i64 i) const {
    if (!small) return large_place(i, inner, count);
    u32 rest, within;
    by_count(by_inner((u32)i, rest), within);
    return Place{within, by_inner.d - rest};
  }
  __device__ __forceinline__ void advance(Place& p) const {
    if (--p.left) return;
    p.left = (u32)min(inner, (i64)~0u);
    if (++p.i == count) p.i = 0;
  }
};

extern __shared__ __align__(16) unsigned char nk_shared[];

// --------------------------------------------------------------------------------------- sums
// A team is `lanes` neighbouring threads: a power of two of a warp's, or (WIDE) whole warps, and then
// all teams of a block must call. Its threads get the sums, added in an order that depends on `lanes`
// alone.
template <bool WIDE, int M> __device__ __forceinline__ void team_sum(double (&v)[M], u32 lanes) {
  const u32 width = WIDE ? 32 : lanes;
  for (u32 o = width / 2; o > 0; o /= 2) {
#pragma unroll
    for (int i = 0; i < M; ++i) v[i] += __shfl_xor_sync(~0u, v[i], o);
  }
  if constexpr (WIDE) {
    __shared__ double part[M][32];
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = lanes / 32;
    const u32 first = warp / warps * warps;
    __syncthreads();
    if (lane == 0) {
#pragma unroll
      for (int i = 0; i < M; ++i) part[i][warp] = v[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < M; ++i) v[i] = lane < warps ? part[i][first + lane] : 0.0;
    for (u32 o = 16; o > 0; o /= 2) {
#pragma unroll
      for (int i = 0; i < M; ++i) v[i] += __shfl_xor_sync(~0u, v[i], o);
    }
  }
}
template <bool WIDE> __device__ __forceinline__ double from_first(double v, u32 lanes) {
  if constexpr (WIDE) {
    __shared__ double value[32];
    __syncthreads();
    if (threadIdx.x % lanes == 0) value[threadIdx.x / lanes] = v;
    __syncthreads();
    return value[threadIdx.x / lanes];
  } else {
    return __shfl_sync(~0u, v, 0, lanes);
  }
}

// n values of mean shift + offset, and the sum of their squared distances from it.
struct __align__(16) Moments {
  double n, shift, offset, m2;
};

// The moments of all that get(0) ... get(count - 1) hold, by two passes over them.
template <bool WIDE, class Get>
__device__ __forceinline__ Moments combine(u32 lanes, u32 lane, u32 count, Get get) {
  double shift = from_first<WIDE>(lane < count ? get(lane).shift : 0.0, lanes);
  double sums[2] = {0.0, 0.0}, m2[1] = {0.0};
  for (u32 i = lane; i < count; i += lanes) {
    const Moments p = get(i);
    sums[0] += p.n;
    sums[1] += p.n * (p.shift - shift + p.offset);
  }
  team_sum<WIDE>(sums, lanes);
  const double offset = sums[1] / sums[0];
  for (u32 i = lane; i < count; i += lanes) {
    const Moments p = get(i);
    const double d = p.shift - shift + p.offset - offset;
    m2[0] += p.m2 + p.n * d * d;
  }
  team_sum<WIDE>(m2, lanes);
  return Moments{sums[0], shift, offset, m2[0]};
}
}  // namespace nk
