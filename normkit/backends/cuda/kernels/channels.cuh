// What is done once a channel, in one launch each: running statistics and Batch Renormalization.
namespace nk {
struct Channels {
  i64 count;
  int mean_kind, spread_kind;       // of running statistics
  double eps;                       // below 0: the spread is a standard deviation
  double r_max, d_max;
  int gamma_kind, beta_kind, kind;  // of the parameters, and of what they become
};

#define NK_CHANNEL                                              \
  const i64 c = (i64)blockIdx.x * blockDim.x + threadIdx.x;     \
  if (c >= task.count) return

// Statistics from given ones.
__global__ void __launch_bounds__(128)
given(const void* mean, const void* spread, double* stats, const Channels task) {
  NK_CHANNEL;
  const double s = get(spread, task.spread_kind, c);
  stats[c] = get(mean, task.mean_kind, c);
  stats[task.count + c] = 1.0 / (task.eps < 0.0 ? s : sqrt(s + task.eps));
  stats[3 * task.count + c] = 0.0;
}

// New statistics into running ones.
__global__ void __launch_bounds__(128)
average(void* mean, void* spread, const double* new_mean, const double* new_spread, const Average task) {
  const i64 c = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  if (c < task.count) task.update(mean, spread, c, new_mean[c], new_spread[c]);
}

// Not fmin and fmax, which lose NaN.
__device__ __forceinline__ double clip(double v, double low, double high) { return v < low ? low : v > high ? high : v; }

// r and d of Batch Renormalization.
__global__ void __launch_bounds__(128)
renorm(const double* stats, const void* mean, const void* std, double* r, double* d, const Channels task) {
  NK_CHANNEL;
  const double s = get(std, task.spread_kind, c), m = get(mean, task.mean_kind, c);
  r[c] = task.r_max == 1.0 ? 1.0 : clip(1.0 / s / stats[task.count + c], 1.0 / task.r_max, task.r_max);
  d[c] = task.d_max == 0.0 ? 0.0 : clip((stats[c] - m) / s, -task.d_max, task.d_max);
}

// Its parameters: r * gamma, d * gamma + beta.
__global__ void __launch_bounds__(128)
affine(const void* gamma, const void* beta, const double* r, const double* d, void* scaled, void* shifted,
       const Channels task) {
  NK_CHANNEL;
  const double w = gamma ? get(gamma, task.gamma_kind, c) : 1.0;
  put(scaled, task.kind, c, r[c] * w);
  if (shifted) put(shifted, task.kind, c, d[c] * w + (beta ? get(beta, task.beta_kind, c) : 0.0));
}
}  // namespace nk
