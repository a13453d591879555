// What the attention kernels share: arguments, what a query sees, and how tasks go to threads.
#pragma once
#include <type_traits>
#include <utility>

#include "common.h"

namespace megalite {

struct AttentionForward {
  Strided q, k, v;
  void* out;
  float* lse;
  AttentionShape shape;
};

struct AttentionBackward {
  Strided dout, q, k, v, out;
  const float *dlse, *lse;
  Strided dq, dk, dv;
  float* dsinks;
  AttentionShape shape;
};

inline int64_t longest_keys(const AttentionShape& shape) {
  int64_t longest = 0;
  for (int64_t i = 0; i < shape.num_segments; ++i) longest = std::max(longest, shape.segments[i].k_len);
  return longest;
}

template <class T>
inline const T* start_of(const Strided& x, int64_t token, int64_t head) {
  return static_cast<const T*>(x.data) + token * x.token + head * x.head;
}

template <class T>
inline T* start_of_written(const Strided& x, int64_t token, int64_t head) {
  return const_cast<T*>(start_of<T>(x, token, head));
}

// Keys [low, high) of a block.
struct Range {
  int64_t low, high;
};

// What query `row` of a document sees of the `width` keys from `start` on; nothing if the document ends before it.
inline Range visible(const AttentionShape& s, const Segment& g, int64_t row, int64_t start, int64_t width) {
  if (row >= g.q_len) return {0, 0};
  const int64_t position = row + g.k_len - g.q_len + s.offset;
  int64_t low = 0, high = s.causal ? position + 1 : g.k_len;
  if (s.window > 0) {
    low = position - s.window + 1;
    high = std::min(high, position + s.window);
  }
  low = std::min(std::max<int64_t>(low - start, 0), width);
  high = std::min(std::min(high, g.k_len) - start, width);
  return {low, std::max(low, high)};
}

// A row of softmax after its last key: what to multiply the sum of values by, and the log-sum-exp. A sink is one more
// logit, without a value; `top` is the largest logit of the keys (-inf: none was seen) and `total` is relative to it.
struct RowEnd {
  float inverse, lse;
};

inline RowEnd end_of_row(const AttentionShape& s, int64_t head, float top, float total) {
  if (s.sinks == nullptr) return {total == 0.0f ? 0.0f : 1.0f / total, top + std::log(total)};
  const float above = s.sinks[head] - top;
  const float weight = above > 0.0f ? std::exp(-above) : 1.0f;
  const float all = total * weight + std::exp(std::min(above, 0.0f));
  return {total == 0.0f ? 0.0f : weight / all, std::max(s.sinks[head], top) + std::log(all)};
}

// Calls body(i, buffers) for every task. They go to whichever thread is free: each writes its own outputs, so the bits
// don't depend on who does it.
template <class Buffers, class Body>
void run_tasks(const AttentionShape& shape, bool backward, int64_t tasks, int threads, const Body& body) {
  threads = static_cast<int>(std::min<int64_t>(threads, tasks));
  if (tasks == 0) return;
#ifdef _OPENMP
#pragma omp parallel num_threads(threads) if (threads > 1)
#endif
  {
    const Buffers buffers(shape, backward);
#ifdef _OPENMP
#pragma omp for schedule(dynamic, 1)
#endif
    for (int64_t i = 0; i < tasks; ++i) body(i, buffers);
  }
}

// Both for bf16 tensors; false, with nothing done, where the instruction set in use has no products of bf16 pairs.
bool attention_forward_pairs(const AttentionForward& arguments, int threads);
bool attention_backward_pairs(const AttentionBackward& arguments, int threads);

}  // namespace megalite
