// Attention backward for Hopper (sm_90a): TMA, wgmma, warp specialisation; two kernels, no atomics, the same bits each
// run. With P the probabilities: dV = P'dO, dS = P * (dO V' - delta), dQ = dS K * scale, dK = dS'Q * scale.
//
//   attention_hopper_dk_dv  grid [blocks * kv_heads * sequences]; a block owns 64 * CONSUMERS keys of a key head and
//   passes
//                           over the queries that see one of them, of every head of the group, in order. Scores stand
//                           transposed, [keys, queries]. FLOPs: 8 * DIM per query head and visible pair.
//   attention_hopper_dq     grid [blocks * heads * sequences]; a block owns 64 * CONSUMERS queries of a head and passes
//   over
//                           the keys that they see. FLOPs: 6 * DIM.
//
// Both have one shape. A block owns two tiles (K and V, or Q and dO), and a ring brings pairs of tiles of BLOCK_N rows
// (Q and dO, or K and V); a consumer warp group owns 64 rows. Of each pair it takes
//     scores = owned[0] ring[0]',  gradient = owned[1] ring[1]'        (operands in shared memory)
// and then, from registers, P and dS = P * (gradient - delta) are left operands: sum += dS ring[0], and where keys are
// owned sum_v += P ring[1]. The last product runs on under the first of the next pair, and only then is the stage given
// back. P is recomputed in both kernels, 14 * DIM FLOPs instead of 10 * DIM, which is the price of a sum of dQ in a
// fixed order without a second pass over fp32 partial sums in memory.
//
// Statistics (lse in base 2, delta) are those of attention_statistics (attention_backward.cuh): two numbers a query.
// Where keys are owned they belong to columns, and the producer warp puts them beside each pair; else to a thread's two
// rows.
//
// Shared memory: two owned tiles [64 * CONSUMERS, DIM], STAGES pairs of [BLOCK_N, DIM], for dk_dv 8 * BLOCK_N bytes of
// statistics for each stage, barriers. As shipped, for 64 and 128 features: dk_dv 98 and 129 KiB, dq 128 and 160 KiB.
//
// Bytes: the owned tiles once, the ring's once per owned block, from L2 but for the first time in a section; results
// once.
//
// Relies on: what attention_hopper_forward.cuh does; statistics are read by four lanes, 16 bytes apart, and the same by
// eight rows: no bank conflict. Not run on a GPU yet, and so not measured. Sources: Dao, "FlashAttention-2", 2023; see
// also attention_hopper.cuh.
//
// Defines: those of attention_hopper.cuh, and BLOCK_N, rows of a tile of the ring.

#include "attention_hopper.cuh"

#ifndef BLOCK_N
#error "BLOCK_N is the rows of a tile of the ring: 64 or 128"
#endif

namespace hopper {

#if defined(KERNEL_attention_hopper_dk_dv)
constexpr bool OWNS_KEYS = true;
#else
constexpr bool OWNS_KEYS = false;
#endif

constexpr int TILE = tile_bytes(BLOCK_N), OWNED_TILE = tile_bytes(OWNED);
constexpr int PRODUCERS = OWNS_KEYS ? 32 : 1;  // lanes that fill a stage

struct BackwardMemory {
  unsigned char *owned, *ring;  // two tiles; STAGES times two tiles
  float* statistics;            // STAGES times [BLOCK_N, 2]
  uint64_t *owned_full, *full, *empty;

  DEVICE explicit BackwardMemory(unsigned char* memory) : owned(memory), ring(owned + 2 * OWNED_TILE) {
    statistics = reinterpret_cast<float*>(ring + STAGES * 2 * TILE);
    owned_full = reinterpret_cast<uint64_t*>(statistics + (OWNS_KEYS ? STAGES * 2 * BLOCK_N : 0));
    full = owned_full + 1;
    empty = full + STAGES;
  }

  DEVICE void start() const {
    ptx::mbarrier_init(owned_full, 1);
    for (int i = 0; i < STAGES; ++i) {
      ptx::mbarrier_init(full + i, PRODUCERS);
      ptx::mbarrier_init(empty + i, CONSUMERS * 4);  // a lane of every warp that reads the stage
    }
    ptx::fence_mbarrier_init();
  }

  DEVICE unsigned char* tile(int stage, int which) const { return ring + (2 * stage + which) * TILE; }
};

// Where the ring's tiles come from: `members` heads from `head` on, `blocks` of each, from row `token` of `batch`.
struct Passing {
  const TensorMap* maps[2];
  int head, members, token, batch, rows;
  Blocks blocks;
  const float* statistics;  // of the first member's first row
  int64_t member_stride;    // of statistics
};

// One lane, or one warp where statistics come too: every pair of tiles, once its stage is free.
DEVICE void produce(const BackwardMemory& at, const Passing& from) {
  const int lane = threadIdx.x;
  Place place;
  for (int member = 0; member < from.members; ++member) {
    for (int i = 0; i < from.blocks.count; ++i, place.advance()) {
      const int start = (from.blocks.first + i) * BLOCK_N;
      uint64_t* full = at.full + place.stage;
      ptx::mbarrier_wait(at.empty + place.stage, place.parity ^ 1);
      if (OWNS_KEYS) {
        const float* pairs = from.statistics + member * from.member_stride + int64_t(start) * 2;
        float* to = at.statistics + place.stage * 2 * BLOCK_N;
        // Past the end an lse of +inf makes probabilities of 0.
#pragma unroll 1  // the producer has few registers
        for (int j = lane; j < 2 * BLOCK_N; j += 32)
          to[j] = start + j / 2 < from.rows ? pairs[j] : j % 2 == 0 ? INFINITE : 0.0f;
      }
      if (lane == 0) {
        ptx::mbarrier_arrive_expect(full, 2 * TILE);
        for (int which = 0; which < 2; ++which)
          load_tile(at.tile(place.stage, which), from.maps[which], full, BLOCK_N, from.head + member,
                    from.token + start, from.batch);
      } else {
        ptx::mbarrier_arrive(full);
      }
    }
  }
}

// What one consumer warp group needs to know to pass over the ring.
struct Consumer {
  BackwardMemory at;
  Band band;
  Blocks blocks;
  int members, number, thread, row;  // heads; of the consumers; in its warp group; first of its 64 rows
  float factor;
  int lowest[2], highest[2];
  float lse[2], delta[2];  // of this thread's rows, where queries are owned

  DEVICE int lane() const { return thread % 32; }

  DEVICE uint64_t mine(int which) const { return by_features(at.owned + which * OWNED_TILE + number * 64 * ROW_BYTES); }

  DEVICE void release(int stage) const {
    __syncwarp();  // every lane has read its statistics
    if (lane() == 0) ptx::mbarrier_arrive(at.empty + stage);
  }

  // Scores become probabilities, 0 where a row does not see a column. That branch comes last, for the compiler moves
  // nothing across it: else ptxas takes the exponentials to where they are used, after the wait for the other product.
  DEVICE void probabilities_of(float (&scores)[BLOCK_N / 2], int start, const float* statistics) const {
#pragma unroll
    for (int i = 0; i < BLOCK_N / 2; ++i) {
      const float base = OWNS_KEYS ? statistics[i / 4 * 16 + i % 2 * 2] : lse[i / 2 % 2];
      scores[i] = ptx::exp2_approx(fmaf(scores[i], factor, -base));
    }
    if (band.lowest(row + 63) > start || start + BLOCK_N - 1 > band.highest(row))
      hide<BLOCK_N>(scores, 0.0f, start + lane() % 4 * 2, lowest, highest);
  }

  // Gradients of probabilities become those of scores.
  DEVICE void scores_gradient(float (&gradient)[BLOCK_N / 2], const float (&probabilities)[BLOCK_N / 2],
                              const float* statistics) const {
#pragma unroll
    for (int i = 0; i < BLOCK_N / 2; ++i) {
      const float less = OWNS_KEYS ? statistics[i / 4 * 16 + i % 2 * 2 + 1] : delta[i / 2 % 2];
      gradient[i] = probabilities[i] * (gradient[i] - less);
    }
  }

  // sum += dS ring[0] and, where keys are owned, sum_v += P ring[1], over the whole ring.
  DEVICE void run(float (&sum)[DIM / 2], float (&sum_v)[DIM / 2], bool packed) const {
    float scores[BLOCK_N / 2], gradient[BLOCK_N / 2];
    uint32_t operand[BLOCK_N / 16][4];
    Place place;
    int before = 0;  // the stage of the pair before
    ptx::mbarrier_wait(at.owned_full, 0);
    const int steps = members * blocks.count;
    for (int i = 0, block = 0; i < steps; ++i) {
      const int start = (blocks.first + block) * BLOCK_N;
      block = block + 1 == blocks.count ? 0 : block + 1;
      unsigned char *first = at.tile(place.stage, 0), *second = at.tile(place.stage, 1);
      const float* statistics = at.statistics + place.stage * 2 * BLOCK_N + lane() % 4 * 4;
      ptx::mbarrier_wait(at.full + place.stage, place.parity);
      if (packed && start + BLOCK_N > band.columns) {
        clear_rows(first, BLOCK_N, band.columns - start, number * GROUP + thread);
        clear_rows(second, BLOCK_N, band.columns - start, number * GROUP + thread);
        finish_clearing();
      }
      ptx::wgmma_pin(scores);
      ptx::wgmma_pin(gradient);
      ptx::wgmma_fence();
      multiply_features<OWNED, BLOCK_N>(scores, mine(0), by_features(first));
      ptx::wgmma_commit();
      multiply_features<OWNED, BLOCK_N>(gradient, mine(1), by_features(second));
      ptx::wgmma_commit();
      ptx::wgmma_wait<2>();  // the sums of the pair before
      if (i > 0) release(before);
      ptx::wgmma_wait<1>();
      ptx::wgmma_pin(scores);
      probabilities_of(scores, start, statistics);
      if (OWNS_KEYS) {
        round_operand<BLOCK_N>(operand, scores);
        ptx::wgmma_fence();
        multiply_rows<BLOCK_N>(sum_v, operand, by_rows(second, BLOCK_N));
        ptx::wgmma_commit();
      }
      ptx::wgmma_wait<0>();  // of sum_v too: there are no registers for a second operand
      ptx::wgmma_pin(gradient);
      scores_gradient(gradient, scores, statistics);
      round_operand<BLOCK_N>(operand, gradient);
      ptx::wgmma_fence();
      multiply_rows<BLOCK_N>(sum, operand, by_rows(first, BLOCK_N));
      ptx::wgmma_commit();
      before = place.stage;
      place.advance();
    }
    ptx::wgmma_wait<0>();
    ptx::wgmma_pin(sum);
    if (OWNS_KEYS) ptx::wgmma_pin(sum_v);
  }
};

// One thread: the two tiles that the block owns.
DEVICE void load_owned(const BackwardMemory& at, const TensorMap* first, const TensorMap* second, int head, int token,
                       int batch) {
  ptx::mbarrier_arrive_expect(at.owned_full, 2 * OWNED_TILE);
  load_tile(at.owned, first, at.owned_full, OWNED, head, token, batch);
  load_tile(at.owned + OWNED_TILE, second, at.owned_full, OWNED, head, token, batch);
}

DEVICE void scale_by(float (&x)[DIM / 2], float factor) {
#pragma unroll
  for (int i = 0; i < DIM / 2; ++i) x[i] *= factor;
}

}  // namespace hopper

#if defined(KERNEL_attention_hopper_dk_dv)
// k_map, v_map have boxes of OWNED rows, q_map and dout_map of BLOCK_N; dk, dv contiguous [.., kv_heads, DIM].
// The other arguments are those of attention_hopper_forward, with key heads for heads and blocks of keys.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    attention_hopper_dk_dv(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
                           const __grid_constant__ TensorMap v_map, const __grid_constant__ TensorMap dout_map,
                           const float* statistics, ELEMENT* dk, ELEMENT* dv, const int32_t* cu_q, const int32_t* cu_k,
                           int64_t q_len, int64_t k_len, int64_t behind, int64_t ahead, int64_t offset,
                           int64_t kv_heads, int64_t groups, int64_t blocks, int64_t sequences, int64_t section,
                           float factor, float scale) {
  using namespace hopper;
  const Owned own = owned(OWNED, false, blocks, kv_heads, sequences, section, cu_q, cu_k, q_len, k_len, offset);
  if (own.row >= own.keys) return;
  SHARED_MEMORY(memory);
  const BackwardMemory at(memory);
  if (threadIdx.x == 0) at.start();
  __syncthreads();
  // A key is seen from as far ahead as queries look behind.
  const Band band = {-own.shift, int(ahead), int(behind), own.queries};
  const Blocks seen = seen_blocks<BLOCK_N>(band, own.row, min(own.row + OWNED, own.keys) - 1);
  const int group = warp_uniform(threadIdx.x / GROUP), head = own.head * int(groups), batch = int(own.batch);
  if (group == 0) {
    ptx::register_lower<PRODUCER_REGISTERS>();
    if (threadIdx.x >= 32 || seen.count == 0) return;
    if (threadIdx.x == 0) load_owned(at, &k_map, &v_map, own.head, int(own.key_start) + own.row, batch);
    const int64_t statistic = (own.batch * kv_heads * groups + head) * q_len + own.query_start;
    produce(at, {{&q_map, &dout_map},
                 head,
                 int(groups),
                 int(own.query_start),
                 batch,
                 own.queries,
                 seen,
                 statistics + 2 * statistic,
                 2 * q_len});
    return;
  }
  ptx::register_raise<CONSUMER_REGISTERS>();
  const int number = group - 1, thread = threadIdx.x % GROUP, first = own.row + number * 64;
  const int my_row = first + thread / 32 * 16 + thread % 32 / 4;
  const Consumer consumer = {at,
                             band,
                             seen,
                             int(groups),
                             number,
                             thread,
                             first,
                             factor,
                             {band.lowest(my_row), band.lowest(my_row + 8)},
                             {band.highest(my_row), band.highest(my_row + 8)},
                             {},
                             {}};
  float sum[DIM / 2] = {}, sum_v[DIM / 2] = {};
  if (seen.count > 0) consumer.run(sum, sum_v, cu_q != nullptr);
  scale_by(sum, scale);
  ptx::named_barrier_sync(GROUP_BARRIER + number, GROUP);  // no warp of the group reads K and V any more
  const int warp_row = thread / 32 * 16, left = own.keys - first - warp_row;
  const int64_t token = own.batch * k_len + own.key_start + first + warp_row, stride = kv_heads * DIM;
  store_rows(dk + token * stride + own.head * DIM, stride, left, at.owned, number * 64 + warp_row, sum);
  store_rows(dv + token * stride + own.head * DIM, stride, left, at.owned + OWNED_TILE, number * 64 + warp_row, sum_v);
}
#endif

#if defined(KERNEL_attention_hopper_dq)
// q_map, dout_map have boxes of OWNED rows, k_map and v_map of BLOCK_N; dq contiguous [.., heads, DIM]. The other
// arguments are those of attention_hopper_forward.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    attention_hopper_dq(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
                        const __grid_constant__ TensorMap v_map, const __grid_constant__ TensorMap dout_map,
                        const float* statistics, ELEMENT* dq, const int32_t* cu_q, const int32_t* cu_k, int64_t q_len,
                        int64_t k_len, int64_t behind, int64_t ahead, int64_t offset, int64_t heads, int64_t groups,
                        int64_t blocks, int64_t sequences, int64_t section, float factor, float scale) {
  using namespace hopper;
  const Owned own = owned(OWNED, ahead == 0, blocks, heads, sequences, section, cu_q, cu_k, q_len, k_len, offset);
  if (own.row >= own.queries) return;
  SHARED_MEMORY(memory);
  const BackwardMemory at(memory);
  if (threadIdx.x == 0) at.start();
  __syncthreads();
  const Band band = {own.shift, int(behind), int(ahead), own.keys};
  const Blocks seen = seen_blocks<BLOCK_N>(band, own.row, min(own.row + OWNED, own.queries) - 1);
  const int group = warp_uniform(threadIdx.x / GROUP), batch = int(own.batch);
  if (group == 0) {
    ptx::register_lower<PRODUCER_REGISTERS>();
    if (threadIdx.x > 0 || seen.count == 0) return;
    load_owned(at, &q_map, &dout_map, own.head, int(own.query_start) + own.row, batch);
    produce(at, {{&k_map, &v_map}, own.head / int(groups), 1, int(own.key_start), batch, own.keys, seen, nullptr, 0});
    return;
  }
  ptx::register_raise<CONSUMER_REGISTERS>();
  const int number = group - 1, thread = threadIdx.x % GROUP, first = own.row + number * 64;
  const int my_row = first + thread / 32 * 16 + thread % 32 / 4;
  Consumer consumer = {at,
                       band,
                       seen,
                       1,
                       number,
                       thread,
                       first,
                       factor,
                       {band.lowest(my_row), band.lowest(my_row + 8)},
                       {band.highest(my_row), band.highest(my_row + 8)},
                       {INFINITE, INFINITE},
                       {}};
  const float* pairs = statistics + 2 * ((own.batch * heads + own.head) * q_len + own.query_start);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int query = my_row + 8 * i;
    if (query >= own.queries) continue;
    consumer.lse[i] = pairs[2 * int64_t(query)];
    consumer.delta[i] = pairs[2 * int64_t(query) + 1];
  }
  float sum[DIM / 2] = {}, unused[DIM / 2];
  if (seen.count > 0) consumer.run(sum, unused, cu_q != nullptr);
  scale_by(sum, scale);
  ptx::named_barrier_sync(GROUP_BARRIER + number, GROUP);  // no warp of the group reads Q any more
  const int warp_row = thread / 32 * 16;
  const int64_t token = own.batch * q_len + own.query_start + first + warp_row;
  store_rows(dq + (token * heads + own.head) * DIM, heads * DIM, own.queries - first - warp_row, at.owned,
             number * 64 + warp_row, sum);
}
#endif
