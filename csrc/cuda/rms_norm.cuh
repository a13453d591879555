// RMSNorm, alone or after the addition of a residual:
//
//     y = x * rstd * (weight + offset),  rstd = 1 / sqrt(mean(x^2) + eps)       x is rounded(x + residual) with one
//
// x, y [rows, hidden] without gaps; weight [hidden]; rstd [rows] fp32. All arithmetic is fp32, each output is rounded
// once. `offset` is 1 where the weight is kept zero-centred, else 0.
//
// Grid         forward: ceil(rows / (THREADS / LANES)) blocks; backward: (some blocks per multiprocessor, stripes of
//              LANES * ITEMS columns), whose blocks walk over rows.
// Ownership    a row is held by LANES threads in registers, ITEMS elements each (rows.cuh): a part of a warp or a whole
//              one for short rows, the block for longer ones. In the backward a thread keeps the same columns for all
//              of its block's rows and their weight gradient in registers: the block writes one row of partial sums,
//              which sum_partials adds up. Rows beyond registers: rms_norm_forward_long, and for the backward
//              rms_norm_backward_means followed by rms_norm_backward in stripes.
// Shared       two sets of one float a warp for sums over the block (forward one set), written and read without bank
//              conflicts; for several rows a block, ITEMS * THREADS floats at the end of the backward (store_partial).
// Bytes        e being an element's size: forward 2 e an element (4 e with a residual, whose sum is written); backward
//              3 e (4 e), and 4 hidden for each block. Every input is read once. The long variants read x twice in the
//              forward, the second time out of the second-level cache, and dy and x twice in the backward.
// FLOPs        about 4 an element forward, 9 backward: far below what the bytes take.
// Alignment    RUN > 1: hidden a multiple of RUN, all pointers multiples of 16; else RUN = 1.
// Source       Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
//
// Defines: ELEMENT (of x), WEIGHT (of weight), RUN, ITEMS, LANES, THREADS.
#include "rows.cuh"

#if defined(KERNEL_rms_norm_forward)
extern "C" __global__ void __launch_bounds__(THREADS)
    rms_norm_forward(const void* x, const void* residual, const void* weight, void* y, void* total, void* rstd,
                     int64_t rows, int64_t hidden, float offset, float eps) {
  using Part = Share<ELEMENT, RUN, ITEMS, LANES>;
  SHARED_MEMORY(memory);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (THREADS / LANES) + threadIdx.x / LANES;
  // Lanes of rows that are not there stay for the shuffles, with nothing to load or store.
  const int columns = row < rows ? static_cast<int>(hidden) : 0;
  const int64_t start = row * hidden;

  Part part;
  part.load(static_cast<const ELEMENT*>(x) + start, columns);
  if (residual != nullptr) {
    Part other;
    other.load(static_cast<const ELEMENT*>(residual) + start, columns);
    float added[ITEMS];
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) added[i] = part.get(i) + other.get(i);
    part.set(added);  // rounded: the next layer and the backward see only this
    part.store(static_cast<ELEMENT*>(total) + start, columns);
  }
  float square[1] = {0.0f};
#pragma unroll
  for (int i = 0; i < ITEMS; ++i) square[0] += part.get(i) * part.get(i);
  row_sums<LANES>(square, reinterpret_cast<float*>(memory));
  const float scale = rsqrtf(square[0] / static_cast<float>(hidden) + eps);
  if (Part::lane() == 0 && columns > 0) static_cast<float*>(rstd)[row] = scale;

  Share<WEIGHT, RUN, ITEMS, LANES> gain;
  gain.load(static_cast<const WEIGHT*>(weight), columns);
  float result[ITEMS];
#pragma unroll
  for (int i = 0; i < ITEMS; ++i) result[i] = part.get(i) * scale * (gain.get(i) + offset);
  part.set(result);
  part.store(static_cast<ELEMENT*>(y) + start, columns);
}
#endif

#if defined(KERNEL_rms_norm_forward_long)
// A block owns a row and walks over it, LANES * ITEMS columns a turn, twice: for the sum of squares, then for y. Its
// threads read back only what they wrote themselves.
extern "C" __global__ void __launch_bounds__(THREADS)
    rms_norm_forward_long(const void* x, const void* residual, const void* weight, void* y, void* total, void* rstd,
                          int64_t rows, int64_t hidden, float offset, float eps) {
  using Part = Share<ELEMENT, RUN, ITEMS, LANES>;
  static_assert(LANES == THREADS, "a row for each block");
  constexpr int TURN = LANES * ITEMS;
  SHARED_MEMORY(memory);
  const int64_t start = static_cast<int64_t>(blockIdx.x) * hidden;
  const ELEMENT* source = static_cast<const ELEMENT*>(x) + start;
  const int columns = static_cast<int>(hidden);

  float square[1] = {0.0f};
  for (int at = 0; at < columns; at += TURN) {
    Part part;
    part.load(source + at, columns - at);
    if (residual != nullptr) {
      Part other;
      other.load(static_cast<const ELEMENT*>(residual) + start + at, columns - at);
      float added[ITEMS];
#pragma unroll
      for (int i = 0; i < ITEMS; ++i) added[i] = part.get(i) + other.get(i);
      part.set(added);
      part.store(static_cast<ELEMENT*>(total) + start + at, columns - at);
    }
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) square[0] += part.get(i) * part.get(i);
  }
  row_sums<LANES>(square, reinterpret_cast<float*>(memory));
  const float scale = rsqrtf(square[0] / static_cast<float>(hidden) + eps);
  if (threadIdx.x == 0) static_cast<float*>(rstd)[blockIdx.x] = scale;

  if (residual != nullptr) source = static_cast<const ELEMENT*>(total) + start;
  for (int at = 0; at < columns; at += TURN) {
    Part part;
    Share<WEIGHT, RUN, ITEMS, LANES> gain;
    part.load(source + at, columns - at);
    gain.load(static_cast<const WEIGHT*>(weight) + at, columns - at);
    float result[ITEMS];
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) result[i] = part.get(i) * scale * (gain.get(i) + offset);
    part.set(result);
    part.store(static_cast<ELEMENT*>(y) + start + at, columns - at);
  }
}
#endif

#if defined(KERNEL_rms_norm_backward)
// With n = x * rstd and g = dy * (weight + offset):
//
//     dx = rstd * (g - n * mean(g * n)) + dresidual          dweight = sum over rows of dy * n
//
// `means` [rows] fp32 holds mean(g * n) where a row is cut into stripes; null where the block holds whole rows and
// sums itself. `partial` [blocks, hidden] fp32. The next row is loaded before this one's sum is waited for, where
// registers allow.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT_BLOCKS)
    rms_norm_backward(const void* dy, const void* dresidual, const void* x, const void* weight, const void* rstd,
                      const void* means, void* dx, void* partial, int64_t rows, int64_t hidden, float offset) {
  using Part = Share<ELEMENT, RUN, ITEMS, LANES>;
  constexpr int GROUPS = THREADS / LANES;
  // What registers are left for: 128 a thread up to 512 threads, 64 with 1,024.
  constexpr bool AHEAD = sizeof(ELEMENT) == 2 && RUN > 1 && THREADS <= 512, KEEP_GAIN = RUN > 1 && THREADS <= 512;
  SHARED_MEMORY(memory);
  float* slots = reinterpret_cast<float*>(memory);
  const int first_column = blockIdx.y * (LANES * ITEMS);
  const int width = static_cast<int>(hidden) - first_column;
  const ELEMENT* dy_at = static_cast<const ELEMENT*>(dy) + first_column;
  const ELEMENT* x_at = static_cast<const ELEMENT*>(x) + first_column;

  Share<WEIGHT, RUN, ITEMS, LANES> gain;
  if constexpr (KEEP_GAIN) gain.load(static_cast<const WEIGHT*>(weight) + first_column, width);
  float sums[ITEMS];
#pragma unroll
  for (int i = 0; i < ITEMS; ++i) sums[i] = 0.0f;

  const int64_t step = static_cast<int64_t>(gridDim.x) * GROUPS;
  const int64_t mine = static_cast<int64_t>(blockIdx.x) * GROUPS + threadIdx.x / LANES;
  Part next_dy, next_x;
  if constexpr (AHEAD) {
    next_dy.load(dy_at + mine * hidden, mine < rows ? width : 0);
    next_x.load(x_at + mine * hidden, mine < rows ? width : 0);
  }
  int turn = 0;
  // The same number of turns for all groups of a block: lanes without a row stay for the shuffles.
  for (int64_t first = mine - threadIdx.x / LANES; first < rows; first += step, turn ^= 1) {
    const int64_t row = first + threadIdx.x / LANES;
    const int columns = row < rows ? width : 0;
    Part grad = next_dy, part = next_x, bypass;
    if constexpr (AHEAD) {
      const int64_t next = row + step;
      next_dy.load(dy_at + next * hidden, next < rows ? width : 0);
      next_x.load(x_at + next * hidden, next < rows ? width : 0);
    } else {
      grad.load(dy_at + row * hidden, columns);
      part.load(x_at + row * hidden, columns);
    }
    if constexpr (!KEEP_GAIN) gain.load(static_cast<const WEIGHT*>(weight) + first_column, width);
    const float scale = row < rows ? static_cast<const float*>(rstd)[row] : 0.0f;
    if (dresidual != nullptr) {
      bypass.load(static_cast<const ELEMENT*>(dresidual) + first_column + row * hidden, columns);
    } else {
      bypass.load(x_at, 0);  // zeros
    }
    float mean[1] = {0.0f};
    if (means != nullptr) {
      mean[0] = row < rows ? static_cast<const float*>(means)[row] : 0.0f;
    } else {
#pragma unroll
      for (int i = 0; i < ITEMS; ++i) mean[0] += grad.get(i) * (gain.get(i) + offset) * (part.get(i) * scale);
      row_sums<LANES>(mean, slots + turn * (THREADS / 32));
      mean[0] /= static_cast<float>(hidden);
    }
    float result[ITEMS];
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
      const float normed = part.get(i) * scale;
      result[i] = scale * (grad.get(i) * (gain.get(i) + offset) - normed * mean[0]) + bypass.get(i);
      sums[i] += grad.get(i) * normed;
    }
    part.set(result);
    part.store(static_cast<ELEMENT*>(dx) + first_column + row * hidden, columns);
  }
  store_partial<RUN, ITEMS, LANES, THREADS>(
      sums, static_cast<float*>(partial) + static_cast<int64_t>(blockIdx.x) * hidden + first_column, width, slots);
}
#endif

#if defined(KERNEL_rms_norm_backward_means)
// mean(g * n) of each row, for rows that are cut into stripes. A block owns a row.
extern "C" __global__ void __launch_bounds__(THREADS)
    rms_norm_backward_means(const void* dy, const void* x, const void* weight, const void* rstd, void* means,
                            int64_t hidden, float offset) {
  using Part = Share<ELEMENT, RUN, ITEMS, LANES>;
  static_assert(LANES == THREADS, "a row for each block");
  SHARED_MEMORY(memory);
  const int64_t row = blockIdx.x, start = row * hidden;
  const int columns = static_cast<int>(hidden);
  const float scale = static_cast<const float*>(rstd)[row];
  float mean[1] = {0.0f};
  for (int at = 0; at < columns; at += LANES * ITEMS) {
    Part grad, part;
    Share<WEIGHT, RUN, ITEMS, LANES> gain;
    grad.load(static_cast<const ELEMENT*>(dy) + start + at, columns - at);
    part.load(static_cast<const ELEMENT*>(x) + start + at, columns - at);
    gain.load(static_cast<const WEIGHT*>(weight) + at, columns - at);
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) mean[0] += grad.get(i) * (gain.get(i) + offset) * (part.get(i) * scale);
  }
  row_sums<LANES>(mean, reinterpret_cast<float*>(memory));
  if (threadIdx.x == 0) static_cast<float*>(means)[row] = mean[0] / static_cast<float>(hidden);
}
#endif
