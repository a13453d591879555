// LayerNorm, alone or after the addition of a residual:
//
//     y = (x - mean) * rstd * weight + bias,  rstd = 1 / sqrt(mean((x - mean)^2) + eps)
//
// with x rounded(x + residual) where there is one. x, y [rows, hidden] without gaps; weight, bias [hidden], bias may be
// null; mean, rstd [rows] fp32. All arithmetic is fp32, each output is rounded once.
//
// Grid, ownership and shared memory are those of rms_norm.cuh, with two floats a warp where the backward sums twice.
// What differs is the variance: it is taken around the mean of a row that is in registers, in two passes over them, so
// that a large mean costs no digits (mean(x^2) - mean^2 would lose them all at a mean of 1,000 and a deviation of 1).
// layer_norm_forward_long cannot do so: there each thread merges the mean and the squares of one turn's columns into
// what it has (Chan's formula), then the threads are merged the same way.
//
// Bytes        e being an element's size: forward 2 e an element (4 e with a residual, whose sum is written); backward
//              3 e (4 e), and 8 hidden for each block. Every input is read once; the long variants as in rms_norm.cuh.
// FLOPs        about 7 an element forward, 12 backward.
// Alignment    RUN > 1: hidden a multiple of RUN, all pointers multiples of 16; else RUN = 1.
// Source       Ba, Kiros and Hinton, "Layer Normalization", 2016; Chan, Golub and LeVeque, "Updating Formulae and a
//              Pairwise Algorithm for Computing Sample Variances", 1979.
//
// Defines: ELEMENT (of x), WEIGHT (of weight and bias), RUN, ITEMS, LANES, THREADS.
#include "rows.cuh"

#if defined(KERNEL_layer_norm_forward)
extern "C" __global__ void __launch_bounds__(THREADS)
    layer_norm_forward(const void* x, const void* residual, const void* weight, const void* bias, void* y, void* total,
                       void* mean, void* rstd, int64_t rows, int64_t hidden, float eps) {
  using Part = Share<ELEMENT, RUN, ITEMS, LANES>;
  SHARED_MEMORY(memory);
  float* slots = reinterpret_cast<float*>(memory);
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
  float sum[1] = {0.0f}, square[1] = {0.0f};
#pragma unroll
  for (int i = 0; i < ITEMS; ++i) sum[0] += part.get(i);
  row_sums<LANES>(sum, slots);
  const float center = sum[0] / static_cast<float>(hidden);
#pragma unroll
  for (int i = 0; i < ITEMS; ++i) {
    const float distance = Part::inside(i, columns) ? part.get(i) - center : 0.0f;
    square[0] += distance * distance;
  }
  row_sums<LANES>(square, slots + THREADS / 32);  // the first sum may still be read
  const float scale = rsqrtf(square[0] / static_cast<float>(hidden) + eps);
  if (Part::lane() == 0 && columns > 0) {
    static_cast<float*>(mean)[row] = center;
    static_cast<float*>(rstd)[row] = scale;
  }

  Share<WEIGHT, RUN, ITEMS, LANES> gain, shift;
  gain.load(static_cast<const WEIGHT*>(weight), columns);
  shift.load(static_cast<const WEIGHT*>(bias), bias != nullptr ? columns : 0);
  float result[ITEMS];
#pragma unroll
  for (int i = 0; i < ITEMS; ++i) result[i] = (part.get(i) - center) * scale * gain.get(i) + shift.get(i);
  part.set(result);
  part.store(static_cast<ELEMENT*>(y) + start, columns);
}
#endif

#if defined(KERNEL_layer_norm_forward_long)
// A block owns a row and walks over it, LANES * ITEMS columns a turn, twice: for mean and variance, then for y. Its
// threads read back only what they wrote themselves.
extern "C" __global__ void __launch_bounds__(THREADS)
    layer_norm_forward_long(const void* x, const void* residual, const void* weight, const void* bias, void* y,
                            void* total, void* mean, void* rstd, int64_t rows, int64_t hidden, float eps) {
  using Part = Share<ELEMENT, RUN, ITEMS, LANES>;
  static_assert(LANES == THREADS, "a row for each block");
  constexpr int TURN = LANES * ITEMS;
  SHARED_MEMORY(memory);
  float* slots = reinterpret_cast<float*>(memory);
  const int64_t start = static_cast<int64_t>(blockIdx.x) * hidden;
  const ELEMENT* source = static_cast<const ELEMENT*>(x) + start;
  const int columns = static_cast<int>(hidden);

  float count = 0.0f, center = 0.0f, square = 0.0f;  // of the columns that this thread has seen
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
    float new_count = 0.0f, new_center = 0.0f;
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
      new_count += Part::inside(i, columns - at) ? 1.0f : 0.0f;
      new_center += part.get(i);
    }
    if (new_count == 0.0f) break;  // the last turn has no columns for this thread
    new_center /= new_count;
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
      const float distance = Part::inside(i, columns - at) ? part.get(i) - new_center : 0.0f;
      square += distance * distance;
    }
    const float apart = new_center - center, share = new_count / (count + new_count);
    square += apart * apart * count * share;
    center += apart * share;
    count += new_count;
  }
  float sum[1] = {center * count};
  row_sums<LANES>(sum, slots);
  const float whole = sum[0] / static_cast<float>(hidden), apart = center - whole;
  float squares[1] = {square + (count > 0.0f ? count * apart * apart : 0.0f)};
  row_sums<LANES>(squares, slots + THREADS / 32);
  const float scale = rsqrtf(squares[0] / static_cast<float>(hidden) + eps);
  if (threadIdx.x == 0) {
    static_cast<float*>(mean)[blockIdx.x] = whole;
    static_cast<float*>(rstd)[blockIdx.x] = scale;
  }

  if (residual != nullptr) source = static_cast<const ELEMENT*>(total) + start;
  for (int at = 0; at < columns; at += TURN) {
    Part part;
    Share<WEIGHT, RUN, ITEMS, LANES> gain, shift;
    part.load(source + at, columns - at);
    gain.load(static_cast<const WEIGHT*>(weight) + at, columns - at);
    shift.load(static_cast<const WEIGHT*>(bias) + at, bias != nullptr ? columns - at : 0);
    float result[ITEMS];
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) result[i] = (part.get(i) - whole) * scale * gain.get(i) + shift.get(i);
    part.set(result);
    part.store(static_cast<ELEMENT*>(y) + start + at, columns - at);
  }
}
#endif

#if defined(KERNEL_layer_norm_backward)
// With n = (x - mean) * rstd and g = dy * weight:
//
//     dx = rstd * (g - mean(g) - n * mean(g * n)) + dresidual       dweight = sum of dy * n       dbias = sum of dy
//
// `means` [2, rows] fp32 holds mean(g) and mean(g * n) where a row is cut into stripes; null where the block holds
// whole rows and sums itself. `partial` [2, blocks, hidden] fp32: of dweight, then of dbias. The next row is loaded
// before this one's sums are waited for, where registers allow.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT_BLOCKS)
    layer_norm_backward(const void* dy, const void* dresidual, const void* x, const void* weight, const void* mean,
                        const void* rstd, const void* means, void* dx, void* partial, int64_t rows, int64_t hidden) {
  using Part = Share<ELEMENT, RUN, ITEMS, LANES>;
  constexpr int GROUPS = THREADS / LANES;
  constexpr bool AHEAD = sizeof(ELEMENT) == 2 && RUN > 1;  // else there are no registers to spare
  SHARED_MEMORY(memory);
  float* slots = reinterpret_cast<float*>(memory);
  const int first_column = blockIdx.y * (LANES * ITEMS);
  const int width = static_cast<int>(hidden) - first_column;
  const ELEMENT* dy_at = static_cast<const ELEMENT*>(dy) + first_column;
  const ELEMENT* x_at = static_cast<const ELEMENT*>(x) + first_column;

  float weight_sums[ITEMS], bias_sums[ITEMS];
#pragma unroll
  for (int i = 0; i < ITEMS; ++i) weight_sums[i] = bias_sums[i] = 0.0f;

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
    const bool there = row < rows;
    const int columns = there ? width : 0;
    Part grad, part, bypass;
    if constexpr (AHEAD) {
      const int64_t next = row + step;
      grad = next_dy;
      part = next_x;
      next_dy.load(dy_at + next * hidden, next < rows ? width : 0);
      next_x.load(x_at + next * hidden, next < rows ? width : 0);
    } else {
      grad.load(dy_at + row * hidden, columns);
      part.load(x_at + row * hidden, columns);
    }
    // For every row from the first-level cache: with both sums there are no registers to keep it in.
    Share<WEIGHT, RUN, ITEMS, LANES> gain;
    gain.load(static_cast<const WEIGHT*>(weight) + first_column, width);
    const float center = there ? static_cast<const float*>(mean)[row] : 0.0f;
    const float scale = there ? static_cast<const float*>(rstd)[row] : 0.0f;
    bypass.load(static_cast<const ELEMENT*>(dresidual) + first_column + row * hidden,
                dresidual != nullptr ? columns : 0);
    float average[2] = {0.0f, 0.0f};  // of g, of g * n; columns outside have g = 0
    if (means != nullptr) {
      average[0] = there ? static_cast<const float*>(means)[row] : 0.0f;
      average[1] = there ? static_cast<const float*>(means)[rows + row] : 0.0f;
    } else {
#pragma unroll
      for (int i = 0; i < ITEMS; ++i) {
        const float scaled = grad.get(i) * gain.get(i);
        average[0] += scaled;
        average[1] += scaled * ((part.get(i) - center) * scale);
      }
      row_sums<LANES>(average, slots + turn * 2 * (THREADS / 32));
      average[0] /= static_cast<float>(hidden);
      average[1] /= static_cast<float>(hidden);
    }
    float result[ITEMS];
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
      const float normed = (part.get(i) - center) * scale;
      result[i] = scale * (grad.get(i) * gain.get(i) - average[0] - normed * average[1]) + bypass.get(i);
      weight_sums[i] += grad.get(i) * normed;
      bias_sums[i] += grad.get(i);
    }
    part.set(result);
    part.store(static_cast<ELEMENT*>(dx) + first_column + row * hidden, columns);
  }
  float* target = static_cast<float*>(partial) + static_cast<int64_t>(blockIdx.x) * hidden + first_column;
  store_partial<RUN, ITEMS, LANES, THREADS>(weight_sums, target, width, slots);
  store_partial<RUN, ITEMS, LANES, THREADS>(bias_sums, target + gridDim.x * hidden, width, slots);
}
#endif

#if defined(KERNEL_layer_norm_backward_means)
// mean(g) and mean(g * n) of each row, for rows that are cut into stripes. A block owns a row.
extern "C" __global__ void __launch_bounds__(THREADS)
    layer_norm_backward_means(const void* dy, const void* x, const void* weight, const void* mean, const void* rstd,
                              void* means, int64_t rows, int64_t hidden) {
  using Part = Share<ELEMENT, RUN, ITEMS, LANES>;
  static_assert(LANES == THREADS, "a row for each block");
  SHARED_MEMORY(memory);
  const int64_t row = blockIdx.x, start = row * hidden;
  const int columns = static_cast<int>(hidden);
  const float center = static_cast<const float*>(mean)[row], scale = static_cast<const float*>(rstd)[row];
  float average[2] = {0.0f, 0.0f};
  for (int at = 0; at < columns; at += LANES * ITEMS) {
    Part grad, part;
    Share<WEIGHT, RUN, ITEMS, LANES> gain;
    grad.load(static_cast<const ELEMENT*>(dy) + start + at, columns - at);
    part.load(static_cast<const ELEMENT*>(x) + start + at, columns - at);
    gain.load(static_cast<const WEIGHT*>(weight) + at, columns - at);
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
      const float scaled = grad.get(i) * gain.get(i);
      average[0] += scaled;
      average[1] += scaled * ((part.get(i) - center) * scale);
    }
  }
  row_sums<LANES>(average, reinterpret_cast<float*>(memory));
  if (threadIdx.x == 0) {
    static_cast<float*>(means)[row] = average[0] / static_cast<float>(hidden);
    static_cast<float*>(means)[rows + row] = average[1] / static_cast<float>(hidden);
  }
}
#endif
