// Kernels that do all that they must: the emulator has nothing to say, and gives the right numbers.
#include "common.cuh"

#if defined(KERNEL_row_sums)
// Sums of rows of x[rows][columns]; one block a row, 16-byte loads.
extern "C" __global__ void __launch_bounds__(THREADS)
    row_sums(const void* x, void* sums, int64_t columns, float scale) {
  SHARED_MEMORY(memory);
  float* scratch = reinterpret_cast<float*>(memory);
  const ELEMENT* row = static_cast<const ELEMENT*>(x) + blockIdx.x * columns;
  constexpr int N = VECTOR<ELEMENT>;
  float sum = 0;
  for (int64_t i = threadIdx.x * N; i < columns; i += THREADS * N) {
    const Vector<float, N> values = to_float(load_vector<N>(row + i));
    for (int k = 0; k < N; k++) sum += values[k];
  }
  sum = block_sum<THREADS>(sum, scratch);
  if (threadIdx.x == 0) static_cast<float*>(sums)[blockIdx.x] = sum * scale;
}
#endif

#if defined(KERNEL_tile_product)
// c[16][8] = a[16][16] b[16][8] by one warp: cp.async, ldmatrix, mma.
extern "C" __global__ void __launch_bounds__(THREADS) tile_product(const void* a, const void* b, float* c) {
  SHARED_MEMORY(memory);
  ELEMENT* a_tile = reinterpret_cast<ELEMENT*>(memory);
  ELEMENT* b_tile = a_tile + 16 * 16;
  const int lane = threadIdx.x;
  ptx::cp_async_16(a_tile + lane * 8, static_cast<const ELEMENT*>(a) + lane * 8, true);
  if (lane < 16) ptx::cp_async_16(b_tile + lane * 8, static_cast<const ELEMENT*>(b) + lane * 8, true);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();
  uint32_t fragment_a[4], fragment_b[2];
  float d[4] = {};
  ptx::ldmatrix_x4(fragment_a, a_tile + lane % 16 * 16 + lane / 16 * 8);
  ptx::ldmatrix_x2_transposed(fragment_b, b_tile + lane % 16 * 8);
  ptx::mma_m16n8k16<ELEMENT>(d, fragment_a, fragment_b);
  for (int i = 0; i < 4; i++) c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
}
#endif

#if defined(KERNEL_conversions)
// x rounded to bf16 and fp16, and back; one thread an element.
extern "C" __global__ void __launch_bounds__(THREADS)
    conversions(const float* x, bf16* b, fp16* h, float* from_b, float* from_h, int64_t count) {
  const int64_t i = blockIdx.x * int64_t(THREADS) + threadIdx.x;
  if (i >= count) return;
  b[i] = from_float<bf16>(x[i]), h[i] = from_float<fp16>(x[i]);
  from_b[i] = to_float(b[i]), from_h[i] = to_float(h[i]);
}
#endif

#if defined(KERNEL_shuffles)
// One warp: y[k][lane] for each kind of exchange.
extern "C" __global__ void __launch_bounds__(THREADS) shuffles(const float* x, float* y) {
  const int lane = threadIdx.x;
  const float value = x[lane];
  int k = 0;
  const auto keep = [&](float result) { y[32 * k++ + lane] = result; };
  keep(__shfl_sync(WHOLE_WARP, value, 7));
  keep(__shfl_sync(WHOLE_WARP, value, lane ^ 3, 8));
  keep(__shfl_xor_sync(WHOLE_WARP, value, 16));
  keep(__shfl_up_sync(WHOLE_WARP, value, 3));
  keep(__shfl_up_sync(WHOLE_WARP, value, 3, 8));
  keep(__shfl_down_sync(WHOLE_WARP, value, 5));
  keep(__shfl_down_sync(WHOLE_WARP, value, 5, 16));
  keep(float(__ballot_sync(WHOLE_WARP, lane % 3 == 0) >> 8));
  keep(float(__any_sync(WHOLE_WARP, lane == 31)));
  keep(float(__all_sync(WHOLE_WARP, lane < 31)));
  if (lane < 16) {
    keep(__shfl_xor_sync(0x0000ffffu, value, 1));
  } else {
    keep(__shfl_xor_sync(0xffff0000u, value, 2));
  }
}
#endif

#if defined(KERNEL_columns)
// Copies x[32][32], WAY 0 by rows and 1 by columns: the one is coalesced.
extern "C" __global__ void __launch_bounds__(THREADS) columns(const float* x, float* y) {
  for (int i = 0; i < 32; i++) {
    const int at = WAY ? threadIdx.x * 32 + i : i * 32 + threadIdx.x;
    y[at] = x[at];
  }
}
#endif
