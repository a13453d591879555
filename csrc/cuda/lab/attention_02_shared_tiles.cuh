// Causal attention, second try: a block's threads share tiles of keys and values, and the softmax needs one pass.
//
// Idea         two. The block copies BLOCK_N keys and values to shared memory once, and its THREADS queries all read
//              them there. And the softmax runs online: when a score is larger than the largest so far, what was summed
//              is multiplied by exp(old - new), as if it had been computed with the new one from the start (Milakov &
//              Gimelshein, 2018). Then each score is computed once, and no pass for the maximum is needed.
// Bytes        k and v once per THREADS queries: 4 * D / THREADS a pair of query and key from memory, a hundredth of
// 01. FLOPs        4 * D a pair, and one exponential and at most D + 1 multiplications more for each new largest score.
// Threads      one per query still. Key blocks behind the last query of the block are not read.
// Banks        all lanes read the same key: a broadcast, no conflicts. The copies write 16 bytes a lane side by side.
// Cost left    fp32 on the ordinary cores is a fifteenth of what tensor cores do, and each number that they take is
//              loaded from shared memory alone: two loads and two conversions for 2 products.
// Next         the products are those of matrices; give them to the tensor cores: 03.
//
// Defines: THREADS, DIM, BLOCK_N keys of a tile. Grid: (ceil(tokens / THREADS), heads). Shared: 4 * BLOCK_N * DIM
// bytes.
#include "common.cuh"

#if defined(KERNEL_attention_shared_tiles)
extern "C" __global__ void __launch_bounds__(THREADS)
    attention_shared_tiles(const bf16* q, const bf16* k, const bf16* v, bf16* out, int64_t tokens, float scale) {
  SHARED_MEMORY(memory);
  bf16* const keys = reinterpret_cast<bf16*>(memory);
  bf16* const values = keys + BLOCK_N * DIM;
  const int64_t first = blockIdx.x * int64_t(THREADS), head = blockIdx.y * tokens;
  const int64_t query = first + threadIdx.x;
  const bool there = query < tokens;
  float row[DIM], sums[DIM] = {};
  for (int d = 0; d < DIM; d++) row[d] = there ? to_float(q[(head + query) * DIM + d]) * scale : 0.0f;
  float largest = -1e30f, total = 0.0f;
  for (int64_t start = 0; start < tokens && start < first + THREADS; start += BLOCK_N) {
    __syncthreads();  // nobody reads the tile before
    for (int i = threadIdx.x * 8; i < BLOCK_N * DIM; i += THREADS * 8) {
      if (start + i / DIM >= tokens) continue;
      store_vector(keys + i, load_vector<8>(k + (head + start) * DIM + i));
      store_vector(values + i, load_vector<8>(v + (head + start) * DIM + i));
    }
    __syncthreads();  // the tile is there
    for (int key = 0; there && key < BLOCK_N && start + key <= query; key++) {
      float score = 0.0f;
      for (int d = 0; d < DIM; d++) score += row[d] * to_float(keys[key * DIM + d]);
      const float newest = fmaxf(largest, score), correction = expf(largest - newest), weight = expf(score - newest);
      largest = newest;
      total = total * correction + weight;
      for (int d = 0; d < DIM; d++) sums[d] = sums[d] * correction + weight * to_float(values[key * DIM + d]);
    }
  }
  if (!there) return;
  for (int d = 0; d < DIM; d++) out[(head + query) * DIM + d] = from_float<bf16>(sums[d] / total);
}
#endif
