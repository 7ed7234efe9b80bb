// One read over several blocks: the parts of a tile are kept on chip while its blocks meet, and every
// one of them merges what all have summed. So both halves of a kernel run in one launch, 2n or 3n bytes
// in all, with the bits of the plan of several launches, which has the same parts and merges them alike.
//
// A block waits for the others of its tile, so all of the grid must be on the device at a time: the
// launch is cooperative, and the driver refuses a grid that does not fit (CuPy cuts it first, with a
// warning, hence gridDim). The planner counts on one block of a multiprocessor, or two of 128 threads,
// whatever registers a kernel takes, and on the shared memory that they ask for. The grid is a few
// tiles' blocks, which go from tile to tile. The counters, one a tile, are zeroed by a memset before
// each launch: a CUDA graph captures memset and launch as two nodes, and nothing is left over from one
// launch to the next, so replays and other streams do not meet.
namespace nk {
enum { WAVE = 16 };  // a stage: of kernels that have both halves

// From a block's place in the grid to its next one: the blocks of whole tiles.
__device__ __forceinline__ i64 wave_step(u32 parts) {
  if (gridDim.x < parts) __trap();  // rather than wait for blocks that do not exist
  return gridDim.x / parts * parts;
}

// All blocks of a tile meet; what they wrote before, all see after.
__device__ __forceinline__ void meet(u32* arrivals, u32 parts) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    atomicAdd(arrivals, 1u);
    while (*(volatile u32*)arrivals < parts) __nanosleep(32);
    __threadfence();
  }
  __syncthreads();
}
}  // namespace nk
