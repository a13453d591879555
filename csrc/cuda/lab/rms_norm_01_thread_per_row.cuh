// RMSNorm, first try: a thread takes a row, as a CPU would.
//
//     y = x / sqrt(mean(x^2) + eps) * weight             x, y [rows, hidden] bf16, weight [hidden] bf16
//
// All five files of this lab compute this, for the same arguments; only the way the row reaches the arithmetic changes.
//
// Idea         none yet: the loops of the definition, with a thread for each row.
// Bytes        the floor is 2 bytes read and 2 written for each element. Here the lanes of a warp read 32 rows at the
//              same column: 2 useful bytes out of each 32-byte sector that memory moves, 16 times the floor if the
//              first-level cache has dropped the sector before the next column is read, which 32 rows for each of 64
//              warps make likely; and x is read twice.
// Threads      rows / 32 warps in all: 8,192 rows are 2 warps for each multiprocessor of an H100, far from enough to
//              keep memory busy (15 KB a multiprocessor must be under way for 25 bytes/ns at 0.6 us).
// Next         lanes side by side: 02.
//
// Defines: THREADS. Grid: ceil(rows / THREADS).
#include "common.cuh"

#if defined(KERNEL_rms_norm_thread_per_row)
extern "C" __global__ void __launch_bounds__(THREADS)
    rms_norm_thread_per_row(const void* x, const void* weight, void* y, int64_t rows, int64_t hidden, float eps) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (row >= rows) return;
  const bf16* source = static_cast<const bf16*>(x) + row * hidden;
  bf16* target = static_cast<bf16*>(y) + row * hidden;
  const bf16* gain = static_cast<const bf16*>(weight);
  float square = 0.0f;
  for (int64_t column = 0; column < hidden; ++column) square += to_float(source[column]) * to_float(source[column]);
  const float scale = rsqrtf(square / static_cast<float>(hidden) + eps);
  for (int64_t column = 0; column < hidden; ++column)
    target[column] = from_float<bf16>(to_float(source[column]) * scale * to_float(gain[column]));
}
#endif
