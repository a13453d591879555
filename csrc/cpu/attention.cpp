// Attention, forward and backward, with tasks of one document and one key/value head each.
#include <memory>
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
  void *dq, *dk, *dv;
  AttentionShape shape;
};

constexpr int64_t kQueries = 64;  // rows of a block of queries
constexpr int64_t kKeys = 256;    // columns of a block of keys: its scores (64 KB) stay in the second-level cache
constexpr int64_t kPad = 16;      // features and keys are padded to this with zeros, for any number of LANES

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// What one thread works in, all float: whole documents (blocks) and one block of queries (rows). Not initialised.
struct Buffers {
  std::unique_ptr<float[]> memory;
  float *keys, *keys_t, *values, *values_t, *dkeys, *dvalues;
  float *queries, *out, *dout, *dqueries, *scores, *dscores;

  Buffers(const AttentionShape& shape, bool backward) {
    int64_t longest = 0;
    for (int64_t i = 0; i < shape.num_segments; ++i) longest = std::max(longest, shape.segments[i].k_len);
    const int64_t dim = round_up(shape.dim, kPad);
    const int64_t blocks = round_up(longest, kKeys) * dim, rows = kQueries * dim, tile = kQueries * kKeys;
    memory.reset(new float[(backward ? 6 : 3) * blocks + 4 * rows + 2 * tile]);
    float* next = memory.get();
    const auto take = [&](int64_t size) { return std::exchange(next, next + size); };
    keys = take(blocks), keys_t = take(blocks), values = take(blocks);
    values_t = dkeys = dvalues = nullptr;
    if (backward) values_t = take(blocks), dkeys = take(blocks), dvalues = take(blocks);
    queries = take(rows), out = take(rows), dout = take(rows), dqueries = take(rows);
    scores = take(tile), dscores = take(tile);
  }
};

}  // namespace megalite

#define MEGALITE_KERNELS "attention.inc"
#include "foreach_isa.h"

namespace megalite {

namespace {

// Tasks go to whichever thread is free: each writes its own outputs, so the bits don't depend on who does it.
template <class Arguments>
void run_tasks(const Arguments& arguments, void (*task)(const Arguments&, int64_t, const Buffers&), bool backward,
               int threads) {
  const int64_t tasks = arguments.shape.num_segments * arguments.shape.kv_heads;
  threads = static_cast<int>(std::min<int64_t>(threads, tasks));
  if (tasks == 0) return;
#ifdef _OPENMP
#pragma omp parallel num_threads(threads) if (threads > 1)
#endif
  {
    const Buffers buffers(arguments.shape, backward);
#ifdef _OPENMP
#pragma omp for schedule(dynamic, 1)
#endif
    for (int64_t i = 0; i < tasks; ++i) task(arguments, i, buffers);
  }
}

}  // namespace

void attention_forward(DType dtype, Strided q, Strided k, Strided v, void* out, float* lse, AttentionShape shape,
                       int threads) {
  const AttentionForward arguments{q, k, v, out, lse, shape};
  MEGALITE_WITH_TYPE(dtype, { run_tasks(arguments, MEGALITE_PICK(attention_forward_task<T>), false, threads); });
}

void attention_backward(DType dtype, Strided dout, const float* dlse, Strided q, Strided k, Strided v, Strided out,
                        const float* lse, void* dq, void* dk, void* dv, AttentionShape shape, int threads) {
  const AttentionBackward arguments{dout, q, k, v, out, dlse, lse, dq, dk, dv, shape};
  MEGALITE_WITH_TYPE(dtype, { run_tasks(arguments, MEGALITE_PICK(attention_backward_task<T>), true, threads); });
}

}  // namespace megalite
