// Statistics and normalisation: one kernel that does both, or either half of it.
namespace nk {
enum { REDUCE = 1, APPLY = 2 };

// What a thread knows of a group when it normalises. Data so large or small that float would overflow
// or flush are scaled by a power of two, at no cost.
template <class A> struct Stat {
  A hi, lo, rstd, scale;  // the mean in two parts and rstd, both of scaled data
  A offset;               // of xhat: the d of Batch Renormalization
  __device__ __forceinline__ Stat() {}
  __device__ __forceinline__ Stat(double mean, double residual, double r, double d = 0.0) : offset((A)d) {
    const double big = sizeof(A) == 4 ? 0x1p96 : 0x1p500, s = r > 1e-30 ? r < 1e30 ? 1.0 : big : 1.0 / big;
    hi = (A)(mean * s);
    lo = (A)(mean * s - (double)hi + residual * s);
    rstd = (A)(r / s);
    scale = (A)s;
  }
  __device__ __forceinline__ A xhat(A x) const { return fma(fma(x, scale, -hi) - lo, rstd, offset); }
  __device__ __forceinline__ A unscale(A v) const { return v * rstd * scale; }
};

// Not fmin and fmax, which lose NaN.
__device__ __forceinline__ double clip(double v, double low, double high) { return v < low ? low : v > high ? high : v; }

// How new statistics enter running ones, whose kinds these are.
struct Update {
  int mean_kind, spread_kind;
  double factor, momentum;     // factor 0: the spread is a standard deviation
  double r_min, r_max, d_max;  // of Batch Renormalization; r_max 0: it is none
};

// Running statistics, or given ones; null where there are none.
struct Running {
  void *mean, *spread;
  const Update& by;
  __device__ __forceinline__ double old_mean(i64 i) const { return get(mean, by.mean_kind, i); }
  __device__ __forceinline__ double old_spread(i64 i) const { return get(spread, by.spread_kind, i); }
  // from a variance or, with eps below 0, a standard deviation
  __device__ __forceinline__ double rstd(i64 i, double eps) const {
    return eps < 0.0 ? 1.0 / old_spread(i) : rsqrt(old_spread(i) + eps);
  }
  // r and d, from the mean and standard deviation of the running statistics and the new ones
  __device__ __forceinline__ void renorm(double m, double s, double new_mean, double std, double* r, double* d) const {
    const double rs = 1.0 / s;
    *r = by.r_max == 1.0 ? 1.0 : clip(std * rs, by.r_min, by.r_max);
    *d = by.d_max == 0.0 ? 0.0 : clip((new_mean - m) * rs, -by.d_max, by.d_max);
  }
  // r and d, if they are wanted, come from what there was before
  __device__ __forceinline__ void enter(i64 i, double new_mean, double var, double rstd, double* r, double* d) const {
    const double m = old_mean(i), s = old_spread(i), new_spread = by.factor == 0.0 ? 1.0 / rstd : by.factor * var;
    if (r) renorm(m, s, new_mean, new_spread, r, d);
    put(mean, by.mean_kind, i, m + by.momentum * (new_mean - m));
    put(spread, by.spread_kind, i, s + by.momentum * (new_spread - s));
  }
};

// Of all groups, in global memory: mean, rstd, variance, (double) what rounding the mean left out, and
// (renorm) r and d, a row each; or null where nobody needs them.
struct Statistics {
  double* p;
  i64 groups;
  bool renorm;
  template <class A> __device__ __forceinline__ Stat<A> read(i64 group) const {
    const double rest = sizeof(A) == 8 ? p[3 * groups + group] : 0.0, rstd = p[groups + group];
    return renorm ? Stat<A>(p[group], rest, rstd * p[4 * groups + group], p[5 * groups + group])
                  : Stat<A>(p[group], rest, rstd);
  }
  // one thread of a team `writes`; m2 comes in units of 1 / unit**2
  template <class A>
  __device__ __forceinline__ Stat<A> finish(i64 group, const Moments& m, double unit, double eps, bool writes,
                                            const Running& running) const {
    const double s = m.m2 / m.n, v = s / unit / unit, mu = m.shift + m.offset;
    const bool held = unit == 1.0 || (v + eps > 0x1p-900 && isfinite(v));
    const double r = held ? 1.0 / sqrt(v + eps) : unit / sqrt(s + eps * unit * unit);
    const double rest = sizeof(A) == 8 && isfinite(mu) ? m.shift - mu + m.offset : 0.0;
    if (writes && p) {
      p[group] = mu, p[groups + group] = r, p[2 * groups + group] = v;
      if (sizeof(A) == 8) p[3 * groups + group] = rest;
    }
    double* const rows = renorm ? p + 4 * groups + group : nullptr;
    if (writes && running.mean) running.enter(group, mu, v, r, rows, rows + groups);
    return Stat<A>(mu, rest, r);
  }
};

// Sums of a thread, about its own first values: nothing cancels, and data far from zero lose nothing.
template <class Walk, class A> struct Sums {
  static constexpr int N = Walk::N, C = Walk::SUMS;
  A shift[C], sum[C], square[C];
  u32 n;
  __device__ __forceinline__ Sums() : n(0) {
#pragma unroll
    for (int k = 0; k < C; ++k) shift[k] = sum[k] = square[k] = A(0);
  }
  __device__ __forceinline__ void add(const A (&f)[N], int valid, bool center) {
    if (valid <= 0) return;
    if (n == 0 && center) {
      if constexpr (C == 1) {
        A total = A(0);
#pragma unroll
        for (int k = 0; k < N; ++k) total += k < valid ? f[k] : A(0);
        shift[0] = total / (A)valid;
      } else {
#pragma unroll
        for (int k = 0; k < N; ++k) shift[k] = f[k];
      }
    }
    n += C == 1 ? valid : 1;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const A d = k < valid ? f[k] - shift[k % C] : A(0);
      sum[k % C] += d;
      square[k % C] = fma(d, d, square[k % C]);
    }
  }
};

// The moments of a thread's values of column k, read again in double: for what overflows or flushes
// in float, and for infinities.
template <class T, class Walk>
__device__ __noinline__ Moments wide_moments(const Walk walk, const T* x, int k, bool center) {
  const int step = Walk::SUMS;
  double n = 0.0, sum = 0.0, m2 = 0.0;
  for (int pass = center ? 0 : 1; pass < 2; ++pass) {
    const double mean = pass && center ? sum / n : 0.0;
    n = 0.0;
    for (u32 j = 0; j < walk.slots; ++j) {
      const Slot s = walk.at(j);
      for (int i = k; i < s.n; i += step) {
        const double v = (double)widen(x[s.at + i]);
        n += 1.0;
        if (pass) m2 += (v - mean) * (v - mean);
        else sum += v;
      }
    }
  }
  return Moments{n, 0.0, center ? sum / n : 0.0, m2};
}

// The moments of `count` float64 values from x on, runs of r1 that lie `row` apart, read again by a
// team: x is scaled by `before`, distances from the mean by `after` as well. Rare, so simple rather
// than fast.
template <bool WIDE>
__device__ __noinline__ Moments scaled_moments(const double* x, i64 count, i64 r1, i64 row, u32 lanes, u32 lane,
                                               bool center, double before, double after) {
  auto value = [=](i64 i) { return before * x[i / r1 * row + i % r1]; };
  const double first = count && center ? value(0) : 0.0, shift = isfinite(first) ? first : 0.0;
  double sum[1] = {0.0}, m2[1] = {0.0};
  for (i64 i = lane; center && i < count; i += lanes) sum[0] += value(i) - shift;
  team_sum<WIDE>(sum, lanes);
  const double offset = sum[0] / (double)count, mean = shift + offset;
  for (i64 i = lane; i < count; i += lanes) {
    const double d = (value(i) - shift - offset) * after;
    m2[0] = fma(d, d, m2[0]);
  }
  team_sum<WIDE>(m2, lanes);
  return Moments{(double)count, mean / before, isfinite(mean) ? (shift - mean + offset) / before : 0.0, m2[0]};
}

// Redoes a team's moments of a group where float64 does not hold the squares; the unit of m2.
template <bool WIDE, class T>
__device__ __forceinline__ double hold(Moments& m, const Geometry& g, const T* x, i64 group, u32 lanes, u32 lane,
                                       bool center, double eps) {
  double unit = 1.0;
  if constexpr (sizeof(T) == 8) {
    const bool over = m.n > 0.0 && !isfinite(m.m2), under = eps < 0x1p-850 && m.m2 < m.n * 0x1p-900;
    if (WIDE ? over || under : __any_sync(~0u, over || under)) {
      const double before = over ? 0x1p-600 : 1.0, after = under ? 0x1p600 : 1.0;
      const i64 base = group / g.k1 * g.r0 * g.row() + group % g.k1 * g.r1, count = over || under ? g.r0 * g.r1 : 0;
      const Moments again = scaled_moments<WIDE>(x + base, count, g.r1, g.row(), lanes, lane, center, before, after);
      if (count) m = again, unit = before * after;
    }
  }
  return unit;
}

// The moments of a thread's sums, and whether they are to be taken in double instead of float.
template <class Walk, class A>
__device__ __forceinline__ bool thread_moments(const Sums<Walk, A>& s, int k, bool center, double least, Moments& m) {
  const double n = s.n, sum = s.sum[k], square = s.square[k];
  m = Moments{n, 0.0, 0.0, square};
  if (s.n == 0) return true;
  const bool finite = isfinite(sum) && isfinite(square);
  if (center) m.shift = s.shift[k], m.offset = sum / n, m.m2 = max(square - sum / n * sum, 0.0);
  if (center && !finite) m.m2 = square + 0.0 * sum;  // max loses NaN
  return sizeof(A) == 8 || (finite && !(square < least));
}

// Merge what the threads of a block of Columns have: calls done(group of the tile, moments, unit) in
// all threads that merged it. The table is (rows of threads, columns).
template <class T, class A, int N, class F>
__device__ __forceinline__ void merge_columns(const Geometry& g, const Columns<N>& walk, const Sums<Columns<N>, A>& sums,
                                              Moments* table, const T* x, bool center, double eps, double least, F done) {
  const u32 lane = threadIdx.x % g.merge, teams = blockDim.x / g.merge, runs = walk.width / (u32)g.r1;
  const u32 mine = threadIdx.x / g.lanes;
  if (walk.valid) {
    Moments* const own = table + mine * walk.width + walk.column0;
    u32 wide = 0;  // columns that float does not hold; their neighbours keep their bits
#pragma unroll
    for (int k = 0; k < N; ++k) wide |= (u32)!thread_moments(sums, k, center, least, own[k]) << k;
#pragma unroll 1
    for (int k = 0; k < N && wide >> k; ++k)
      if (wide >> k & 1) own[k] = wide_moments(walk, x, k, center);
  }
  __syncthreads();
  const Div by_run((u32)g.r1);
  for (u32 first = 0; first < runs; first += teams) {
    const u32 i = first + threadIdx.x / g.merge;
    Moments m = combine<false>(g.merge, lane, i < runs ? walk.down * (u32)g.r1 : 0, [&](u32 e) {
      u32 column;
      const u32 row = by_run(e, column);
      return table[row * walk.width + i * (u32)g.r1 + column];
    });
    const double unit = g.parts > 1 ? 1.0 : hold<false>(m, g, x, walk.group0 + i, g.merge, lane, center, eps);
    if (i < runs) done(i, m, unit, lane == 0);
  }
}

// Statistics from the moments of all parts of a group, by a team, of which one thread `writes`.
template <bool WIDE, class A, class T>
__device__ __forceinline__ Stat<A> merge_parts(const Geometry& g, const Moments* partials, const T* x, i64 group,
                                               u32 lanes, u32 lane, bool center, double eps, bool writes,
                                               const Statistics& st, const Running& running) {
  const bool valid = group < st.groups;
  Moments m = combine<WIDE>(lanes, lane, valid ? g.parts : 0, [&](u32 i) { return partials[group * g.parts + i]; });
  const double unit = hold<WIDE>(m, g, x, group, lanes, lane, center, eps);
  return st.finish<A>(group, m, unit, eps, writes && valid, running);
}

struct Forward {
  Geometry geometry;
  i64 groups, blocks;  // blocks: in a grid that gives each one part of a tile
  double eps, least;
  int center, kind;  // kind: of gamma and beta
  Update update;
};

template <class T, class Walk, bool ALIGNED, int MODE, int KEEP, bool WIDE, int THREADS, int STAGE>
__global__ void __launch_bounds__(THREADS, 1)
forward(const T* x, T* y, const void* gamma, const void* beta, double* stats, Moments* partials, u32* arrivals,
        void* running_mean, void* running_spread, const Forward task) {
  typedef typename Arithmetic<T>::type A;
  constexpr int N = Walk::N, C = Walk::SUMS;
  constexpr bool ROWS = Walk::ROWS, WAVES = STAGE & WAVE;
  const Geometry& g = task.geometry;
  const Statistics st{stats, task.groups, task.update.r_max > 0.0};
  const Running running{running_mean, running_spread, task.update};
  const bool center = task.center;
  i64 block = blockIdx.x;
  const i64 step = WAVES ? wave_step(g.parts) : 0;
  if (WAVES && block >= step) return;
  uint4* const stage = reinterpret_cast<uint4*>(nk_shared);
  void* const table = stage + (WAVES ? g.staged * blockDim.x : 0);
  do {
    // the half that normalises goes backwards: what the other half read last may still be in the cache
    const Walk walk(g, STAGE == APPLY ? gridDim.x - 1 - block : block);
    Held<T, N, KEEP, ALIGNED, false, WAVES> held(x, walk, stage, g.staged);
    Stat<A> stat[C];
    if constexpr (STAGE & REDUCE) {
      Sums<Walk, A> sums;
      visit(walk, [&](int, const Slot& s, const Vec<T, N>& v) {
        A f[N];
        v.open(f);
        sums.add(f, s.n, center);
      }, held);
      auto finish = [&](i64 i, const Moments& m, double unit, bool writes) {
        if ((STAGE == REDUCE || WAVES) && g.parts > 1) {
          if (writes) partials[i * g.parts + walk.part] = m;
        } else {
          const Stat<A> s = st.finish<A>(i, m, unit, task.eps, writes, running);
          if (ROWS) stat[0] = s;
        }
      };
      if constexpr (ROWS) {
        Moments own;
        if (!thread_moments(sums, 0, center, task.least, own)) own = wide_moments(walk, x, 0, center);
        Moments m = combine<WIDE>(g.lanes, walk.lane, g.lanes, [&](u32) { return own; });
        const double unit = g.parts > 1 ? 1.0 : hold<WIDE>(m, g, x, walk.group, g.lanes, walk.lane, center, task.eps);
        finish(walk.group, m, unit, walk.leads());
      } else {
        auto done = [&](u32 i, const Moments& m, double unit, bool writes) { finish(walk.group0 + i, m, unit, writes); };
        merge_columns(g, walk, sums, (Moments*)table, x, center, task.eps, task.least, done);
      }
      if constexpr (WAVES) {
        meet(arrivals + block / g.parts, g.parts);
        const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        auto merge = [&](i64 group, bool writes) {
          writes &= walk.part == 0;
          return merge_parts<false, A>(g, partials, x, group, 32, lane, center, task.eps, writes, st, running);
        };
        if constexpr (ROWS) {
          stat[0] = merge(walk.group, threadIdx.x == 0);
        } else {
          Stat<A>* const merged = (Stat<A>*)table;
          for (u32 i = warp; i < walk.width / (u32)g.r1; i += blockDim.x / 32) {
            const Stat<A> s = merge(walk.group0 + i, lane == 0);
            if (lane == 0) merged[i] = s;
          }
          __syncthreads();
#pragma unroll
          for (int k = 0; k < C; ++k)
            if (walk.valid) stat[k] = merged[walk.group_of(k) - walk.group0];
          __syncthreads();  // before the next tile's sums take the table
        }
      } else if (!ROWS || st.renorm) {
        __syncthreads();  // what was written is read again below
      }
    }
    if constexpr (STAGE & APPLY) {
#pragma unroll
      for (int k = 0; k < C; ++k) {
        const i64 i = walk.group_of(k);
        if (!walk.valid || WAVES || (ROWS && STAGE & REDUCE && !st.renorm)) continue;
        const bool given = STAGE == APPLY && !stats;
        stat[k] = given ? Stat<A>(running.old_mean(i), 0.0, running.rstd(i, task.eps)) : st.read<A>(i);
      }
      const Index index = g.param();
      const Params<T, Walk, MODE, ALIGNED, 2> affine({{gamma, task.kind}, {beta, task.kind}}, {1, 0}, walk, index);
      visit(walk, [&](int, const Slot& s, const Vec<T, N>& v) {
        A f[N], w[2][N];
        v.open(f);
        affine.read(s, index, w);
#pragma unroll
        for (int k = 0; k < N; ++k) f[k] = fma(stat[k % C].xhat(f[k]), w[0][k], w[1][k]);
        Vec<T, N> out;
        out.close(f);
        store<ALIGNED>(y + s.at, out, s.n, s.first, s.last);
      }, held);
    }
  } while (WAVES && (block += step) < task.blocks);
}

// `merge_parts` as a launch: a warp a group, or a block.
struct FinishMoments {
  Geometry geometry;
  i64 groups;
  double eps;
  int center;
  Update update;
};

template <class T, bool WIDE>
__global__ void __launch_bounds__(256)
finish_moments(const T* x, const Moments* partials, double* stats, void* running_mean, void* running_spread,
               const FinishMoments task) {
  const u32 lanes = WIDE ? blockDim.x : 32, lane = threadIdx.x % lanes;
  const i64 group = (i64)blockIdx.x * (blockDim.x / lanes) + threadIdx.x / lanes;
  merge_parts<WIDE, double>(task.geometry, partials, x, group, lanes, lane, task.center, task.eps, lane == 0,
                            Statistics{stats, task.groups, task.update.r_max > 0.0},
                            Running{running_mean, running_spread, task.update});
}
}  // namespace nk
