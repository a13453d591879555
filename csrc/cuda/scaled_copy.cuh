// out = x * scale in another type, multiplied in fp32 and rounded once: the last step of the loss head's gradients.
//
// Compiled with -DKERNEL_scaled_copy, THREADS, SOURCE and TARGET (bf16, fp16 or float).
//
// Grid [size / (GROUP * ITEMS * THREADS)]. A thread owns ITEMS groups of neighbours, THREADS groups apart; a group is
// 16 bytes of the wider type, so that a warp's accesses lie side by side. Buffers that don't begin at a group's
// alignment, and the last elements, are taken one by one. Each element is read once and written once. No shared memory.
#include "common.cuh"

#if !defined(SOURCE) || !defined(TARGET) || !defined(THREADS)
#error "define SOURCE and TARGET (bf16, fp16 or float) and THREADS"
#endif
#ifndef ITEMS
#define ITEMS 4
#endif

#if defined(KERNEL_scaled_copy)
constexpr int GROUP = VECTOR<SOURCE> < VECTOR<TARGET> ? VECTOR<SOURCE> : VECTOR<TARGET>;
constexpr int BLOCK = GROUP * ITEMS * THREADS;

extern "C" __global__ void __launch_bounds__(THREADS)
    scaled_copy(const SOURCE* x, const float* scale, TARGET* out, int64_t size) {
  const bool aligned = reinterpret_cast<uintptr_t>(x) % (GROUP * sizeof(SOURCE)) == 0 &&
                       reinterpret_cast<uintptr_t>(out) % (GROUP * sizeof(TARGET)) == 0;
  const int64_t begin = int64_t(blockIdx.x) * BLOCK;
  const float factor = *scale;
  if (aligned && begin + BLOCK <= size) {
    const int64_t first = begin + threadIdx.x * GROUP;
    Vector<SOURCE, GROUP> read[ITEMS];
#pragma unroll
    for (int i = 0; i < ITEMS; i++) read[i] = load_vector<GROUP>(x + first + i * (THREADS * GROUP));
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
      Vector<float, GROUP> values = to_float(read[i]);
#pragma unroll
      for (int k = 0; k < GROUP; k++) values[k] *= factor;
      store_vector(out + first + i * (THREADS * GROUP), from_float<TARGET>(values));
    }
  } else {
    const int64_t end = min(begin + BLOCK, size);
    for (int64_t at = begin + threadIdx.x; at < end; at += THREADS)
      out[at] = from_float<TARGET>(to_float(x[at]) * factor);
  }
}
#endif
