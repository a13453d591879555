// Attention, forward and backward, with tasks of one document and one key/value head each, in float arithmetic.
#include "attention.h"

#include "scratch.h"

namespace megalite {

constexpr int64_t kQueries = 64;  // rows of a block of queries
constexpr int64_t kKeys = 256;    // columns of a block of keys: its scores (64 KB) stay in the second-level cache
constexpr int64_t kPad = 16;      // features and keys are padded to this with zeros, for any number of LANES

// What one thread works in, all float: whole documents (blocks) and one block of queries (rows). Not initialised.
struct Buffers {
  Scratch memory;
  float *keys, *keys_t, *values, *values_t, *dkeys, *dvalues;
  float *queries, *out, *dout, *dqueries, *scores, *dscores;

  Buffers(const AttentionShape& shape, bool backward) {
    const int64_t dim = round_up(shape.dim, kPad);
    const int64_t blocks = round_up(longest_keys(shape), kKeys) * dim, rows = kQueries * dim, tile = kQueries * kKeys;
    memory = Scratch(((backward ? 6 : 3) * blocks + 4 * rows + 2 * tile) * sizeof(float));
    float* next = memory.data<float>();
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

void attention_forward(DType dtype, Strided q, Strided k, Strided v, void* out, float* lse, AttentionShape shape,
                       int threads) {
  const AttentionForward arguments{q, k, v, out, lse, shape};
  if (dtype == DType::bfloat16 && attention_forward_pairs(arguments, threads)) return;
  const int64_t tasks = shape.num_segments * shape.kv_heads;
  MEGALITE_WITH_TYPE(dtype, {
    const auto task = MEGALITE_PICK(attention_forward_task<T>);
    run_tasks<Buffers>(shape, false, tasks, threads, [&](int64_t i, const Buffers& b) { task(arguments, i, b); });
  });
}

void attention_backward(DType dtype, Strided dout, const float* dlse, Strided q, Strided k, Strided v, Strided out,
                        const float* lse, Strided dq, Strided dk, Strided dv, float* dsinks, AttentionShape shape,
                        int threads) {
  const AttentionBackward arguments{dout, q, k, v, out, dlse, lse, dq, dk, dv, dsinks, shape};
  if (dtype == DType::bfloat16 && attention_backward_pairs(arguments, threads)) return;
  const int64_t tasks = shape.num_segments * shape.kv_heads;
  MEGALITE_WITH_TYPE(dtype, {
    const auto task = MEGALITE_PICK(attention_backward_task<T>);
    run_tasks<Buffers>(shape, true, tasks, threads, [&](int64_t i, const Buffers& b) { task(arguments, i, b); });
  });
}

}  // namespace megalite
