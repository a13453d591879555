// The second half of a weight gradient: adds the rows that the blocks of a backward wrote, each the sum over the rows
// (or tokens) it owned. Two kernels and no atomics, so the same bits come out in every run.
//
//     first[c] = sum over p of partial[0][p][c]        second[c] = sum over p of partial[1][p][c]
//
// Grid         (ceil(columns / 32), planes): planes is 2 where there is a second gradient (LayerNorm's bias, the key
//              heads' norm), else 1.
// Ownership    a block owns 32 columns of a plane, a lane one column, a warp every THREADS/32-th row of them.
// Shared       THREADS floats: a warp writes its 32 sums, then the first warp reads down the columns; both without
//              bank conflicts, as neighbouring lanes have neighbouring words.
// Bytes        4 * parts * columns read for a plane, in segments of 128 bytes, and the gradient written. A few hundred
//              rows: 1 MB at 1,024 columns, which comes from the second-level cache.
// FLOPs        parts * columns.
// Alignment    of the elements only.
//
// Defines: WEIGHT (type of the gradient), THREADS (a multiple of 32).
#include "common.cuh"

#if defined(KERNEL_sum_partials)
extern "C" __global__ void __launch_bounds__(THREADS)
    sum_partials(const void* partial, void* first, void* second, int64_t parts, int64_t columns) {
  constexpr int WARPS = THREADS / 32;
  SHARED_MEMORY(memory);
  float* sums = reinterpret_cast<float*>(memory);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * 32 + lane;
  const float* source = static_cast<const float*>(partial) + blockIdx.y * parts * columns + column;
  float sum = 0.0f;
  if (column < columns) {
#pragma unroll 8
    for (int64_t part = warp; part < parts; part += WARPS) sum += source[part * columns];
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (warp == 0 && column < columns) {
    for (int other = 1; other < WARPS; ++other) sum += sums[other * 32 + lane];
    WEIGHT* target = static_cast<WEIGHT*>(blockIdx.y == 0 ? first : second);
    target[column] = from_float<WEIGHT>(sum);
  }
}
#endif
