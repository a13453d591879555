// RMSNorm, fifth try: eight elements an instruction.
//
// Idea         a thread's columns come in runs of 8 neighbours, which are 16 bytes: one load instruction (LDG.E.128)
//              moves 512 bytes for a warp. The elements stay packed, two in a register, until they are used.
// Bytes        the floor, 2 read and 2 written an element, with 4 load and 2 store instructions for 16 elements where
//              04 takes 32 and 16.
// Limit        addresses that are multiples of 16: hidden % 8 == 0, and x, y, weight aligned; hidden <= THREADS *
// ITEMS. What's left  rms_norm.cuh, which is this kernel with what real calls need: other types, the residual, rows
// that are
//              not aligned, several short rows for a block, rows longer than registers hold.
//
// Defines: THREADS, a multiple of 32; ITEMS, elements of a thread, a multiple of 8. Grid: rows. Shared: THREADS / 32
// floats.
#include "common.cuh"

#if defined(KERNEL_rms_norm_vectors)
extern "C" __global__ void __launch_bounds__(THREADS)
    rms_norm_vectors(const void* x, const void* weight, void* y, int64_t, int64_t hidden, float eps) {
  constexpr int RUNS = ITEMS / 8;
  SHARED_MEMORY(memory);
  const bf16* source = static_cast<const bf16*>(x) + blockIdx.x * hidden;
  bf16* target = static_cast<bf16*>(y) + blockIdx.x * hidden;
  const bf16* gain = static_cast<const bf16*>(weight);
  Vector<bf16, 8> kept[RUNS];
  float square = 0.0f;
#pragma unroll
  for (int run = 0; run < RUNS; ++run) {
    const int column = (run * THREADS + threadIdx.x) * 8;
    kept[run] = column < hidden ? load_vector<8>(source + column) : from_float<bf16>(zeros<8>());
  }
#pragma unroll
  for (int run = 0; run < RUNS; ++run) {
#pragma unroll
    for (int i = 0; i < 8; ++i) square += to_float(kept[run][i]) * to_float(kept[run][i]);
  }
  square = block_sum<THREADS>(square, reinterpret_cast<float*>(memory));
  const float scale = rsqrtf(square / static_cast<float>(hidden) + eps);
#pragma unroll
  for (int run = 0; run < RUNS; ++run) {
    const int column = (run * THREADS + threadIdx.x) * 8;
    if (column >= hidden) continue;
    const Vector<float, 8> weights = to_float(load_vector<8>(gain + column));
    Vector<float, 8> result = to_float(kept[run]);
#pragma unroll
    for (int i = 0; i < 8; ++i) result[i] *= scale * weights[i];
    store_vector<8>(target + column, from_float<bf16>(result));
  }
}
#endif
