// Attention forward on mma.sync and cp.async, sm_80 and up: bf16 and fp16, every option of the op.
//
// Grid [blocks * heads * sequences]. A block owns BLOCK_M queries of one head, a warp BLOCK_M / warps of them (16 or
// 32), a thread the columns 2t, 2t + 1 of every eight in rows g and g + 8 of every sixteen (g = lane / 4, t = lane %
// 4): rows meet by shuffles inside four lanes, warps never. It passes over the key blocks that its queries see, keeping
// the running maximum, sum and output of the softmax in registers; key blocks past the causal edge or the window are
// not read. Grouped key heads are addressed, never repeated.
//
// Shared memory: the tile of queries [BLOCK_M, PITCH], then STAGES times keys and values [BLOCK_N, PITCH] each, filled
// by cp.async STAGES - 1 blocks ahead: one barrier a key block tells both that a stage has arrived and that nobody
// reads the one to be filled next. The output leaves through the queries' tile.
// Bytes: q once, k and v once per query block (once per section and wave from memory, the rest hits the L2 cache), out
// once, 4 a row for lse: at least (2 * N + 2 * K) * D * 2 + 4 * N per token. FLOPs: 4 * D per query head and visible
// pair. With 32 rows a warp one ldmatrix of keys or values feeds 4 products and shared memory is half busy; with 16 it
// is as busy as the tensor cores.
// Relies on: rows of q, k, v and out on 16 bytes (D a multiple of 8); the swizzle of attention_common.cuh, no bank
// conflicts. Accumulation, maximum and sum are fp32; probabilities are rounded to ELEMENT for the second product.
// Source: Milakov & Gimelshein, "Online normalizer calculation for softmax", 2018; Dao, "FlashAttention-2", 2023.
//
// Defines: ELEMENT bf16 or fp16 · DIM columns computed, a multiple of 16, at least the head's dim · BLOCK_M, BLOCK_N
// queries and keys of a tile · STAGES of the ring, 2 or more · THREADS.
#include "attention_common.cuh"

#if !defined(ELEMENT) || !defined(DIM) || !defined(BLOCK_M) || !defined(BLOCK_N) || !defined(STAGES) || \
    !defined(THREADS)
#error "attention_forward.cuh needs ELEMENT, DIM, BLOCK_M, BLOCK_N, STAGES and THREADS"
#endif

namespace attention {

// Rows of a warp in the online softmax; a thread has the 2 * M rows m * 16 + half * 8 + lane / 4.
template <int M>
struct Softmax {
  float maximum[M][2];  // in base 2, after the last factor
  float total[M][2];    // this thread's columns only

  // A sink is a logit already seen, with no value; its share of the total lies in the first of four lanes.
  DEVICE void start(const float* sink) {
    const float logit = sink == nullptr ? -INFINITE : *sink * LOG2E;
    const float share = logit == -INFINITE || threadIdx.x % 4 != 0 ? 0.0f : 1.0f;
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        maximum[m][half] = logit;
        total[m][half] = share;
      }
  }

  // Scores become probabilities relative to the new maximum, and what was summed before is rescaled to it.
  template <int N, int C>
  DEVICE void step(float (&scores)[M][N][4], float (&output)[M][C][4], float factor) {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        float largest = -INFINITE;
#pragma unroll
        for (int n = 0; n < N; n++) largest = fmaxf(largest, fmaxf(scores[m][n][2 * half], scores[m][n][2 * half + 1]));
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
        const float newest = fmaxf(maximum[m][half], largest * factor);
        // A row that has seen no key yet: exp2(-inf - 0) is the 0 that exp2(-inf + inf) is not.
        const float base = newest == -INFINITE ? 0.0f : newest;
        const float correction = ptx::exp2_approx(maximum[m][half] - base);
        maximum[m][half] = newest;
        float sum = total[m][half] * correction;
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; i++) {
            scores[m][n][i] = ptx::exp2_approx(fmaf(scores[m][n][i], factor, -base));
            sum += scores[m][n][i];
          }
        total[m][half] = sum;
#pragma unroll
        for (int c = 0; c < C; c++) {
          output[m][c][2 * half] *= correction;
          output[m][c][2 * half + 1] *= correction;
        }
      }
  }

  // Divides the output by the sum, and gives each row's natural log-sum-exp to the first of its four lanes.
  template <int C>
  DEVICE void end(float (&output)[M][C][4], float* lse, int left) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        float sum = total[m][half];
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        const bool none = sum == 0.0f;
        const float share = none ? 0.0f : 1.0f / sum;
#pragma unroll
        for (int c = 0; c < C; c++) {
          output[m][c][2 * half] *= share;
          output[m][c][2 * half + 1] *= share;
        }
        const int row = m * 16 + half * 8 + lane / 4;
        if (lane % 4 == 0 && row < left) lse[row] = none ? -INFINITE : (maximum[m][half] + log2f(sum)) * LN2;
      }
  }
};

}  // namespace attention

// behind, ahead, before, factor, capped: see attention_common.cuh; offset: how much later than aligned at the end the
// queries stand; groups: query heads of a key head; blocks: query blocks of the longest sequence; section: pairs of
// head and sequence that go together; strides in elements of batch entry, token and head. out is contiguous [.., N,
// dim], lse [B, N, q_len] or [N, q_len].
extern "C" __global__ void __launch_bounds__(THREADS)
    attention_forward(const ELEMENT* q, const ELEMENT* k, const ELEMENT* v, ELEMENT* out, float* lse,
                      const float* sinks, const int32_t* cu_q, const int32_t* cu_k, int64_t q_stride_b,
                      int64_t q_stride_t, int64_t q_stride_h, int64_t k_stride_b, int64_t k_stride_t,
                      int64_t k_stride_h, int64_t v_stride_b, int64_t v_stride_t, int64_t v_stride_h, int64_t q_len,
                      int64_t k_len, int64_t behind, int64_t ahead, int64_t offset, int64_t heads, int64_t groups,
                      int64_t blocks, int64_t sequences, int64_t section, int64_t dim, float before, float factor,
                      int64_t capped) {
  using namespace attention;
  constexpr int WARPS = THREADS / 32, M = BLOCK_M / WARPS / 16, N = BLOCK_N / 8, PITCH = pitch(DIM);
  static_assert(M * 16 * WARPS == BLOCK_M, "a warp owns 16 or 32 rows");
  constexpr int TILE = BLOCK_N * PITCH;
  SHARED_MEMORY(memory);
  ELEMENT* const q_tile = reinterpret_cast<ELEMENT*>(memory);
  ELEMENT* const ring = q_tile + BLOCK_M * PITCH;

  const Owned own = owned(BLOCK_M, ahead < FAR, blocks, heads, sequences, section, cu_q, cu_k, q_len, k_len, offset);
  const int left = own.queries - own.row, features = static_cast<int>(dim);
  if (left <= 0) return;
  const int reach = static_cast<int>(ahead), back = static_cast<int>(behind);
  const int position = own.row + own.shift, last_position = position + min(BLOCK_M, left) - 1;
  // Key blocks [first, last): those that any of these queries sees.
  const int first = max(position - back, 0) / BLOCK_N;
  const int last = ceil_div(max(min(own.keys, last_position + reach + 1), 0), BLOCK_N);

  const int key_head = own.head / static_cast<int>(groups), token = own.query_start + own.row;
  const ELEMENT* q_rows = q + own.batch * q_stride_b + token * q_stride_t + own.head * q_stride_h;
  const ELEMENT* k_rows = k + own.batch * k_stride_b + own.key_start * k_stride_t + key_head * k_stride_h;
  const ELEMENT* v_rows = v + own.batch * v_stride_b + own.key_start * v_stride_t + key_head * v_stride_h;
  auto load = [&](int block) {
    if (block < last) {
      ELEMENT* const stage = ring + block % STAGES * (2 * TILE);
      const int start = block * BLOCK_N;
      load_tile<ELEMENT, BLOCK_N, DIM, THREADS>(stage, k_rows + start * k_stride_t, k_stride_t, own.keys - start,
                                                features);
      load_tile<ELEMENT, BLOCK_N, DIM, THREADS>(stage + TILE, v_rows + start * v_stride_t, v_stride_t, own.keys - start,
                                                features);
    }
    ptx::cp_async_commit();  // empty past the end too, so that the count of groups tells which block has arrived
  };
  load_tile<ELEMENT, BLOCK_M, DIM, THREADS>(q_tile, q_rows, q_stride_t, left, features);
#pragma unroll
  for (int i = 0; i < STAGES - 1; i++) load(first + i);

  const int warp_row = static_cast<int>(threadIdx.x) / 32 * (M * 16);
  float output[M][DIM / 8][4];
  clear(output);
  Softmax<M> softmax;
  softmax.start(sinks == nullptr ? nullptr : sinks + own.head);
  for (int block = first; block < last; block++) {
    ptx::cp_async_wait<STAGES - 2>();
    __syncthreads();
    load(block + STAGES - 1);
    const ELEMENT* const keys = ring + block % STAGES * (2 * TILE);
    const int start = block * BLOCK_N, end = start + BLOCK_N - 1;
    float scores[M][N][4];
    multiply_rows<ELEMENT, DIM>(scores, q_tile + warp_row * PITCH, keys);
    bend(scores, before, capped != 0);
    if (start < last_position - back || end > min(position + reach, own.keys - 1)) {
      const int at = position + warp_row - start;
      hide(scores, at - back, at + reach, own.keys - 1 - start);
    }
    softmax.step(scores, output, factor);
    uint32_t probabilities[M][N / 2][4];
    pack<ELEMENT>(probabilities, scores);
    accumulate_columns<ELEMENT, DIM>(output, probabilities, keys + TILE);
  }
  ptx::cp_async_wait<0>();
  __syncthreads();  // where no key was seen, the queries' tile may still be arriving
  softmax.end(output, lse + (own.batch * heads + own.head) * q_len + token + warp_row, left - warp_row);
  ELEMENT* out_rows = out + ((own.batch * q_len + token + warp_row) * heads + own.head) * dim;
  store_rows<ELEMENT, DIM>(output, q_tile + warp_row * PITCH, out_rows, heads * dim, left - warp_row, features);
}
