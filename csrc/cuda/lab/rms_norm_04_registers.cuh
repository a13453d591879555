// RMSNorm, fourth try: the row stays in registers between the two passes.
//
// Idea         a row of 4,096 elements is 16 for each of 256 threads: they fit in registers, if the compiler knows at
//              compile time how many there are (an array that is indexed by a variable goes to local memory, that is,
//              to the caches again). All loads of a thread are then under way together, where 03 waits for one before
//              it asks for the next: latency is paid once, not 16 times.
// Bytes        2 read and 2 written an element, for the load units and for memory: the floor. The weight's 2 are shared
//              by all rows and come from the caches.
// Cost left    32 load instructions and 16 stores of 2 bytes a lane: 64 bytes for a warp, where the load units move up
//              to 512 with one. At 3 TB/s the instructions begin to count.
// Limit        hidden <= THREADS * ITEMS.
// Next         16 bytes an instruction: 05.
//
// Defines: THREADS, a multiple of 32; ITEMS, elements of a thread. Grid: rows. Shared: THREADS / 32 floats.
#include "common.cuh"

#if defined(KERNEL_rms_norm_registers)
extern "C" __global__ void __launch_bounds__(THREADS)
    rms_norm_registers(const void* x, const void* weight, void* y, int64_t, int64_t hidden, float eps) {
  SHARED_MEMORY(memory);
  const bf16* source = static_cast<const bf16*>(x) + blockIdx.x * hidden;
  bf16* target = static_cast<bf16*>(y) + blockIdx.x * hidden;
  const bf16* gain = static_cast<const bf16*>(weight);
  float kept[ITEMS], square = 0.0f;
#pragma unroll
  for (int i = 0; i < ITEMS; ++i) {
    const int column = i * THREADS + threadIdx.x;
    kept[i] = column < hidden ? to_float(source[column]) : 0.0f;
  }
#pragma unroll
  for (int i = 0; i < ITEMS; ++i) square += kept[i] * kept[i];
  square = block_sum<THREADS>(square, reinterpret_cast<float*>(memory));
  const float scale = rsqrtf(square / static_cast<float>(hidden) + eps);
#pragma unroll
  for (int i = 0; i < ITEMS; ++i) {
    const int column = i * THREADS + threadIdx.x;
    if (column < hidden) target[column] = from_float<bf16>(kept[i] * scale * to_float(gain[column]));
  }
}
#endif
