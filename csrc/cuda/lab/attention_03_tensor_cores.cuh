// Causal attention, third try: both products on the tensor cores, probabilities stay in registers.
//
// Idea         a warp takes 16 queries, and mma.sync multiplies 16 x 16 by 16 x 8 numbers at a time. Its result lies in
//              the registers in the very places where the next product wants its left operand, so scores become
//              probabilities and operands without a detour. Operands come by ldmatrix, from tiles whose 16-byte chunks
//              are turned by their row (attention_common.cuh). The softmax is online by block of keys, not by key: one
//              rescaling of the output for BLOCK_N keys.
// Bytes        k and v once per BLOCK_M queries: 4 * D / BLOCK_M a pair, as in 02 with as many queries a block.
// FLOPs        4 * D a pair on the tensor cores, and in blocks on the diagonal as much again for nothing.
// Threads      32 for 16 queries; a row of scores is in four lanes, which meet by two shuffles.
// Banks        eight lanes of each phase touch eight different groups of four banks: no conflicts.
// Cost left    the block waits for each tile and then computes; the tensor cores wait meanwhile. Every ldmatrix of keys
//              or values feeds two products, so that shared memory is as busy as they are.
// Next         attention_forward.cuh: the next tile is under way while this one is used (a ring of stages, one barrier
// a
//              tile), a warp takes 32 queries where registers allow, and every option of the op has its place.
//
// Defines: THREADS, DIM a multiple of 64, BLOCK_N, and BLOCK_M = THREADS / 2 queries of a block. Grid:
// (ceil(tokens / BLOCK_M), heads). Shared: 2 * (BLOCK_M + 2 * BLOCK_N) * DIM bytes.
#include "attention_common.cuh"

#if defined(KERNEL_attention_tensor_cores)
extern "C" __global__ void __launch_bounds__(THREADS)
    attention_tensor_cores(const bf16* q, const bf16* k, const bf16* v, bf16* out, int64_t tokens, float scale) {
  using namespace attention;
  constexpr int BLOCK_M = THREADS / 2, N = BLOCK_N / 8, C = DIM / 8;
  SHARED_MEMORY(memory);
  bf16* const queries = reinterpret_cast<bf16*>(memory);
  bf16* const keys = queries + BLOCK_M * DIM;
  bf16* const values = keys + BLOCK_N * DIM;
  const int first = blockIdx.x * BLOCK_M, count = static_cast<int>(tokens), warp_row = warp_index() * 16;
  const int64_t head = blockIdx.y * tokens * DIM;
  load_tile<bf16, BLOCK_M, DIM, THREADS>(queries, q + head + first * int64_t(DIM), DIM, count - first, DIM);
  float output[1][C][4], largest[2] = {-INFINITE, -INFINITE}, total[2] = {};
  clear(output);
  for (int start = 0; start < min(count, first + BLOCK_M); start += BLOCK_N) {
    __syncthreads();  // nobody reads the tiles before
    load_tile<bf16, BLOCK_N, DIM, THREADS>(keys, k + head + start * int64_t(DIM), DIM, count - start, DIM);
    load_tile<bf16, BLOCK_N, DIM, THREADS>(values, v + head + start * int64_t(DIM), DIM, count - start, DIM);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncthreads();  // all threads' copies are there
    float scores[1][N][4];
    multiply_rows<bf16, DIM>(scores, queries + warp_row * DIM, keys);
    if (start + BLOCK_N > first + warp_row) hide(scores, -count, first + warp_row - start, count - 1 - start);
#pragma unroll
    for (int half = 0; half < 2; half++) {  // rows lane / 4 and lane / 4 + 8
      float top = largest[half];
#pragma unroll
      for (int n = 0; n < N; n++)
        top = fmaxf(top, scale * LOG2E * fmaxf(scores[0][n][2 * half], scores[0][n][2 * half + 1]));
      top = warp_max<4>(top);
      const float correction = ptx::exp2_approx(largest[half] - top);
      largest[half] = top;
      total[half] *= correction;
#pragma unroll
      for (int n = 0; n < N; n++)
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; i++)
          total[half] += scores[0][n][i] = ptx::exp2_approx(scores[0][n][i] * (scale * LOG2E) - top);
#pragma unroll
      for (int c = 0; c < C; c++) output[0][c][2 * half] *= correction, output[0][c][2 * half + 1] *= correction;
    }
    uint32_t weights[1][N / 2][4];
    pack<bf16>(weights, scores);
    accumulate_columns<bf16, DIM>(output, weights, values);
  }
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const float share = 1.0f / warp_sum<4>(total[half]);
#pragma unroll
    for (int c = 0; c < C; c++) output[0][c][2 * half] *= share, output[0][c][2 * half + 1] *= share;
  }
  const int row = first + warp_row;
  __syncwarp();  // the warp has read its queries: the output leaves through their place
  store_rows<bf16, DIM>(output, queries + warp_row * DIM, out + head + row * int64_t(DIM), DIM, count - row, DIM);
}
#endif
