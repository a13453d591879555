// Causal attention, first try: a thread takes a query and does what the formula says.
//
// Idea         softmax(scale * q k') v row by row, without the matrix of scores: a pass over the keys for the largest
//              score, which the exponentials need to stay finite, and one for their sum and the values. Each score is
//              computed twice, which is cheaper than to store it.
// Bytes        for every pair of query and key that it sees two reads of the key and one of the value, 6 * D bytes:
//              nothing that a thread has read serves another, except by luck in the caches.
// FLOPs        6 * D a pair, for 4 * D that are needed, in fp32 on the ordinary cores.
// Threads      one per query; the lanes of a warp read the same key at the same time, and 32 rows of q at first.
// Cost left    the bytes: at 1 FLOP a byte the loads decide, and tensor cores would not help.
// Next         let a block's threads share what they read: 02.
//
// Defines: THREADS, DIM features of a head. Grid: (ceil(tokens / THREADS), heads). q, k, v, out: bf16
// [heads, tokens, DIM].
#include "common.cuh"

#if defined(KERNEL_attention_thread_per_query)
extern "C" __global__ void __launch_bounds__(THREADS)
    attention_thread_per_query(const bf16* q, const bf16* k, const bf16* v, bf16* out, int64_t tokens, float scale) {
  const int64_t query = blockIdx.x * int64_t(THREADS) + threadIdx.x, head = blockIdx.y * tokens;
  if (query >= tokens) return;
  float row[DIM], sums[DIM] = {};
  for (int d = 0; d < DIM; d++) row[d] = to_float(q[(head + query) * DIM + d]) * scale;
  auto score = [&](int64_t key) {
    float sum = 0.0f;
    for (int d = 0; d < DIM; d++) sum += row[d] * to_float(k[(head + key) * DIM + d]);
    return sum;
  };
  float largest = score(0), total = 0.0f;
  for (int64_t key = 1; key <= query; key++) largest = fmaxf(largest, score(key));
  for (int64_t key = 0; key <= query; key++) {
    const float weight = expf(score(key) - largest);
    total += weight;
    for (int d = 0; d < DIM; d++) sums[d] += weight * to_float(v[(head + key) * DIM + d]);
  }
  for (int d = 0; d < DIM; d++) out[(head + query) * DIM + d] = from_float<bf16>(sums[d] / total);
}
#endif
