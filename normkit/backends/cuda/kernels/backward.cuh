// Gradients: the sums of dy and dy * xhat, then dx; again one kernel that does both, or either half.
namespace nk {
enum { CROSS = 4, PARAMS = 8 };

// Sums of dy (a) and of dy * xhat (b). They are taken over *cells*: values of one group and one
// parameter (of Rows a run or a group, of Columns a column), from which both the sums of a group,
// weighted by gamma, and those of a parameter follow. Where parameters vary from value to value (not
// FIXED) a cell is a group, and its values are weighted one by one.
template <class A> struct __align__(2 * sizeof(A)) PairOf {
  A a, b;
};
typedef PairOf<double> Pair;

// The gradients of parameters, of a dtype.
struct Gradients {
  void *gamma, *beta;
  int kind;
  __device__ __forceinline__ void write(i64 i, const Pair& sum) const {
    put(gamma, kind, i, sum.b);
    put(beta, kind, i, sum.a);
  }
};

// gamma of any dtype, where it is read seldom.
struct Weights {
  const void* p;
  int kind;
  __device__ __forceinline__ explicit operator bool() const { return p; }
  __device__ __forceinline__ double operator[](i64 i) const { return get(p, kind, i); }
};

// The cells of groups and parts, as they are merged.
struct Cells {
  i64 groups, params, within;
  double members;  // of a group
  u32 parts, of_group;
  int gamma_kind, grad_kind;  // grad_kind: of dgamma and dbeta
};

// The sums of a group's cells of all parts, weighted by gamma and not, by a team.
template <bool WIDE>
__device__ __forceinline__ void merge_cells(double (&sums)[4], const Cells& task, const Pair* cells,
                                            const Weights& gamma, i64 group, u32 lanes, u32 lane) {
  sums[0] = sums[1] = sums[2] = sums[3] = 0.0;
  if (group < task.groups)
    for (u32 i = lane; i < task.parts * task.of_group; i += lanes) {
      const i64 cell = group * task.of_group + i % task.of_group;
      const Pair p = cells[i / task.of_group * (task.groups * task.of_group) + cell];
      const double w = gamma ? gamma[cell / task.within % task.params] : 1.0;
      sums[0] += w * p.a;
      sums[1] += w * p.b;
      sums[2] += p.a;
      sums[3] += p.b;
    }
  team_sum<WIDE>(sums, lanes);
}

struct Backward {
  Geometry geometry;
  Cells cells;
  i64 outer, inner, count;  // which group a value is of
  i64 blocks;               // in a grid that gives each team one unit of work
  int center, frozen;
};

// STAGE: REDUCE writes the sums of cells, part by part, to `cells` or, where each is all that a
// parameter has, to dgamma and dbeta. APPLY writes dx from the means of groups. Both: either, with the
// data kept on chip; with WAVE, over the blocks of a tile. REDUCE | CROSS: cells are parameters, whose
// values have statistics of many groups. A walk over Runs has cells of a run each. REDUCE | APPLY |
// PARAMS: rows with parameters ALONG; a team keeps the sums of its rows' parameters, and `rows` gets a
// row of them from every block.
template <class T, class Walk, bool ALIGNED, int MODE, int KEEP, bool WIDE, int THREADS, int STAGE>
__global__ void __launch_bounds__(THREADS, 1)
backward(const T* x, const T* dy, T* dx, const void* gamma, double* stats, Pair* cells, const Pair* means,
         PairOf<typename Arithmetic<T>::type>* rows, void* dgamma, void* dbeta, u32* arrivals, const Backward task) {
  typedef typename Arithmetic<T>::type A;
  constexpr int N = Walk::N, C = Walk::SUMS;
  constexpr bool ROWS = Walk::ROWS, RUNS = Walk::RUNS, OWN = STAGE & PARAMS, SPREAD = STAGE & CROSS, WAVES = STAGE & WAVE;
  constexpr bool WEIGHTED = MODE == FIXED || RUNS;  // later: the sums of cells, by gamma
  const Geometry& g = task.geometry;
  const Statistics st{stats, task.cells.groups, false};
  const Gradients grads{dgamma, dbeta, task.cells.grad_kind};
  const Weights weights{WEIGHTED ? gamma : nullptr, task.cells.gamma_kind};
  const i64 inner = task.inner, count = task.count, blocks = task.blocks;
  const bool center = task.center, frozen = task.frozen;
  const u32 cells_of_group = task.cells.of_group;
  const double members = task.cells.members;
  const Index index = g.param(), group_at(task.outer, inner, count, g.size());
  A da[OWN ? KEEP : 1][N], db[OWN ? KEEP : 1][N];
#pragma unroll
  for (int j = 0; j < (OWN ? KEEP : 1); ++j)
#pragma unroll
    for (int k = 0; k < N; ++k) da[j][k] = db[j][k] = A(0);

  const i64 step = WAVES ? wave_step(g.parts) : gridDim.x;
  if (WAVES && blockIdx.x >= step) return;
  uint4* const stage = reinterpret_cast<uint4*>(nk_shared);
  const u32 staged = WAVES ? g.staged * blockDim.x : 0;
  Pair* const table = reinterpret_cast<Pair*>(stage + 2 * staged);
  for (i64 block = blockIdx.x; block < blocks; block += step) {
    const Walk walk(g, STAGE == APPLY ? blocks - 1 - block : block);
    Held<T, N, KEEP, ALIGNED, OWN, WAVES> held_x(x, walk, stage, g.staged), held_dy(dy, walk, stage + staged, g.staged);
    auto group = [&](int k) { return ROWS && cells_of_group > 1 ? walk.group_of(k) / cells_of_group : walk.group_of(k); };
    Stat<A> stat[C];
#pragma unroll
    for (int k = 0; k < C; ++k)
      if (!SPREAD && walk.valid) stat[k] = st.read<A>(group(k));
    const Params<T, Walk, MODE, ALIGNED, 1> scale({{gamma, task.cells.gamma_kind}}, {1}, walk, index);
    A mean_a[C], mean_b[C];
#pragma unroll
    for (int k = 0; k < C; ++k) mean_a[k] = mean_b[k] = A(0);

    if constexpr (STAGE & REDUCE) {
      A a[C], b[C];
#pragma unroll
      for (int k = 0; k < C; ++k) a[k] = b[k] = A(0);
      double sums[2] = {0.0, 0.0};
      visit(walk, [&](int j, const Slot& s, const Vec<T, N>& vx, const Vec<T, N>& vd) {
        A f[N], d[N], w[1][N];
        vx.open(f);
        vd.open(d);
        if constexpr (!WEIGHTED) scale.read(s, index, w);
        const bool one = SPREAD && s.n > 0 && (inner >= s.n || count == 1) &&
                         group_at(s.at) == group_at(s.at + s.n - 1);  // then so are those between
#pragma unroll
        for (int k = 0; k < N; ++k) {
          if (k >= s.n) continue;
          if (SPREAD && !(one && k)) stat[0] = st.read<A>(group_at(s.at + k));
          f[k] = stat[SPREAD ? 0 : k % C].xhat(f[k]);
          const A e = WEIGHTED ? d[k] : w[0][k] * d[k];
          a[k % C] += e;
          b[k % C] = fma(e, f[k], b[k % C]);
          if constexpr (OWN) {
            da[j][k] += d[k];
            db[j][k] = fma(d[k], f[k], db[j][k]);
          }
        }
        if constexpr (RUNS) {
          if (!walk.ends(j)) return;
          double own[2] = {(double)a[0], (double)b[0]};
          team_sum<false>(own, g.lanes);
          a[0] = b[0] = A(0);
          if (walk.lane || walk.run(j) >= walk.runs) return;
          const i64 cell = walk.group * walk.runs + walk.run(j);
          const double weight = weights ? weights[index(cell * g.r1)] : 1.0;
          if (cells) cells[cell] = Pair{own[0], own[1]};
          sums[0] += weight * own[0];
          sums[1] += weight * own[1];
        }
      }, held_x, held_dy);
      if constexpr (RUNS) {
        team_sum<true>(sums, blockDim.x);
        mean_a[0] = center && !frozen ? (A)(sums[0] / members) : A(0);
        mean_b[0] = frozen ? A(0) : (A)(sums[1] / members);
      } else if constexpr (ROWS) {
        sums[0] = (double)a[0], sums[1] = (double)b[0];
        team_sum<WIDE>(sums, g.lanes);
        if (!OWN && walk.leads()) {
          const Pair sum{sums[0], sums[1]};
          if (cells) cells[walk.part * g.k0 * g.k1 + walk.group] = sum;
          if (dgamma && !WAVES) grads.write(walk.group, sum);
        }
        if (STAGE & APPLY && !frozen && !WAVES) {
          const double w = MODE == FIXED ? (double)scale.fixed[0][0] : 1.0;
          mean_a[0] = center ? (A)(w * sums[0] / members) : A(0);
          mean_b[0] = (A)(w * sums[1] / members);
        }
      } else {
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
          if (dgamma && !WAVES) grads.write(cell + c, sum);
          const double w = weights && STAGE & APPLY ? weights[index(first + c)] : 1.0;
          table[c] = Pair{w * sum.a, w * sum.b};
        }
        __syncthreads();
        if (STAGE & APPLY && !frozen && !WAVES) {
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
      if constexpr (WAVES) {
        meet(arrivals + block / g.parts, g.parts);
        const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        auto merge = [&](i64 group, bool writes) {
          double all[4];
          merge_cells<false>(all, task.cells, cells, weights, group, 32, lane);
          if (dgamma && writes && walk.part == 0) grads.write(group, Pair{all[2], all[3]});
          return Pair{center ? all[0] / members : 0.0, all[1] / members};
        };
        if constexpr (ROWS) {
          const Pair m = merge(walk.group, threadIdx.x == 0);
          mean_a[0] = (A)m.a, mean_b[0] = (A)m.b;
        } else {
          const i64 group0 = walk.group0;
          for (u32 i = warp; i < walk.width / (u32)g.r1; i += blockDim.x / 32) {
            const Pair m = merge(group0 + i, lane == 0);
            if (lane == 0) table[i] = m;
          }
          __syncthreads();
#pragma unroll
          for (int k = 0; k < C; ++k)
            if (walk.valid) {
              const Pair m = table[walk.group_of(k) - group0];
              mean_a[k] = (A)m.a, mean_b[k] = (A)m.b;
            }
          __syncthreads();  // before the next tile's sums take the table
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
        A f[N], d[N], w[1][N];
        vx.open(f);
        vd.open(d);
        scale.read(s, index, w);
#pragma unroll
        for (int k = 0; k < N; ++k) {
          const A v = fma(-stat[k % C].xhat(f[k]), mean_b[k % C], fma(w[0][k], d[k], -mean_a[k % C]));
          f[k] = stat[k % C].unscale(v);
        }
        Vec<T, N> out;
        out.close(f);
        store<ALIGNED>(dx + s.at, out, s.n, s.first, s.last);
      }, held_x, held_dy);
    }
  }

  if constexpr (OWN) {  // the teams of a block add their sums one after the other
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
    for (u32 e = threadIdx.x; e < g.r1; e += blockDim.x)
      rows[blockIdx.x * g.r1 + e] = PairOf<A>{(A)table[e].a, (A)table[e].b};
  }
}

// `merge_cells` as a launch: the means that dx needs, a warp a group, or a block. dgamma and dbeta where a
// group is all that a parameter has.
template <bool WIDE>
__global__ void __launch_bounds__(256)
finish_gradients(const Pair* cells, Pair* means, const void* gamma, void* dgamma, void* dbeta, const Cells task) {
  const u32 lanes = WIDE ? blockDim.x : 32, lane = threadIdx.x % lanes;
  const i64 group = (i64)blockIdx.x * (blockDim.x / lanes) + threadIdx.x / lanes;
  double sums[4];
  merge_cells<WIDE>(sums, task, cells, Weights{gamma, task.gamma_kind}, group, lanes, lane);
  if (group >= task.groups || lane) return;
  means[group] = Pair{sums[0] / task.members, sums[1] / task.members};
  if (dgamma) Gradients{dgamma, dbeta, task.grad_kind}.write(group, Pair{sums[2], sums[3]});
}

// dgamma and dbeta: sums over cells (rows, params, within) for every parameter, in the order of rows.
struct Fold {
  i64 rows, params, within;
  int grad_kind;
};

template <class A>
__global__ void __launch_bounds__(1024, 1)
fold(const PairOf<A>* cells, void* dgamma, void* dbeta, const Fold task) {
  __shared__ Pair table[32][32];
  const u32 x = threadIdx.x % 32, y = threadIdx.x / 32, step = blockDim.x / 32;
  const i64 p = (i64)blockIdx.x * 32 + x;
  Pair sum = {0.0, 0.0};
  if (p < task.params)
#pragma unroll 4
    for (i64 row = y; row < task.rows; row += step)
      for (i64 i = 0; i < task.within; ++i) {
        const PairOf<A> c = cells[(row * task.params + p) * task.within + i];
        sum.a += c.a;
        sum.b += c.b;
      }
  table[y][x] = sum;
  __syncthreads();
  if (y || p >= task.params) return;
  for (u32 i = 1; i < step; ++i) sum.a += table[i][x].a, sum.b += table[i][x].b;
  Gradients{dgamma, dbeta, task.grad_kind}.write(p, sum);
}
}  // namespace nk
