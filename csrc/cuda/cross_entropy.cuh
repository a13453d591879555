// Cross-entropy over rows of logits: loss and logsumexp, a shard's statistics, and the gradient.
//
// Three kernels, each compiled with -DKERNEL_<name> and ELEMENT (bf16, fp16 or float: the logits' type):
//
// cross_entropy_forward, grid [rows]: a block owns a row and reads it once. Writes loss and lse, or the four numbers of
//   a shard: 8 or 16 bytes a row. Four operations a logit, one of them an exponential.
// cross_entropy_grad, grid [rows], or [rows * cluster]: loss and lse, and the gradient over the logits. KEEP=1: the
//   row, or with CLUSTERED=1 a part of it in each block of a cluster, waits in shared memory for the sum to be known:
//   each logit is read once and written once. KEEP=0, for rows that fit nowhere: it is read again, from L2 as far as it
//   is still there. Eight operations a logit, two exponentials.
// cross_entropy_backward, grid [rows]: the gradient from a known lse. Each logit is read once, its gradient is written
//   once, in its place or elsewhere, with zeros in the columns of padding. Four operations a logit, one exponential.
//
// Who owns what. Vectors of 16 bytes go round the threads: thread t has t, t + THREADS, ... A row that doesn't begin or
// end at a multiple of 16 bytes has up to 15 bytes before and after, which go round the same way, one by one (in block
// 0 of a cluster). In shared memory a thread reads just what it wrote: there is no barrier between, and 8 threads in
// turn touch all 32 banks once. Shared memory: the kept part (16 bytes a vector), then Sums of the warps, of this
// block, and of up to 8 blocks.
//
// Copies. KEEP begins to copy its whole part by cp.async, in COPY_STAGES groups, before it waits for the first: a block
// of 64 KiB has that much in flight, with no register held. The others hold UNROLL vectors in registers.
#include "row_sums.cuh"

#if !defined(ELEMENT) || !defined(THREADS)
#error "define ELEMENT (bf16, fp16 or float) and THREADS (a multiple of 32)"
#endif
#ifndef KEEP
#define KEEP 0  // cross_entropy_grad: 1 where the row, or a block's part of it, waits in shared memory
#endif
#ifndef CLUSTERED
#define CLUSTERED 0  // cross_entropy_grad with KEEP: 1 where a cluster shares a row (sm_90 and later)
#endif
#ifndef UNROLL
#define UNROLL 4  // vectors that a thread loads before it uses the first
#endif

constexpr int WIDTH = VECTOR<ELEMENT>;
constexpr int COPY_STAGES = 4;

// What the loss asks for beside the logits.
struct Options {
  float smoothing, z_loss, softcap;

  // Whether a logit is more than its value: the loops without cap and smoothing are compiled apart.
  DEVICE bool plain() const { return smoothing == 0.0f && softcap == 0.0f; }
};

// Where the vectors of a row are: columns [lead, tail), `vectors` of them. The columns beside those are one block's.
struct Span {
  int lead, tail, cols, vectors;
  bool takes_loose;

  // `other` is a second row read or written with the same columns: without a common alignment there are no vectors.
  static DEVICE Span of(const ELEMENT* row, const ELEMENT* other, int cols, bool takes_loose = true) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(row);
    int lead = int(-address & 15) / int(sizeof(ELEMENT));
    if (((address ^ reinterpret_cast<uintptr_t>(other)) & 15) != 0 || lead > cols) lead = cols;
    const int vectors = (cols - lead) / WIDTH;
    return {lead, lead + vectors * WIDTH, cols, vectors, takes_loose};
  }

  // Calls work(column) for the columns outside of the vectors that are this thread's.
  template <class Work>
  DEVICE void loose(Work work) const {
    if (!takes_loose) return;
#pragma unroll 1
    for (int j = threadIdx.x; j < lead; j += THREADS) work(j);
#pragma unroll 1
    for (int j = tail + threadIdx.x; j < cols; j += THREADS) work(j);
  }
};

template <bool EXTRAS>
DEVICE void add_loose(Sums& sums, const ELEMENT* row, const Span& span, float softcap) {
  span.loose([&](int j) { sums.add<EXTRAS>(Vector<float, 1>{{to_float(row[j])}}, softcap); });
}

// This thread's part of a row, from global memory.
template <bool EXTRAS>
DEVICE Sums sums_of_row(const ELEMENT* row, const Span& span, float softcap) {
  Sums sums = Sums::none();
  add_loose<EXTRAS>(sums, row, span, softcap);
  const ELEMENT* first = row + span.lead;
  int v = threadIdx.x;
  for (; v + (UNROLL - 1) * THREADS < span.vectors; v += UNROLL * THREADS) {
    Vector<ELEMENT, WIDTH> x[UNROLL];
#pragma unroll
    for (int i = 0; i < UNROLL; i++) x[i] = load_vector<WIDTH>(first + int64_t(v + i * THREADS) * WIDTH);
#pragma unroll
    for (int i = 0; i < UNROLL; i++) sums.add<EXTRAS>(to_float(x[i]), softcap);
  }
#pragma unroll 1
  for (; v < span.vectors; v += THREADS) {
    sums.add<EXTRAS>(to_float(load_vector<WIDTH>(first + int64_t(v) * WIDTH)), softcap);
  }
  return sums;
}

// The part of a row that waits in a block's shared memory: `count` vectors from the row's `first` on.
struct Part {
  ELEMENT* kept;
  int first, count;

  static DEVICE Part of(unsigned char* memory, const Span& span, int block, int blocks) {
    const int share = ceil_div(span.vectors, blocks);
    const int first = min(block * share, span.vectors);
    return {reinterpret_cast<ELEMENT*>(memory), first, min(share, span.vectors - first)};
  }

  DEVICE int turns_of_stage() const { return ceil_div(ceil_div(count, THREADS), COPY_STAGES); }

  // Begins to copy everything, in COPY_STAGES groups; a thread copies what it will use.
  DEVICE void copy(const ELEMENT* vectors) const {
    const int turns = turns_of_stage();
    for (int stage = 0, v = threadIdx.x; stage < COPY_STAGES; stage++) {
      for (int turn = 0; turn < turns; turn++, v += THREADS) {
        if (v < count) ptx::cp_async_16(kept + v * WIDTH, vectors + int64_t(first + v) * WIDTH, true);
      }
      ptx::cp_async_commit();
    }
  }

  template <bool EXTRAS, int STAGE = 0>
  DEVICE void add_to(Sums& sums, float softcap) const {
    ptx::cp_async_wait<COPY_STAGES - 1 - STAGE>();
    const int turns = turns_of_stage();
    int v = STAGE * turns * THREADS + threadIdx.x;
    for (int turn = 0; turn < turns && v < count; turn++, v += THREADS) {
      sums.add<EXTRAS>(to_float(load_vector<WIDTH>(kept + v * WIDTH)), softcap);
    }
    if constexpr (STAGE + 1 < COPY_STAGES) add_to<EXTRAS, STAGE + 1>(sums, softcap);
  }
};

// Where a token's target is, and what that means.
struct Target {
  bool ignored, here;
  int column;  // -1 where it is not among these columns

  static DEVICE Target of(int64_t target, int64_t vocab_start, int cols, int64_t ignore_index) {
    const int64_t local = target - vocab_start;
    const bool ignored = target == ignore_index;
    const bool here = !ignored && local >= 0 && local < cols;
    return {ignored, here, here ? int(local) : -1};
  }

  DEVICE float score(const ELEMENT* row, float softcap) const {
    return here ? capped(to_float(row[column]), softcap) : 0.0f;
  }

  // A GPU cannot raise without waiting: NaN says that a target is no class.
  DEVICE float loss(float lse, float at_target, float plain, int cols, const Options& options) const {
    if (!here) return ignored ? 0.0f : not_a_number();
    float loss = lse - (1.0f - options.smoothing) * at_target + options.z_loss * lse * lse;
    if (options.smoothing != 0.0f) loss -= options.smoothing * plain / float(cols);
    return loss;
  }
};

// scale * d(loss)/d(logit) of a row, given its lse.
struct Slope {
  float lse, gain, smooth, bonus, softcap;
  int column;

  static DEVICE Slope of(float lse, float scale, int column, int64_t vocabulary, const Options& options) {
    return {lse,
            scale * (1.0f + 2.0f * options.z_loss * lse),
            scale * options.smoothing / float(vocabulary),
            scale * (1.0f - options.smoothing),
            options.softcap,
            column};
  }

  // The gradients of logits whose first is in column `first`.
  template <bool EXTRAS, int N>
  DEVICE Vector<float, N> gradient(Vector<float, N> x, int first) const {
    const bool hit = uint32_t(column - first) < uint32_t(N);
#pragma unroll
    for (int i = 0; i < N; i++) {
      const float s = EXTRAS ? capped(x[i], softcap) : x[i];
      float grad = fmaf(exponential(s - lse), gain, -smooth);
      if (hit && column - first == i) grad -= bonus;
      if (EXTRAS && softcap != 0.0f) {
        const float t = s * (1.0f / softcap);
        grad *= 1.0f - t * t;
      }
      x[i] = grad;
    }
    return x;
  }

  template <bool EXTRAS>
  DEVICE void write_loose(const ELEMENT* row, ELEMENT* out, const Span& span) const {
    span.loose([&](int j) {
      const Vector<float, 1> x{{to_float(row[j])}};
      out[j] = from_float<ELEMENT>(gradient<EXTRAS>(x, j)[0]);
    });
  }
};

// Gradients of a row in global memory, last vectors first: after a forward those are the ones still in L2.
template <bool EXTRAS>
DEVICE void write_gradient(const ELEMENT* row, ELEMENT* out, const Span& span, const Slope& slope) {
  slope.write_loose<EXTRAS>(row, out, span);
  for (int v = span.vectors - 1 - int(threadIdx.x); v >= 0; v -= UNROLL * THREADS) {
    Vector<ELEMENT, WIDTH> x[UNROLL];
#pragma unroll
    for (int i = 0; i < UNROLL; i++) {
      const int at = v - i * THREADS;
      if (at >= 0) x[i] = load_vector<WIDTH>(row + span.lead + int64_t(at) * WIDTH);
    }
#pragma unroll
    for (int i = 0; i < UNROLL; i++) {
      const int at = v - i * THREADS;
      if (at < 0) break;
      const int column = span.lead + at * WIDTH;
      store_vector(out + column, from_float<ELEMENT>(slope.gradient<EXTRAS>(to_float(x[i]), column)));
    }
  }
}

// Gradients of the vectors that wait in shared memory.
template <bool EXTRAS>
DEVICE void write_kept_gradient(const Part& part, ELEMENT* row, const Span& span, const Slope& slope) {
  for (int v = threadIdx.x; v < part.count; v += THREADS) {
    const int column = span.lead + (part.first + v) * WIDTH;
    const Vector<float, WIDTH> x = to_float(load_vector<WIDTH>(part.kept + v * WIDTH));
    store_vector(row + column, from_float<ELEMENT>(slope.gradient<EXTRAS>(x, column)));
  }
}

// Zeros in the loose columns and in the vectors [first, first + count).
DEVICE void clear(ELEMENT* row, const Span& span, int first, int count) {
  span.loose([&](int j) { row[j] = from_float<ELEMENT>(0.0f); });
  for (int v = threadIdx.x; v < count; v += THREADS) {
    store_vector(reinterpret_cast<uint32_t*>(row + span.lead) + int64_t(first + v) * 4, Vector<uint32_t, 4>{});
  }
}

#if defined(KERNEL_cross_entropy_forward)
// loss and lse [rows], or, where stats is not null, stats [4, rows]: maximum, sum of exponentials, target's score, sum.
extern "C" __global__ void __launch_bounds__(THREADS)
    cross_entropy_forward(const ELEMENT* logits, const int64_t* target, float* loss, float* lse, float* stats,
                          int64_t stride, int64_t rows, int64_t cols, int64_t vocab_start, int64_t ignore_index,
                          float smoothing, float z_loss, float softcap) {
  SHARED_MEMORY(memory);
  const Options options = {smoothing, z_loss, softcap};
  const int64_t row = blockIdx.x;
  const ELEMENT* x = logits + row * stride;
  const Span span = Span::of(x, x, int(cols));
  Sums sums = options.plain() ? sums_of_row<false>(x, span, 0.0f) : sums_of_row<true>(x, span, softcap);
  sums = sums_of_block(sums, reinterpret_cast<Sums*>(memory));
  if (threadIdx.x != 0) return;
  const Target t = Target::of(target[row], vocab_start, int(cols), ignore_index);
  const float at_target = t.score(x, softcap);
  if (stats != nullptr) {
    stats[row] = sums.maximum();
    stats[rows + row] = sums.total;
    stats[2 * rows + row] = at_target;
    stats[3 * rows + row] = smoothing == 0.0f ? 0.0f : sums.plain;
  } else {
    loss[row] = t.loss(sums.lse(), at_target, sums.plain, int(cols), options);
    lse[row] = sums.lse();
  }
}
#endif

#if defined(KERNEL_cross_entropy_grad)
// loss and lse [rows]; logits are overwritten with scale * d(loss)/d(logits), scale [rows] or one number (stride 0).
extern "C" __global__ void __launch_bounds__(THREADS)
    cross_entropy_grad(ELEMENT* logits, const int64_t* target, const float* scale, float* loss, float* lse,
                       int64_t kept_bytes, int64_t stride, int64_t cols, int64_t scale_stride, int64_t ignore_index,
                       float smoothing, float z_loss, float softcap) {
  SHARED_MEMORY(memory);
  Sums* scratch = reinterpret_cast<Sums*>(memory + kept_bytes);
  const Options options = {smoothing, z_loss, softcap};
#if CLUSTERED
  const int block = ptx::cluster_rank(), blocks = ptx::cluster_size();
#else
  constexpr int block = 0, blocks = 1;
#endif
  const int64_t row = blockIdx.x / blocks;
  ELEMENT* x = logits + row * stride;
  const Span span = Span::of(x, x, int(cols), block == 0);
  const Part part = Part::of(memory, span, block, blocks);
  Sums sums = Sums::none();
  if (KEEP) part.copy(x + span.lead);
  // Before any barrier, so before any thread writes a gradient over it.
  const Target t = Target::of(target[row], 0, int(cols), ignore_index);
  const float at_target = t.score(x, softcap);
  if (!KEEP) {
    sums = options.plain() ? sums_of_row<false>(x, span, 0.0f) : sums_of_row<true>(x, span, softcap);
  } else if (options.plain()) {
    add_loose<false>(sums, x, span, 0.0f);
    part.add_to<false>(sums, 0.0f);
  } else {
    add_loose<true>(sums, x, span, softcap);
    part.add_to<true>(sums, softcap);
  }
  sums = sums_of_cluster(sums_of_block(sums, scratch), scratch + WARPS);
  if (block == 0 && threadIdx.x == 0) {
    loss[row] = t.loss(sums.lse(), at_target, sums.plain, int(cols), options);
    lse[row] = sums.lse();
  }
  if (t.ignored) {
    clear(x, span, part.first, part.count);
  } else {
    const Slope slope = Slope::of(sums.lse(), scale[row * scale_stride], t.column, cols, options);
    if (!KEEP) {
      softcap == 0.0f ? write_gradient<false>(x, x, span, slope) : write_gradient<true>(x, x, span, slope);
    } else if (softcap == 0.0f) {
      slope.write_loose<false>(x, x, span);
      write_kept_gradient<false>(part, x, span, slope);
    } else {
      slope.write_loose<true>(x, x, span);
      write_kept_gradient<true>(part, x, span, slope);
    }
  }
}
#endif

#if defined(KERNEL_cross_entropy_backward)
// out [rows, width] = scale * d(loss)/d(logits) in the columns below cols, 0 in the others; an ignored row is not read.
extern "C" __global__ void __launch_bounds__(THREADS)
    cross_entropy_backward(const ELEMENT* logits, ELEMENT* out, const int64_t* target, const float* lse,
                           const float* scale, int64_t stride, int64_t out_stride, int64_t cols, int64_t width,
                           int64_t vocab_start, int64_t vocabulary, int64_t scale_stride, int64_t ignore_index,
                           float smoothing, float z_loss, float softcap) {
  const Options options = {smoothing, z_loss, softcap};
  const int64_t row = blockIdx.x;
  const ELEMENT* x = logits + row * stride;
  ELEMENT* dx = out + row * out_stride;
  const Span span = Span::of(x, dx, int(cols));
  for (int j = int(cols) + int(threadIdx.x); j < width; j += THREADS) dx[j] = from_float<ELEMENT>(0.0f);
  const Target t = Target::of(target[row], vocab_start, int(cols), ignore_index);
  if (t.ignored) {
    clear(dx, span, 0, span.vectors);
    return;
  }
  const Slope slope = Slope::of(lse[row], scale[row * scale_stride], t.column, vocabulary, options);
  softcap == 0.0f ? write_gradient<false>(x, dx, span, slope) : write_gradient<true>(x, dx, span, slope);
}
#endif
