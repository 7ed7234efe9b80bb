// What is done once a channel, in one launch each, where no other kernel does it: running statistics
// and Batch Renormalization.
namespace nk {
struct Channels {
  i64 count;
  double eps;
  Update update;
  int gamma_kind, beta_kind, kind;  // of the parameters, and of what they become
};

#define NK_CHANNEL                                              \
  const i64 c = (i64)blockIdx.x * blockDim.x + threadIdx.x;     \
  if (c >= task.count) return

// Statistics from given ones.
__global__ void __launch_bounds__(128)
given(void* mean, void* spread, double* stats, const Channels task) {
  NK_CHANNEL;
  const Running running{mean, spread, task.update};
  stats[c] = running.old_mean(c);
  stats[task.count + c] = running.rstd(c, task.eps);
  stats[3 * task.count + c] = 0.0;
}

// New statistics into running ones; the new spread is a variance or an rstd.
__global__ void __launch_bounds__(128)
average(void* mean, void* spread, const double* new_mean, const double* new_spread, const Channels task) {
  NK_CHANNEL;
  Running{mean, spread, task.update}.enter(c, new_mean[c], new_spread[c], new_spread[c], nullptr, nullptr);
}

// r and d of Batch Renormalization.
__global__ void __launch_bounds__(128)
renorm(const double* stats, void* mean, void* std, double* r, double* d, const Channels task) {
  NK_CHANNEL;
  const Running running{mean, std, task.update};
  running.renorm(running.old_mean(c), running.old_spread(c), stats[c], 1.0 / stats[task.count + c], r + c, d + c);
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
