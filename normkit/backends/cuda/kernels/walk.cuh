// Where the vectors of a thread are, in an array of axes (k0, r0, k1, r1).
namespace nk {

// The integers of a launch, which the planner chose. A walk's work (vectors of a group for Rows, rows
// of a tile of columns for Columns) is cut in `parts` of `per`, `slots` vectors a thread.
struct Geometry {
  i64 k0, r0, k1, r1, params, span;
  u32 parts, per, slots;
  u32 staged;   // vectors of a thread that wait in shared memory, beside those in registers
  u32 lanes;    // Rows: threads of a team, which has one group; Columns: threads side by side
  u32 columns;  // Columns: of a tile
  u32 merge;    // Columns: threads that merge the sums of one group
  __device__ i64 row() const { return k1 * r1; }
  __device__ i64 size() const { return k0 * r0 * k1 * r1; }
  __device__ Index param() const { return Index(size(), span, params, size()); }
};

struct Slot {
  i64 at;            // flat place of the vector's first value
  i64 top;           // the same in the walk's first row
  int n;             // how many of its values belong to the walk: 0 for an idle thread
  bool first, last;  // no neighbour in the warp holds what lies before, behind
};

// Long runs: a team of threads shares a group, its r0 runs of r1 values cut in vectors that belong to
// one run each. All values of a thread are of one group.
template <int N_> struct Rows {
  static constexpr int N = N_, SUMS = 1;
  static constexpr bool ROWS = true, RUNS = false;
  u32 lane, lanes, begin, end, slots, part;
  i64 group, base, row, r1;
  bool valid;
  Div by_run;
  __device__ Rows(const Geometry& g, i64 block)
      : lane(threadIdx.x % g.lanes), lanes(g.lanes), slots(g.slots), row(g.row()), r1(g.r1),
        by_run((u32)((g.r1 + N - 1) / N)) {
    const i64 unit = block * (blockDim.x / g.lanes) + threadIdx.x / g.lanes;
    group = g.parts == 1 ? unit : unit / g.parts;
    part = (u32)(unit - group * g.parts);
    valid = group < g.k0 * g.k1;
    begin = part * g.per;
    end = valid ? (u32)min(g.r0 * by_run.d, (i64)begin + g.per) : 0;
    base = g.k1 == 1 ? group * g.r0 * r1 : group / g.k1 * g.r0 * row + group % g.k1 * r1;
  }
  __device__ __forceinline__ Slot at(u32 j) const {
    const u32 q = begin + j * lanes + lane;
    if (q >= end) return Slot{0, 0, 0, false, false};
    u32 v;
    const i64 run = by_run(q, v), from = (i64)v * N;
    return Slot{base + run * row + from, base + from, (int)min((i64)N, r1 - from),
                v == 0 || lane == 0 || threadIdx.x % 32 == 0,
                v + 1 == by_run.d || lane + 1 == lanes || threadIdx.x % 32 == 31 || q + 1 == end};
  }
  __device__ __forceinline__ bool leads() const { return lane == 0 && valid; }
  __device__ __forceinline__ i64 column(int) const { return base; }  // a value of the walk's group
  __device__ __forceinline__ i64 group_of(int) const { return group; }
};

// Short runs: the threads of a block stand side by side over a tile of neighbouring columns, whole
// groups of them, and walk down its rows. Every column of a thread has sums of its own.
template <int N_> struct Columns {
  static constexpr int N = N_, SUMS = N_;
  static constexpr bool ROWS = false, RUNS = false;
  u32 begin, end, slots, part, down, column0, width;  // width: columns of this tile
  i64 tile, group0, base, row, r1;
  bool valid;
  Div by_group;
  __device__ Columns(const Geometry& g, i64 block)
      : slots(g.slots), row(g.row()), r1(g.r1), by_group((u32)g.r1) {
    const i64 chunks = (row + g.columns - 1) / g.columns;
    tile = block / g.parts;
    part = (u32)(block - tile * g.parts);
    const i64 k0 = tile / chunks, first = (tile - k0 * chunks) * g.columns;
    down = blockDim.x / g.lanes;
    column0 = threadIdx.x % g.lanes * N;
    width = (u32)min((i64)g.columns, row - first);
    valid = threadIdx.x / g.lanes < down && column0 < width;
    begin = part * g.per + threadIdx.x / g.lanes;
    end = valid ? (u32)min(g.r0, (i64)(part + 1) * g.per) : 0;
    group0 = k0 * g.k1 + first / r1;
    base = k0 * g.r0 * row + first + column0;
  }
  __device__ __forceinline__ Slot at(u32 j) const {
    const u32 q = begin + j * down;
    if (q >= end) return Slot{0, 0, 0, false, false};
    return Slot{base + (i64)q * row, base, N, column0 == 0 || threadIdx.x % 32 == 0,
                column0 + N == width || threadIdx.x % 32 == 31};
  }
  __device__ __forceinline__ i64 column(int k) const { return base + k; }
  __device__ __forceinline__ i64 group_of(int k) const { u32 rest; return group0 + by_group(column0 + k, rest); }
};

// Runs of which each has its own parameter: a block has a group, and a team of some lanes of a warp one
// run at a time, `per` vectors a thread.
template <int N_> struct Runs {
  static constexpr int N = N_, SUMS = 1;
  static constexpr bool ROWS = true, RUNS = true;
  u32 lane, lanes, slots, part, teams, team, runs, vectors;
  i64 group, base, r1;
  bool valid;
  Div by_run;
  __device__ Runs(const Geometry& g, i64 block)
      : lane(threadIdx.x % g.lanes), lanes(g.lanes), slots(g.slots), part(0), teams(blockDim.x / g.lanes),
        team(threadIdx.x / g.lanes), runs((u32)g.r0), vectors((u32)((g.r1 + N - 1) / N)), group(block),
        base(block * g.r0 * g.r1), r1(g.r1), valid(true), by_run(g.per) {}
  __device__ __forceinline__ u32 run(u32 j) const { u32 rest; return by_run(j, rest) * teams + team; }
  __device__ __forceinline__ bool ends(u32 j) const { u32 rest; by_run(j, rest); return rest + 1 == by_run.d; }
  __device__ __forceinline__ Slot at(u32 j) const {
    u32 v;
    const u32 run = by_run(j, v) * teams + team;
    v = v * lanes + lane;
    if (j >= slots || run >= runs || v >= vectors) return Slot{0, 0, 0, false, false};
    const i64 at = base + run * r1 + (i64)v * N;
    return Slot{at, at, (int)min((i64)N, r1 - (i64)v * N), lane == 0, v + 1 == vectors || lane + 1 == lanes};
  }
  __device__ __forceinline__ bool leads() const { return threadIdx.x == 0; }
  __device__ __forceinline__ i64 column(int) const { return base; }
  __device__ __forceinline__ i64 group_of(int) const { return group; }
};

// Arrays as a thread sees them: the first KEEP vectors stay in registers, the next (STAGED) in places of
// shared memory that no other thread looks at, the others are read again. ALL: there are no others.
template <class T, int N, int KEEP_, bool ALIGNED, bool ALL_ = false, bool STAGED_ = false> struct Held {
  static constexpr int KEEP = KEEP_, BATCH = ALL_ ? 0 : 4;
  static constexpr bool STAGED = STAGED_;
  const T* p;
  uint4* stage;
  u32 kept_or_staged;
  Vec<T, N> kept[KEEP ? KEEP : 1], batch[BATCH ? BATCH : 1];
  template <class Walk>
  __device__ __forceinline__ Held(const T* p, const Walk& walk, uint4* stage = nullptr, u32 staged = 0)
      : p(p), stage(stage + threadIdx.x), kept_or_staged(min(walk.slots, KEEP + staged)) {
#pragma unroll
    for (int j = 0; j < KEEP; ++j)
      if (j < (int)walk.slots) kept[j] = get(walk.at(j));
    if constexpr (STAGED) {
#pragma unroll 4
      for (u32 j = KEEP; j < kept_or_staged; ++j) {
        const Vec<T, N> v = get(walk.at(j));
        this->stage[(j - KEEP) * blockDim.x] = make_uint4(v.w[0], v.w[1], v.w[2], v.w[3]);
      }
    }
  }
  __device__ __forceinline__ Vec<T, N> get(const Slot& s) const { return load<ALIGNED, N>(p + s.at, s.n); }
  __device__ __forceinline__ Vec<T, N> staged(u32 j) const {
    const uint4 a = stage[(j - KEEP) * blockDim.x];
    Vec<T, N> v;
    v.w[0] = a.x, v.w[1] = a.y, v.w[2] = a.z, v.w[3] = a.w;
    return v;
  }
};

// Calls f(j, slot, vectors ...) for all slots of a thread, in their order.
template <class Walk, class F, class H, class... Hs>
__device__ __forceinline__ void visit(const Walk& walk, F f, H& held, Hs&... others) {
#pragma unroll
  for (int j = 0; j < H::KEEP; ++j)
    if (j < (int)walk.slots) f(j, walk.at(j), held.kept[j], others.kept[j]...);
  if constexpr (H::STAGED)
    for (u32 j = H::KEEP; j < held.kept_or_staged; ++j) f(j, walk.at(j), held.staged(j), others.staged(j)...);
  if constexpr (H::BATCH > 0) {
    for (u32 j = H::STAGED ? held.kept_or_staged : H::KEEP; j < walk.slots; j += H::BATCH) {
      Slot s[H::BATCH];
#pragma unroll
      for (int b = 0; b < H::BATCH; ++b) {
        s[b] = walk.at(j + b);
        held.batch[b] = held.get(s[b]);
        (..., (void)(others.batch[b] = others.get(s[b])));
      }
#pragma unroll
      for (int b = 0; b < H::BATCH; ++b)
        if (j + b < walk.slots) f(j + b, s[b], held.batch[b], others.batch[b]...);
    }
  }
}

// gamma and beta, or one of them. FIXED: as the sums, one for all of a thread's values, or one a column.
// ALONG: values of a run have neighbouring parameters. EACH: those of a vector have one. ANY: runs of
// `span` values have one, wherever they begin.
enum { FIXED, ALONG, EACH, ANY };
template <class T, class Walk, int MODE, bool ALIGNED, int COUNT> struct Params {
  typedef typename Arithmetic<T>::type A;
  static constexpr int N = Walk::N;
  Parameter<T> p[COUNT];
  bool none;
  i64 origin;  // ALONG: flat place of the value that has parameter 0
  A fixed[COUNT][Walk::SUMS];
  __device__ __forceinline__ Params(const Parameter<T> (&given)[COUNT], const A (&missing)[COUNT],
                                    const Walk& walk, const Index& index)
      : none(true), origin(MODE == ALONG ? walk.base - walk.base % index.count : 0) {
#pragma unroll
    for (int c = 0; c < COUNT; ++c) {
      p[c] = given[c];
      none &= !p[c];
#pragma unroll
      for (int k = 0; k < Walk::SUMS; ++k)
        fixed[c][k] = p[c] && MODE == FIXED && walk.valid ? p[c][index(walk.column(k))] : missing[c];
    }
  }
  __device__ __forceinline__ void read(const Slot& s, const Index& index, A (&out)[COUNT][N]) const {
#pragma unroll
    for (int c = 0; c < COUNT; ++c)
#pragma unroll
      for (int k = 0; k < N; ++k) out[c][k] = fixed[c][k % Walk::SUMS];
    if (MODE == FIXED || s.n <= 0 || none) return;
    Place at = MODE == ALONG ? Place{s.top - origin, 1} : index.place(s.at);
    if constexpr (MODE == ANY) {  // all of them together: their places are the most of the work
#pragma unroll
      for (int k = 0; k < N; ++k) {
#pragma unroll
        for (int c = 0; c < COUNT; ++c)
          if (p[c] && k < s.n) out[c][k] = p[c][at.i];
        index.advance(at);
      }
    } else {
#pragma unroll
      for (int c = 0; c < COUNT; ++c) {
        if (!p[c]) continue;
        if constexpr (MODE == ALONG) p[c].template read<ALIGNED>(at.i, s.n, out[c]);
#pragma unroll
        for (int k = 0; k < N && MODE == EACH; ++k) out[c][k] = p[c][at.i];
      }
    }
  }
};
}  // namespace nk
