// RMSNorm, third try: the lanes of a warp add up without shared memory.
//
// Idea         shuffles. A lane reads another lane's register in one instruction, and the lanes of a warp need no
//              barrier between them: five steps of a butterfly leave the warp's sum in all 32 lanes. Shared memory then
//              holds a word a warp, and one barrier is left of eight.
// Bytes        as in 02: 6 an element for the load and store units, near 4 from memory.
// Cost left    x is read twice: the second pass waits for the caches again, after the barrier.
// Banks        every thread reads the same word at a time, which is a broadcast.
// Next         keep the row: 04.
//
// Defines: THREADS, a multiple of 32. Grid: rows. Shared: THREADS / 32 floats.
#include "common.cuh"

#if defined(KERNEL_rms_norm_shuffles)
extern "C" __global__ void __launch_bounds__(THREADS)
    rms_norm_shuffles(const void* x, const void* weight, void* y, int64_t, int64_t hidden, float eps) {
  SHARED_MEMORY(memory);
  float* sums = reinterpret_cast<float*>(memory);
  const bf16* source = static_cast<const bf16*>(x) + blockIdx.x * hidden;
  bf16* target = static_cast<bf16*>(y) + blockIdx.x * hidden;
  const bf16* gain = static_cast<const bf16*>(weight);
  float square = 0.0f;
  for (int64_t column = threadIdx.x; column < hidden; column += THREADS)
    square += to_float(source[column]) * to_float(source[column]);
  for (int distance = 16; distance > 0; distance /= 2) square += __shfl_xor_sync(WHOLE_WARP, square, distance);
  if (lane_index() == 0) sums[warp_index()] = square;
  __syncthreads();
  square = 0.0f;
  for (int warp = 0; warp < THREADS / 32; ++warp) square += sums[warp];
  const float scale = rsqrtf(square / static_cast<float>(hidden) + eps);
  for (int64_t column = threadIdx.x; column < hidden; column += THREADS)
    target[column] = from_float<bf16>(to_float(source[column]) * scale * to_float(gain[column]));
}
#endif
