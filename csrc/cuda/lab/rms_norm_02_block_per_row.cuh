// RMSNorm, second try: a block takes a row, and neighbouring threads take neighbouring columns.
//
// Idea         coalescing. The 32 lanes of a warp read 64 bytes without a gap, two whole sectors: nothing is moved that
//              is not used. The threads' sums of squares meet in shared memory, in a tree: half of the threads add the
//              other half's number to their own, then a quarter, ...
// Bytes        x read twice, y written once: 6 an element where 4 is the floor. The second read mostly hits the caches
//              (a row of 4,096 is 8 KB), so what memory moves is near the floor; what the load units move is not.
// Threads      a block for each row: there is now work for every multiprocessor.
// Cost left    log2(THREADS) barriers, at each of which all warps wait for the slowest; 2 bytes a load instruction.
// Banks        neighbours read neighbouring words: no conflicts. (The other tree, in which every 2nd, 4th, ... thread
//              works on, would read with a stride and conflict.)
// Next         most of those barriers are not needed: 03.
//
// Defines: THREADS, a power of two. Grid: rows. Shared: THREADS floats.
#include "common.cuh"

#if defined(KERNEL_rms_norm_block_per_row)
extern "C" __global__ void __launch_bounds__(THREADS)
    rms_norm_block_per_row(const void* x, const void* weight, void* y, int64_t, int64_t hidden, float eps) {
  SHARED_MEMORY(memory);
  float* sums = reinterpret_cast<float*>(memory);
  const bf16* source = static_cast<const bf16*>(x) + blockIdx.x * hidden;
  bf16* target = static_cast<bf16*>(y) + blockIdx.x * hidden;
  const bf16* gain = static_cast<const bf16*>(weight);
  float square = 0.0f;
  for (int64_t column = threadIdx.x; column < hidden; column += THREADS)
    square += to_float(source[column]) * to_float(source[column]);
  sums[threadIdx.x] = square;
  __syncthreads();
  for (int half = THREADS / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    __syncthreads();
  }
  const float scale = rsqrtf(sums[0] / static_cast<float>(hidden) + eps);
  for (int64_t column = threadIdx.x; column < hidden; column += THREADS)
    target[column] = from_float<bf16>(to_float(source[column]) * scale * to_float(gain[column]));
}
#endif
