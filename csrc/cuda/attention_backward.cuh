// Attention backward on mma.sync and cp.async, sm_80 and up, in three kernels without atomics: the same bits each run.
//
// With P the probabilities and delta = rowsum(dO * O) - dlse: dV = P'dO, dS = P * (dO V' - delta), dQ = dS K * scale,
// dK = dS'Q * scale. P is recomputed from q, k and lse, once where key blocks are owned (dk, dv) and once where query
// blocks are (dq): 14 * D FLOPs per query head and visible pair instead of 10 * D, and no sum whose order depends on
// the machine. Heads of a group add up in one block, in order.
//
//   attention_statistics  grid [batch * blocks * heads]; a block owns BLOCK_T tokens of a head, eight lanes a token.
//                         Writes (lse in base 2, delta) side by side, and the block's share of dsinks. Bytes per token:
//                         N * (4 * D + 12), 4 * N more for dlse.
//   attention_dk_dv       grid [blocks * kv_heads * sequences]; a block owns BLOCK_N keys of a key head, a warp 16 or
//   32
//                         of them, and passes over the queries that see one, of every head of the group. Scores stand
//                         transposed, [keys, queries]: P' and dS' are left operands straight from registers. Reads k, v
//                         once and q, dout once per key block; FLOPs 8 * D per query head and visible pair.
//   attention_dq          grid [blocks * heads * sequences]; a block owns BLOCK_M queries of a head, a warp 16 or 32,
//                         and passes over the keys that they see. Reads q, dout once and k, v once per query block;
//                         FLOPs 6 * D.
//
// Shared memory of the last two: two tiles that the block owns (k, v or q, dout), then STAGES times the two that it
// passes over, and for dk and dv their statistics, filled by cp.async STAGES - 1 blocks ahead; one barrier a block.
// Results leave through the owned tiles. Relies on rows of 16 bytes and on the swizzle of attention_common.cuh: no bank
// conflicts (statistics are read as 16 bytes, the same by eight lanes). Sums are fp32; P and dS are rounded to ELEMENT
// for their products. Source: Dao, "FlashAttention-2", 2023.
//
// Defines: ELEMENT · THREADS; of statistics BLOCK_T, a multiple of THREADS / 8; of the others DIM, BLOCK_M, BLOCK_N,
// STAGES as in attention_forward.cuh.
#include "attention_common.cuh"

#if !defined(ELEMENT) || !defined(THREADS)
#error "attention_backward.cuh needs ELEMENT and THREADS"
#endif

namespace attention {

// Probabilities exp2(factor * scores - lse) take the scores' place, for dS times the slope of the soft-cap: scores are
// its tanh then. `packed` are the probabilities alone. `lse_of(m, n, i)` is that of accumulator i.
template <typename T, int M, int N, typename Lse>
DEVICE void probabilities_of(uint32_t (*packed)[N / 2][4], float (&scores)[M][N][4], float factor, bool capped,
                             Lse lse_of) {
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int n = 0; n < N; n++) {
      float p[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float score = scores[m][n][i];
        p[i] = ptx::exp2_approx(fmaf(score, factor, -lse_of(m, n, i)));
        // Hidden scores are -inf, and so would be their slope: 0 keeps their product with p = 0 a number.
        scores[m][n][i] = capped ? p[i] * fmaxf(1.0f - score * score, 0.0f) : p[i];
      }
      if (packed != nullptr) {
        packed[m][n / 2][n % 2 * 2] = ptx::pack2<T>(p[0], p[1]);
        packed[m][n / 2][n % 2 * 2 + 1] = ptx::pack2<T>(p[2], p[3]);
      }
    }
}

}  // namespace attention

#if defined(KERNEL_attention_statistics)
// dout, out [batch, tokens, heads, dim] by strides, dim a multiple of 8, rows on 16 bytes; lse, dlse (or null)
// [batch, heads, tokens]; statistics [batch, heads, tokens, 2]. sinks [heads] with partial [batch, blocks, heads], or
// null. A row that sees no key gets a base-2 lse of +infinity, and with it probabilities of 0.
extern "C" __global__ void __launch_bounds__(THREADS)
    attention_statistics(const ELEMENT* dout, const ELEMENT* out, const float* lse, const float* dlse,
                         const float* sinks, float* statistics, float* partial, int64_t dout_stride_b,
                         int64_t dout_stride_t, int64_t dout_stride_h, int64_t out_stride_b, int64_t out_stride_t,
                         int64_t out_stride_h, int64_t tokens, int64_t heads, int64_t blocks, int64_t dim) {
  using namespace attention;
  static_assert(BLOCK_T % (THREADS / 8) == 0, "every pass has a row for every eight lanes");
  SHARED_MEMORY(memory);
  const int program = blockIdx.x, head_count = static_cast<int>(heads), block_count = static_cast<int>(blocks);
  const int64_t head = program % head_count, batch = program / head_count / block_count;
  const int64_t start = program / head_count % block_count * BLOCK_T;
  const int part = threadIdx.x % 8, features = static_cast<int>(dim);
  const float sink = sinks == nullptr ? 0.0f : sinks[head] * LOG2E;
  float share = 0.0f;
#pragma unroll
  for (int pass = 0; pass < BLOCK_T / (THREADS / 8); pass++) {
    const int64_t token = start + pass * (THREADS / 8) + threadIdx.x / 8;
    const bool there = token < tokens;
    const ELEMENT* a = dout + batch * dout_stride_b + token * dout_stride_t + head * dout_stride_h;
    const ELEMENT* b = out + batch * out_stride_b + token * out_stride_t + head * out_stride_h;
    float sum = 0.0f;
    for (int at = part * 8; there && at < features; at += 64) {
      const auto x = load_vector<8>(a + at), y = load_vector<8>(b + at);
#pragma unroll
      for (int i = 0; i < 8; i++) sum = fmaf(to_float(x[i]), to_float(y[i]), sum);
    }
#pragma unroll
    for (int step = 1; step < 8; step *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (part != 0 || !there) continue;
    const int64_t row = (batch * heads + head) * tokens + token;
    const float delta = dlse == nullptr ? sum : sum - dlse[row];
    const float logits = lse[row] == -INFINITE ? INFINITE : lse[row] * LOG2E;
    statistics[2 * row] = logits;
    statistics[2 * row + 1] = delta;
    const float weight = ptx::exp2_approx(sink - logits);
    if (weight > 0.0f) share -= weight * delta;
  }
  if (sinks == nullptr) return;
  float* const shares = reinterpret_cast<float*>(memory);
  shares[threadIdx.x] = share;
  __syncthreads();
  if (threadIdx.x != 0) return;
  share = 0.0f;
  for (int i = 0; i < THREADS; i += 8) share += shares[i];
  partial[program] = share;
}
#endif

#if defined(KERNEL_attention_dk_dv)
// The arguments of attention_forward, with kv_heads in place of heads, blocks of keys, section of pairs of key head and
// sequence; statistics as above; dk, dv contiguous [.., K, dim].
extern "C" __global__ void __launch_bounds__(THREADS)
    attention_dk_dv(const ELEMENT* q, const ELEMENT* k, const ELEMENT* v, const ELEMENT* dout, const float* statistics,
                    ELEMENT* dk, ELEMENT* dv, const int32_t* cu_q, const int32_t* cu_k, int64_t q_stride_b,
                    int64_t q_stride_t, int64_t q_stride_h, int64_t k_stride_b, int64_t k_stride_t, int64_t k_stride_h,
                    int64_t v_stride_b, int64_t v_stride_t, int64_t v_stride_h, int64_t dout_stride_b,
                    int64_t dout_stride_t, int64_t dout_stride_h, int64_t q_len, int64_t k_len, int64_t behind,
                    int64_t ahead, int64_t offset, int64_t kv_heads, int64_t groups, int64_t blocks, int64_t sequences,
                    int64_t section, int64_t dim, float before, float factor, int64_t capped, float scale) {
  using namespace attention;
  constexpr int WARPS = THREADS / 32, M = BLOCK_N / WARPS / 16, N = BLOCK_M / 8, PITCH = pitch(DIM);
  static_assert(M * 16 * WARPS == BLOCK_N, "a warp owns 16 or 32 keys");
  constexpr int OWN = BLOCK_N * PITCH, TILE = BLOCK_M * PITCH;
  SHARED_MEMORY(memory);
  ELEMENT* const k_tile = reinterpret_cast<ELEMENT*>(memory);
  ELEMENT* const v_tile = k_tile + OWN;
  ELEMENT* const ring = v_tile + OWN;
  float* const statistics_ring = reinterpret_cast<float*>(ring + STAGES * 2 * TILE);

  const Owned own = owned(BLOCK_N, false, blocks, kv_heads, sequences, section, cu_q, cu_k, q_len, k_len, offset);
  const int left = own.keys - own.row, features = static_cast<int>(dim);
  if (left <= 0) return;
  const int reach = static_cast<int>(ahead), back = static_cast<int>(behind);
  const int last_key = own.row + min(BLOCK_N, left) - 1;
  // Query blocks [first, last): those with a query that sees one of these keys; passed over once for every head.
  const int first = max(own.row - reach - own.shift, 0) / BLOCK_M;
  const int last = ceil_div(max(min(own.queries, last_key + back - own.shift + 1), 0), BLOCK_M);
  const int span = max(last - first, 0), passes = span * static_cast<int>(groups);

  const int head = own.head * static_cast<int>(groups), key_token = own.key_start + own.row;
  const ELEMENT* k_rows = k + own.batch * k_stride_b + key_token * k_stride_t + own.head * k_stride_h;
  const ELEMENT* v_rows = v + own.batch * v_stride_b + key_token * v_stride_t + own.head * v_stride_h;
  const ELEMENT* q_rows = q + own.batch * q_stride_b + own.query_start * q_stride_t + head * q_stride_h;
  const ELEMENT* dout_rows = dout + own.batch * dout_stride_b + own.query_start * dout_stride_t + head * dout_stride_h;
  const float* statistic = statistics + 2 * ((own.batch * kv_heads * groups + head) * q_len + own.query_start);
  auto load = [&](int pass) {
    if (pass < passes) {
      const int member = pass / span, start = (first + pass - member * span) * BLOCK_M, count = own.queries - start;
      const int slot = pass % STAGES;
      ELEMENT* const stage = ring + slot * (2 * TILE);
      load_tile<ELEMENT, BLOCK_M, DIM, THREADS>(stage, q_rows + start * q_stride_t + member * q_stride_h, q_stride_t,
                                                count, features);
      load_tile<ELEMENT, BLOCK_M, DIM, THREADS>(
          stage + TILE, dout_rows + start * dout_stride_t + member * dout_stride_h, dout_stride_t, count, features);
      for (int i = threadIdx.x; i < BLOCK_M; i += THREADS) {
        const bool valid = i < count;  // zeros elsewhere: dout is zero there, and so is all that they give
        const float* from = statistic + 2 * (member * q_len + start + i);
        ptx::cp_async_8(statistics_ring + 2 * (slot * BLOCK_M + i), valid ? from : statistics, valid);
      }
    }
    ptx::cp_async_commit();
  };
  load_tile<ELEMENT, BLOCK_N, DIM, THREADS>(k_tile, k_rows, k_stride_t, left, features);
  load_tile<ELEMENT, BLOCK_N, DIM, THREADS>(v_tile, v_rows, v_stride_t, left, features);
#pragma unroll
  for (int i = 0; i < STAGES - 1; i++) load(i);

  const int warp_row = static_cast<int>(threadIdx.x) / 32 * (M * 16);
  float key_grad[M][DIM / 8][4], value_grad[M][DIM / 8][4];
  clear(key_grad);
  clear(value_grad);
  for (int pass = 0; pass < passes; pass++) {
    ptx::cp_async_wait<STAGES - 2>();
    __syncthreads();
    load(pass + STAGES - 1);
    const int slot = pass % STAGES, start = (first + pass % span) * BLOCK_M;
    const ELEMENT* const queries = ring + slot * (2 * TILE);
    // (lse, delta) of this thread's two columns of eight: 2 * (lane % 4) and the next
    const float* const columns = statistics_ring + 2 * slot * BLOCK_M + threadIdx.x % 4 * 4;
    float scores[M][N][4], dscores[M][N][4];
    uint32_t left_operand[M][N / 2][4];
    multiply_rows<ELEMENT, DIM>(scores, k_tile + warp_row * PITCH, queries);
    bend(scores, before, capped != 0);
    const int position = start + own.shift;  // of the first query
    if (position + reach < last_key || position + BLOCK_M - 1 - back > own.row) {
      const int at = own.row + warp_row - position;
      hide(scores, at - reach, at + back, BLOCK_M);
    }
    float lse[N][2], delta[N][2];
#pragma unroll
    for (int n = 0; n < N; n++) {
      const auto pair = load_vector<4>(columns + n * 16);
      lse[n][0] = pair[0], delta[n][0] = pair[1], lse[n][1] = pair[2], delta[n][1] = pair[3];
    }
    probabilities_of<ELEMENT, M, N>(left_operand, scores, factor, capped != 0,
                                    [&](int, int n, int i) { return lse[n][i % 2]; });
    accumulate_columns<ELEMENT, DIM>(value_grad, left_operand, queries + TILE);
    multiply_rows<ELEMENT, DIM>(dscores, v_tile + warp_row * PITCH, queries + TILE);
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int n = 0; n < N; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) dscores[m][n][i] = scores[m][n][i] * (dscores[m][n][i] - delta[n][i % 2]);
    pack<ELEMENT>(left_operand, dscores);
    accumulate_columns<ELEMENT, DIM>(key_grad, left_operand, queries);
  }
  ptx::cp_async_wait<0>();
  __syncthreads();
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int n = 0; n < DIM / 8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) key_grad[m][n][i] *= scale;
  const int64_t at = ((own.batch * k_len + key_token + warp_row) * kv_heads + own.head) * dim;
  store_rows<ELEMENT, DIM>(key_grad, k_tile + warp_row * PITCH, dk + at, kv_heads * dim, left - warp_row, features);
  store_rows<ELEMENT, DIM>(value_grad, v_tile + warp_row * PITCH, dv + at, kv_heads * dim, left - warp_row, features);
}
#endif

#if defined(KERNEL_attention_dq)
// The arguments of attention_forward; statistics as above; dq contiguous [.., N, dim].
extern "C" __global__ void __launch_bounds__(THREADS)
    attention_dq(const ELEMENT* q, const ELEMENT* k, const ELEMENT* v, const ELEMENT* dout, const float* statistics,
                 ELEMENT* dq, const int32_t* cu_q, const int32_t* cu_k, int64_t q_stride_b, int64_t q_stride_t,
                 int64_t q_stride_h, int64_t k_stride_b, int64_t k_stride_t, int64_t k_stride_h, int64_t v_stride_b,
                 int64_t v_stride_t, int64_t v_stride_h, int64_t dout_stride_b, int64_t dout_stride_t,
                 int64_t dout_stride_h, int64_t q_len, int64_t k_len, int64_t behind, int64_t ahead, int64_t offset,
                 int64_t heads, int64_t groups, int64_t blocks, int64_t sequences, int64_t section, int64_t dim,
                 float before, float factor, int64_t capped, float scale) {
  using namespace attention;
  constexpr int WARPS = THREADS / 32, M = BLOCK_M / WARPS / 16, N = BLOCK_N / 8, PITCH = pitch(DIM);
  static_assert(M * 16 * WARPS == BLOCK_M, "a warp owns 16 or 32 rows");
  constexpr int OWN = BLOCK_M * PITCH, TILE = BLOCK_N * PITCH;
  SHARED_MEMORY(memory);
  ELEMENT* const q_tile = reinterpret_cast<ELEMENT*>(memory);
  ELEMENT* const dout_tile = q_tile + OWN;
  ELEMENT* const ring = dout_tile + OWN;

  const Owned own = owned(BLOCK_M, ahead < FAR, blocks, heads, sequences, section, cu_q, cu_k, q_len, k_len, offset);
  const int left = own.queries - own.row, features = static_cast<int>(dim);
  if (left <= 0) return;
  const int reach = static_cast<int>(ahead), back = static_cast<int>(behind);
  const int position = own.row + own.shift, last_position = position + min(BLOCK_M, left) - 1;
  const int first = max(position - back, 0) / BLOCK_N;
  const int last = ceil_div(max(min(own.keys, last_position + reach + 1), 0), BLOCK_N);

  const int key_head = own.head / static_cast<int>(groups), token = own.query_start + own.row;
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
    ptx::cp_async_commit();
  };
  load_tile<ELEMENT, BLOCK_M, DIM, THREADS>(
      q_tile, q + own.batch * q_stride_b + token * q_stride_t + own.head * q_stride_h, q_stride_t, left, features);
  load_tile<ELEMENT, BLOCK_M, DIM, THREADS>(
      dout_tile, dout + own.batch * dout_stride_b + token * dout_stride_t + own.head * dout_stride_h, dout_stride_t,
      left, features);
#pragma unroll
  for (int i = 0; i < STAGES - 1; i++) load(first + i);

  const int warp_row = static_cast<int>(threadIdx.x) / 32 * (M * 16), lane = threadIdx.x % 32;
  const float* statistic = statistics + 2 * ((own.batch * heads + own.head) * q_len + token + warp_row);
  float lse[M][2], delta[M][2];
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int row = m * 16 + half * 8 + lane / 4;
      const bool valid = warp_row + row < left;
      lse[m][half] = valid ? statistic[2 * row] : INFINITE;
      delta[m][half] = valid ? statistic[2 * row + 1] : 0.0f;
    }
  float query_grad[M][DIM / 8][4];
  clear(query_grad);
  for (int block = first; block < last; block++) {
    ptx::cp_async_wait<STAGES - 2>();
    __syncthreads();
    load(block + STAGES - 1);
    const ELEMENT* const keys = ring + block % STAGES * (2 * TILE);
    const int start = block * BLOCK_N, end = start + BLOCK_N - 1;
    float scores[M][N][4], dscores[M][N][4];
    multiply_rows<ELEMENT, DIM>(scores, q_tile + warp_row * PITCH, keys);
    bend(scores, before, capped != 0);
    if (start < last_position - back || end > min(position + reach, own.keys - 1)) {
      const int at = position + warp_row - start;
      hide(scores, at - back, at + reach, own.keys - 1 - start);
    }
    probabilities_of<ELEMENT, M, N>(nullptr, scores, factor, capped != 0,
                                    [&](int m, int, int i) { return lse[m][i / 2]; });
    multiply_rows<ELEMENT, DIM>(dscores, dout_tile + warp_row * PITCH, keys + TILE);
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int n = 0; n < N; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) dscores[m][n][i] = scores[m][n][i] * (dscores[m][n][i] - delta[m][i / 2]);
    uint32_t packed[M][N / 2][4];
    pack<ELEMENT>(packed, dscores);
    accumulate_columns<ELEMENT, DIM>(query_grad, packed, keys);
  }
  ptx::cp_async_wait<0>();
  __syncthreads();
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int n = 0; n < DIM / 8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) query_grad[m][n][i] *= scale;
  ELEMENT* rows = dq + ((own.batch * q_len + token + warp_row) * heads + own.head) * dim;
  store_rows<ELEMENT, DIM>(query_grad, q_tile + warp_row * PITCH, rows, heads * dim, left - warp_row, features);
}
#endif
