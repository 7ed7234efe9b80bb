// Gradients: the sums of dy and dy * xhat, then dx; again one kernel that does both, or either half.
namespace nk {
enum { CROSS = 4, PARAMS = 8 };

// Sums of dy (a) and of dy * xhat (b). They are taken over *cells*: values of one group and one
// parameter (of Rows a run or a group, of Columns a column), from which both the sums of a group,
// weighted by gamma, and those of a parameter follow. Where parameters vary from value to value (not
// FIXED) a cell is a group, and its values are weighted one by one.
struct __align__(16) Pair {
  double a, b;
};

// STAGE: REDUCE writes the sums of cells, part by part. APPLY writes dx from the means of groups. Both:
// either, with the data kept on chip. REDUCE | CROSS: cells are parameters, whose values have
// statistics of many groups. REDUCE | APPLY | PARAMS: rows with parameters ALONG; a team keeps the sums
// of its rows' parameters, and `cells` gets a row of them from every block.
template <class T, class P, class Walk, bool ALIGNED, int MODE, int KEEP, bool BLOCK, int THREADS, int STAGE>
__global__ void __launch_bounds__(THREADS, 1)
backward(const T* x, const T* dy, T* dx, const P* gamma, NK_STATISTICS, Pair* cells, const Pair* means,
         NK_GEOMETRY, const i64 outer, const i64 inner, const i64 count, const double members,
         const u32 cells_of_group, const int center, const int frozen, const i64 blocks) {
  typedef typename Arithmetic<T>::type A;
  constexpr int N = Walk::N, C = Walk::SUMS;
  constexpr bool ROWS = Walk::ROWS, OWN = STAGE & PARAMS, SPREAD = STAGE & CROSS;
  const Geometry g = NK_GEOMETRY_VALUES;
  const Statistics st = NK_STATISTICS_VALUES;
  const Index index = g.param(), group_at(outer, inner, count, g.size());
  A da[OWN ? KEEP : 1][N], db[OWN ? KEEP : 1][N];
#pragma unroll
  for (int j = 0; j < (OWN ? KEEP : 1); ++j)
#pragma unroll
    for (int k = 0; k < N; ++k) da[j][k] = db[j][k] = A(0);

  for (i64 block = blockIdx.x; block < blocks; block += gridDim.x) {
    const Walk walk(g, STAGE == APPLY ? blocks - 1 - block : block);
    Held<T, N, KEEP, ALIGNED, OWN> held_x(x, walk), held_dy(dy, walk);
    auto group = [&](int k) { return ROWS && cells_of_group > 1 ? walk.group_of(k) / cells_of_group : walk.group_of(k); };
    Stat<A> stat[C];
#pragma unroll
    for (int k = 0; k < C; ++k)
      if (!SPREAD && walk.valid) stat[k] = st.read<A>(group(k));
    const Param<P, Walk, MODE, ALIGNED> scale(gamma, 1.0, walk, index);
    A mean_a[C], mean_b[C];
#pragma unroll
    for (int k = 0; k < C; ++k) mean_a[k] = mean_b[k] = A(0);

    if constexpr (STAGE & REDUCE) {
      A a[C], b[C];
#pragma unroll
      for (int k = 0; k < C; ++k) a[k] = b[k] = A(0);
      visit(walk, [&](int j, const Slot& s, const Vec<T, N>& vx, const Vec<T, N>& vd) {
        A f[N], d[N], w[N];
        vx.open(f);
        vd.open(d);
        if constexpr (MODE != FIXED) scale.read(s, index, w);
        const bool one = SPREAD && s.n > 0 && (inner >= s.n || count == 1) &&
                         group_at(s.at) == group_at(s.at + s.n - 1);  // then so are those between
#pragma unroll
        for (int k = 0; k < N; ++k) {
          if (k >= s.n) continue;
          if (SPREAD && !(one && k)) stat[0] = st.read<A>(group_at(s.at + k));
          f[k] = stat[SPREAD ? 0 : k % C].xhat(f[k]);
          const A e = MODE == FIXED ? d[k] : w[k] * d[k];
          a[k % C] += e;
          b[k % C] = fma(e, f[k], b[k % C]);
          if constexpr (OWN) {
            da[j][k] += d[k];
            db[j][k] = fma(d[k], f[k], db[j][k]);
          }
        }
      }, held_x, held_dy);
      if constexpr (ROWS) {
        double sums[2] = {(double)a[0], (double)b[0]};
        team_sum<BLOCK>(sums, g.lanes);
        if (!OWN && cells && walk.leads()) cells[walk.part * g.k0 * g.k1 + walk.group] = Pair{sums[0], sums[1]};
        if (STAGE & APPLY && !frozen) {
          const double w = MODE == FIXED ? (double)scale.fixed[0] : 1.0;
          mean_a[0] = center ? (A)(w * sums[0] / members) : A(0);
          mean_b[0] = (A)(w * sums[1] / members);
        }
      } else {
        Pair* const table = reinterpret_cast<Pair*>(nk_shared);
        const u32 mine = threadIdx.x / g.lanes;
        const i64 columns = g.row(), first = walk.base - walk.column0;  // flat place of the tile's first column
        const i64 cell = first / (g.r0 * columns) * columns + first % columns;
#pragma unroll
        for (int k = 0; k < N; ++k)
          if (walk.valid) table[mine * walk.width + walk.column0 + k] = Pair{(double)a[k % C], (double)b[k % C]};
        __syncthreads();
        for (u32 c = threadIdx.x; c < walk.width; c += blockDim.x) {
          Pair sum = {0.0, 0.0};
          for (u32 r = 0; r < walk.down; ++r) {
            sum.a += table[r * walk.width + c].a;
            sum.b += table[r * walk.width + c].b;
          }
          if (cells) cells[walk.part * g.k0 * columns + cell + c] = sum;
          const double w = MODE == FIXED && gamma && STAGE & APPLY ? (double)widen(gamma[index(first + c)]) : 1.0;
          table[c] = Pair{w * sum.a, w * sum.b};
        }
        __syncthreads();
        if (STAGE & APPLY && !frozen) {
#pragma unroll
          for (int k = 0; k < C; ++k) {  // the columns of a group are few, and in the cache
            double sum_a = 0.0, sum_b = 0.0;
            const u32 run = (walk.column0 + k) / (u32)g.r1 * (u32)g.r1;
            if (k > 0 && (walk.column0 + k) % (u32)g.r1) {
              mean_a[k] = mean_a[k > 0 ? k - 1 : 0], mean_b[k] = mean_b[k > 0 ? k - 1 : 0];
            } else if (walk.valid) {
              for (u32 c = 0; c < (u32)g.r1; ++c) sum_a += table[run + c].a, sum_b += table[run + c].b;
              mean_a[k] = center ? (A)(sum_a / members) : A(0);
              mean_b[k] = (A)(sum_b / members);
            }
          }
        }
      }
    } else if (means) {
#pragma unroll
      for (int k = 0; k < C; ++k)
        if (walk.valid) {
          const Pair m = means[group(k)];
          mean_a[k] = center ? (A)m.a : A(0), mean_b[k] = (A)m.b;
        }
    }

    if constexpr (STAGE & APPLY) {
      visit(walk, [&](int, const Slot& s, const Vec<T, N>& vx, const Vec<T, N>& vd) {
        A f[N], d[N], w[N];
        vx.open(f);
        vd.open(d);
        scale.read(s, index, w);
#pragma unroll
        for (int k = 0; k < N; ++k) {
          const A v = fma(-stat[k % C].xhat(f[k]), mean_b[k % C], fma(w[k], d[k], -mean_a[k % C]));
          f[k] = stat[k % C].unscale(v);
        }
        Vec<T, N> out;
        out.close(f);
        store<ALIGNED>(dx + s.at, out, s.n, s.first, s.last);
      }, held_x, held_dy);
    }
  }

  if constexpr (OWN) {  // the teams of a block add their sums one after the other
    Pair* const table = reinterpret_cast<Pair*>(nk_shared);
    const Walk walk(g, blockIdx.x);
    const u32 team = threadIdx.x / g.lanes, teams = blockDim.x / g.lanes;
    for (u32 t = 0; t < teams; ++t) {
      if (t == team) {
#pragma unroll
        for (int j = 0; j < KEEP; ++j)
#pragma unroll
          for (int k = 0; k < N; ++k) {
            const i64 e = ((i64)j * g.lanes + walk.lane) * N + k;
            if (e < g.r1) {
              const Pair sum = t ? table[e] : Pair{0.0, 0.0};
              table[e] = Pair{sum.a + (double)da[j][k], sum.b + (double)db[j][k]};
            }
          }
      }
      __syncthreads();
    }
    for (u32 e = threadIdx.x; e < g.r1; e += blockDim.x) cells[blockIdx.x * g.r1 + e] = table[e];
  }
}

// The means that dx needs, from all parts of a group's cells: a warp a group, or a block.
template <class P, bool BLOCK>
__global__ void __launch_bounds__(256)
finish_gradients(const Pair* cells, Pair* means, const P* gamma, const i64 groups, const u32 parts,
                 const u32 group_cells, const i64 params, const i64 within, const double members) {
  const u32 lanes = BLOCK ? blockDim.x : 32, lane = threadIdx.x % lanes;
  const i64 group = (i64)blockIdx.x * (blockDim.x / lanes) + threadIdx.x / lanes;
  double sums[2] = {0.0, 0.0};
  if (group < groups)
    for (u32 i = lane; i < parts * group_cells; i += lanes) {
      const i64 cell = group * group_cells + i % group_cells;
      const Pair p = cells[i / group_cells * (groups * group_cells) + cell];
      const double w = gamma ? (double)widen(gamma[cell / within % params]) : 1.0;
      sums[0] += w * p.a;
      sums[1] += w * p.b;
    }
  team_sum<BLOCK>(sums, lanes);
  if (group < groups && lane == 0) means[group] = Pair{sums[0] / members, sums[1] / members};
}

// dgamma and dbeta: sums over cells (rows, params, within) for every parameter, in the order of rows.
template <class A>
__global__ void __launch_bounds__(1024)
fold(const Pair* cells, A* dgamma, A* dbeta, const i64 rows, const i64 params, const i64 within) {
  __shared__ Pair table[32][32];
  const u32 x = threadIdx.x % 32, y = threadIdx.x / 32, step = blockDim.x / 32;
  const i64 p = (i64)blockIdx.x * 32 + x;
  Pair sum = {0.0, 0.0};
  if (p < params)
#pragma unroll 4
    for (i64 row = y; row < rows; row += step)
      for (i64 i = 0; i < within; ++i) {
        const Pair c = cells[(row * params + p) * within + i];
        sum.a += c.a;
        sum.b += c.b;
      }
  table[y][x] = sum;
  __syncthreads();
  if (y || p >= params) return;
  for (u32 i = 1; i < step; ++i) sum.a += table[i][x].a, sum.b += table[i][x].b;
  dgamma[p] = (A)sum.b;
  dbeta[p] = (A)sum.a;
}
}  // namespace nk
