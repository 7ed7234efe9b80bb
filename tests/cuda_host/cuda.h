// CUDA C++ as a kernel sees it on the host: keywords, vector types, intrinsics. No standard header,
// as under NVRTC, so what compiles here needs none there.
#pragma once
#include "host.h"
#define NK_HOST 1

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
// Static shared variables are the module's thread-local ones: implicitly static inside functions
// and templates, and one contiguous image, which the runtime poisons for each block and swaps
// between blocks. (build.py turns `extern __shared__` into a pointer to dynamic shared memory.)
#define __shared__ thread_local
#define threadIdx host::index.thread
#define blockIdx host::index.block
#define blockDim host::index.block_dim
#define gridDim host::index.grid_dim

using size_t = decltype(sizeof 0);
constexpr int warpSize = 32;

#define HOST_VECTORS(T, name, align)                                                        \
  struct alignas(2 * align) name##2 { T x, y; };                                            \
  struct alignas(4 * align > 16 ? 16 : 4 * align) name##4 { T x, y, z, w; };                \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }                                \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
HOST_VECTORS(short, short, 2)
HOST_VECTORS(unsigned short, ushort, 2)
HOST_VECTORS(int, int, 4)
HOST_VECTORS(unsigned, uint, 4)
HOST_VECTORS(float, float, 4)
HOST_VECTORS(double, double, 8)

namespace host {
template <class To, class From> To bits(From v) {
  To to{};
  __builtin_memcpy(&to, &v, sizeof(To) < sizeof(From) ? sizeof(To) : sizeof(From));
  return to;
}
template <class T> struct Same { using type = T; };      // keeps a parameter out of deduction

// Fibers share one thread of the machine, so plain code is atomic; not instrumented, as `atomic`
// reports the access itself.
template <class T, class F>
__attribute__((noinline, no_sanitize("thread"))) T update(T* p, F next) {
  atomic(const_cast<T*>(p), sizeof(T), __builtin_return_address(0));
  T old = *p;
  *p = next(old);
  return old;
}
}  // namespace host

#define HOST_SITE host::Site site = {__builtin_FILE(), __builtin_LINE()}
inline void __syncthreads(HOST_SITE) { host::barrier(0, site); }
inline int __syncthreads_count(int p, HOST_SITE) { return host::barrier(p != 0, site); }
inline int __syncthreads_or(int p, HOST_SITE) { return host::barrier(p != 0, site) > 0; }
inline void __syncwarp(unsigned mask = ~0u, HOST_SITE) {
  host::warp(host::SYNC, mask, 0, 0, 32, site);
}
#define HOST_SHUFFLE(name, op)                                                                \
  template <class T> T name(unsigned mask, T v, int arg, int width = 32, HOST_SITE) {         \
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");            \
    return host::bits<T>(host::warp(op, mask, host::bits<unsigned long>(v), arg, width, site)); \
  }
HOST_SHUFFLE(__shfl_sync, host::LANE)
HOST_SHUFFLE(__shfl_up_sync, host::UP)
HOST_SHUFFLE(__shfl_down_sync, host::DOWN)
HOST_SHUFFLE(__shfl_xor_sync, host::XOR)
inline unsigned __ballot_sync(unsigned mask, int p, HOST_SITE) {
  return host::warp(host::BALLOT, mask, p != 0, 0, 32, site);
}
inline int __any_sync(unsigned mask, int p, HOST_SITE) { return __ballot_sync(mask, p, site) != 0; }
inline void __threadfence() { host::fence(); }
inline void __nanosleep(unsigned) { host::pause(); }
inline void __trap() { __builtin_trap(); }

#define HOST_ATOMIC(name, next)                                                  \
  template <class T> T name(T* p, typename host::Same<T>::type v) {              \
    return host::update(p, [=](T old) { (void)old; return T(next); });           \
  }
HOST_ATOMIC(atomicAdd, old + v)
HOST_ATOMIC(atomicSub, old - v)
HOST_ATOMIC(atomicExch, v)
HOST_ATOMIC(atomicMax, old < v ? v : old)
HOST_ATOMIC(atomicMin, v < old ? v : old)
HOST_ATOMIC(atomicAnd, old & v)
HOST_ATOMIC(atomicOr, old | v)
HOST_ATOMIC(atomicInc, old >= v ? 0 : old + 1)
template <class T>
T atomicCAS(T* p, typename host::Same<T>::type expected, typename host::Same<T>::type v) {
  return host::update(p, [=](T old) { return old == expected ? v : old; });
}

#define HOST_LOAD(name) template <class T> T name(const T* p) { return *p; }
#define HOST_STORE(name) template <class T> void name(T* p, T v) { *p = v; }
HOST_LOAD(__ldg) HOST_LOAD(__ldcg) HOST_LOAD(__ldcs) HOST_STORE(__stcg) HOST_STORE(__stcs)

#define HOST_MATH1(fn)                  \
  extern "C" double fn(double) noexcept;  \
  extern "C" float fn##f(float) noexcept; \
  inline float fn(float x) { return fn##f(x); }
#define HOST_MATH2(fn)                           \
  extern "C" double fn(double, double) noexcept; \
  extern "C" float fn##f(float, float) noexcept; \
  inline float fn(float x, float y) { return fn##f(x, y); }
HOST_MATH1(sqrt) HOST_MATH1(fabs) HOST_MATH1(floor) HOST_MATH1(ceil) HOST_MATH1(rint)
HOST_MATH2(fmin) HOST_MATH2(fmax) HOST_MATH2(copysign)
extern "C" double fma(double, double, double) noexcept;
extern "C" float fmaf(float, float, float) noexcept;
inline float fma(float a, float b, float c) { return fmaf(a, b, c); }
extern "C" double ldexp(double, int) noexcept;
extern "C" float ldexpf(float, int) noexcept;
extern "C" double scalbn(double, int) noexcept;
extern "C" float scalbnf(float, int) noexcept;
extern "C" double frexp(double, int*) noexcept;
extern "C" float frexpf(float, int*) noexcept;
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
inline float rsqrtf(float x) { return float(1.0 / sqrt(double(x))); }
#define HOST_FLOATING(T)                                      \
  inline bool isnan(T x) { return __builtin_isnan(x); }       \
  inline bool isinf(T x) { return __builtin_isinf(x); }       \
  inline bool isfinite(T x) { return __builtin_isfinite(x); } \
  inline bool signbit(T x) { return __builtin_signbit(x); }
HOST_FLOATING(float) HOST_FLOATING(double)
template <class T> constexpr T min(T a, typename host::Same<T>::type b) { return b < a ? b : a; }
template <class T> constexpr T max(T a, typename host::Same<T>::type b) { return a < b ? b : a; }
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }

inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.f / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __frsqrt_rn(float x) { return rsqrtf(x); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
#define HOST_ROUNDED(name, T, op) inline T name(T a, T b) { return a op b; }
HOST_ROUNDED(__fadd_rn, float, +) HOST_ROUNDED(__fsub_rn, float, -)
HOST_ROUNDED(__fmul_rn, float, *) HOST_ROUNDED(__dadd_rn, double, +)
HOST_ROUNDED(__dsub_rn, double, -) HOST_ROUNDED(__dmul_rn, double, *)
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }

inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __clz(int v) { return v ? __builtin_clz(v) : 32; }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned long long)a * b >> 32; }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return (unsigned __int128)a * b >> 64;
}
inline int __float_as_int(float v) { return host::bits<int>(v); }
inline float __int_as_float(int v) { return host::bits<float>(v); }
inline unsigned __float_as_uint(float v) { return host::bits<unsigned>(v); }
inline float __uint_as_float(unsigned v) { return host::bits<float>(v); }
inline long long __double_as_longlong(double v) { return host::bits<long long>(v); }
inline double __longlong_as_double(long long v) { return host::bits<double>(v); }

// The entry point of a module: a kernel called as cuLaunchKernel does, and its signature.
namespace host {
template <class T> constexpr char kind = 's';            // a struct, or raw words
#define HOST_KIND(letter, T) template <> constexpr char kind<T> = letter;
HOST_KIND('v', void) HOST_KIND('f', float) HOST_KIND('f', double) HOST_KIND('b', bool)
HOST_KIND('i', signed char) HOST_KIND('i', short) HOST_KIND('i', int) HOST_KIND('i', long)
HOST_KIND('i', long long)
HOST_KIND('u', unsigned char) HOST_KIND('w', unsigned short) HOST_KIND('u', unsigned)
HOST_KIND('u', unsigned long) HOST_KIND('u', unsigned long long)
template <class T> struct Describe {
  static constexpr Param value{false, false, kind<T>, sizeof(T)};
};
template <class T> struct Describe<T*> {
  static constexpr Param value{true, false, kind<T>, sizeof(T)};
};
template <class T> struct Describe<T const*> {
  static constexpr Param value{true, true, kind<T>, sizeof(T)};
};
template <class T> struct Describe<T volatile*> : Describe<T*> {};
template <class T> struct Describe<T const volatile*> : Describe<T const*> {};

template <auto F> struct Entry;
template <class... A, void (*F)(A...)> struct Entry<F> {
  struct Call { __attribute__((no_sanitize("thread"))) Call(A... a) { F(a...); } };
  __attribute__((no_sanitize("thread"))) static void call(void** args) {
    Call{*static_cast<A*>(*args++)...};                  // braces evaluate from left to right
  }
  static constexpr Param params[sizeof...(A) + 1] = {Describe<A>::value..., {}};
  static constexpr Kernel value{call, sizeof...(A), params};
};
}  // namespace host
#define HOST_KERNEL(...)                                                      \
  extern "C" { extern const host::Kernel host_kernel; }                       \
  const host::Kernel host_kernel = host::Entry<&__VA_ARGS__>::value;          \
  static thread_local volatile char host_any_shared;                          \
  extern "C" __attribute__((no_sanitize("thread"))) void host_shared() { host_any_shared = 0; }
