// Attention forward for Hopper (sm_90a): TMA, wgmma, warp specialisation. out = softmax(scale Q K') V and lse.
//
// Grid: [blocks * heads * sequences] blocks of THREADS = 128 * (CONSUMERS + 1); a block owns 64 * CONSUMERS queries of
// one head of one batch entry or packed document, a consumer warp group 64 of them, a warp 16, a thread a quarter of
// the columns of two rows (see `round_operand`).
//
// Roles: one thread of the producer warp group asks TMA for Q, and then for the key blocks from the last to the first
// into a ring of STAGES stages; K and V have barriers of their own, as V is needed later and freed later. A consumer
// issues S = Q K' of one block together with O += P V of the block before, and takes the softmax of the former while
// the latter runs; consumers take turns in issuing (ping-pong), so that one's exponentials fall under the other's
// products too. Blocks that every row of a warp group sees whole are not masked.
//
// Shared memory: Q [64 * CONSUMERS, DIM], STAGES of K and of V [BLOCK_N, DIM], then barriers: 160 KiB for 128 features
// (2 consumers, blocks of 128, 2 stages) and 152 KiB for 64 (3, 128, 4). The output leaves through Q's place.
//
// Bytes: (2 * heads + 2 * key heads) * DIM * 2 + 4 * heads per token at the least; K and V are read once per query
// block, from L2 but for the first time in a section. FLOPs: 4 * DIM per query head and visible pair.
//
// Relies on: strides of q, k, v of 16-byte multiples (TMA), tiles on multiples of 1,024 bytes, and the 128-byte
// swizzle, with which products, stmatrix and the copy of the output are free of bank conflicts.
//
// Not here: soft-cap, sinks, other head dims and fp32 (attention_forward.cuh has them, and Blackwell takes that too).
// Not run on a GPU yet, and so not measured. Sources: see attention_hopper.cuh.
//
// Defines: those of attention_hopper.cuh, and BLOCK_N, keys of a tile.

#include "attention_hopper.cuh"

#ifndef BLOCK_N
#error "BLOCK_N is the keys of a tile: 64 or 128"
#endif

namespace hopper {

struct ForwardMemory {
  unsigned char *q, *k, *v;
  uint64_t *q_full, *k_full, *k_empty, *v_full, *v_empty;

  DEVICE explicit ForwardMemory(unsigned char* memory)
      : q(memory), k(q + tile_bytes(OWNED)), v(k + STAGES * tile_bytes(BLOCK_N)) {
    q_full = reinterpret_cast<uint64_t*>(v + STAGES * tile_bytes(BLOCK_N));
    k_full = q_full + 1;
    k_empty = k_full + STAGES;
    v_full = k_empty + STAGES;
    v_empty = v_full + STAGES;
  }

  DEVICE void start() const {
    ptx::mbarrier_init(q_full, 1);
    for (int i = 0; i < STAGES; ++i) {
      ptx::mbarrier_init(k_full + i, 1);
      ptx::mbarrier_init(v_full + i, 1);
      ptx::mbarrier_init(k_empty + i, CONSUMERS * 4);  // a lane of every warp that reads the tile
      ptx::mbarrier_init(v_empty + i, CONSUMERS * 4);
    }
    ptx::fence_mbarrier_init();
  }
};

DEVICE void fill(unsigned char* tiles, const TensorMap* map, uint64_t* full, uint64_t* empty, const Place& place,
                 int head, int token, int batch) {
  ptx::mbarrier_wait(empty + place.stage, place.parity ^ 1);
  ptx::mbarrier_arrive_expect(full + place.stage, tile_bytes(BLOCK_N));
  load_tile(tiles + place.stage * tile_bytes(BLOCK_N), map, full + place.stage, BLOCK_N, head, token, batch);
}

// One thread: Q, then K of every block followed by V of the block before it, the order in which they are used.
DEVICE void produce(const ForwardMemory& at, const TensorMap* q_map, const TensorMap* k_map, const TensorMap* v_map,
                    const Owned& own, int kv_head, const Blocks& blocks) {
  ptx::mbarrier_arrive_expect(at.q_full, tile_bytes(OWNED));
  load_tile(at.q, q_map, at.q_full, OWNED, own.head, int(own.query_start) + own.row, int(own.batch));
  Place k_place, v_place;
  int token = int(own.key_start) + (blocks.first + blocks.count - 1) * BLOCK_N;
  for (int i = 0; i < blocks.count; ++i, token -= BLOCK_N) {
    fill(at.k, k_map, at.k_full, at.k_empty, k_place, kv_head, token, int(own.batch));
    k_place.advance();
    if (i == 0) continue;
    fill(at.v, v_map, at.v_full, at.v_empty, v_place, kv_head, token + BLOCK_N, int(own.batch));
    v_place.advance();
  }
  fill(at.v, v_map, at.v_full, at.v_empty, v_place, kv_head, token + BLOCK_N, int(own.batch));
}

// Running maximum (of the raw scores) and this thread's share of the running sum, of its two rows.
struct Softmax {
  float maximum[2] = {-INFINITE, -INFINITE};
  float total[2] = {0.0f, 0.0f};

  // Scores become probabilities relative to the new maximum; `correction` is for what was summed before.
  DEVICE void step(float (&scores)[BLOCK_N / 2], float factor, float (&correction)[2]) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float newest = maximum[row];
#pragma unroll
      for (int j = 0; j < BLOCK_N / 2; j += 4)
        newest = fmaxf(newest, fmaxf(scores[j + 2 * row], scores[j + 2 * row + 1]));
      newest = fmaxf(newest, __shfl_xor_sync(0xffffffffu, newest, 1));
      newest = fmaxf(newest, __shfl_xor_sync(0xffffffffu, newest, 2));
      // A row that has seen no key yet: exp2(-inf - 0) is the 0 that exp2(-inf + inf) is not.
      const float offset = newest == -INFINITE ? 0.0f : newest * factor;
      correction[row] = ptx::exp2_approx(fmaf(maximum[row], factor, -offset));
      maximum[row] = newest;
      float sum = 0.0f;
#pragma unroll
      for (int j = 2 * row; j < BLOCK_N / 2; j += 4) {
        scores[j] = ptx::exp2_approx(fmaf(scores[j], factor, -offset));
        scores[j + 1] = ptx::exp2_approx(fmaf(scores[j + 1], factor, -offset));
        sum += scores[j] + scores[j + 1];
      }
      total[row] = fmaf(total[row], correction[row], sum);
    }
  }
};

// What one consumer warp group needs to know to pass over the key blocks.
struct Consumer {
  ForwardMemory at;
  Band band;
  Blocks blocks;
  int number, thread, row;  // of the consumers; in its warp group; first of its 64 rows
  float factor;
  int lowest[2], highest[2];

  DEVICE int lane() const { return thread % 32; }

  DEVICE void release(uint64_t* empty) const {
    if (lane() == 0) ptx::mbarrier_arrive(empty);
  }

  DEVICE uint64_t q() const { return by_features(at.q + number * 64 * ROW_BYTES); }
  DEVICE uint64_t k(int stage) const { return by_features(at.k + stage * tile_bytes(BLOCK_N)); }
  DEVICE uint64_t v(int stage) const { return by_rows(at.v + stage * tile_bytes(BLOCK_N), BLOCK_N); }

  // Masks the block that starts at `start`, if any of these 64 rows does not see all of it.
  DEVICE void mask(float (&scores)[BLOCK_N / 2], int start) const {
    if (band.lowest(row + 63) <= start && start + BLOCK_N - 1 <= band.highest(row)) return;
    hide<BLOCK_N>(scores, -INFINITE, start + lane() % 4 * 2, lowest, highest);
  }

  // Ping-pong: consumers issue their products one after another; the first need not wait the first time.
  DEVICE void wait_turn(bool first) const {
    if (number > 0 || !first) ptx::named_barrier_sync(TURN_BARRIER + number, 2 * GROUP);
  }
  DEVICE void pass_turn(bool last) const {
    if (number < CONSUMERS - 1 || !last) ptx::named_barrier_arrive(TURN_BARRIER + (number + 1) % CONSUMERS, 2 * GROUP);
  }

  // Ends the products under way; the probabilities, rounded, and the output to their scale are ready for the next.
  DEVICE void settle(float (&out)[DIM / 2], uint32_t (&probabilities)[BLOCK_N / 16][4],
                     const float (&scores)[BLOCK_N / 2], const float (&correction)[2]) const {
    ptx::wgmma_wait<0>();
    ptx::wgmma_pin(out);
    round_operand<BLOCK_N>(probabilities, scores);
#pragma unroll
    for (int j = 0; j < DIM / 2; ++j) out[j] *= correction[j / 2 % 2];
  }

  // Over the key blocks from the last to the first. A block's exponentials are taken while the products of the block
  // before it run: they are waited for (`settle`) only behind the wait for the next keys, a loop across which the
  // compiler moves nothing. Without it ptxas puts the exponentials after the wait.
  DEVICE void run(float (&out)[DIM / 2], Softmax& softmax, bool packed) const {
    float scores[BLOCK_N / 2], correction[2];
    uint32_t probabilities[BLOCK_N / 16][4];
    Place now, before;  // of these keys; of the values of the block before
    int start = (blocks.first + blocks.count - 1) * BLOCK_N, spent = 0;
    ptx::mbarrier_wait(at.q_full, 0);
    ptx::mbarrier_wait(at.k_full, 0);
    ptx::wgmma_fence();
    multiply_features<OWNED, BLOCK_N>(scores, q(), k(0));
    ptx::wgmma_commit();
    if (packed && start + BLOCK_N > band.columns) {  // only the first block here, the last of the document, can
      ptx::mbarrier_wait(at.v_full, 0);
      clear_rows(at.v, BLOCK_N, band.columns - start, number * GROUP + thread);
      finish_clearing();
    }
    ptx::wgmma_wait<0>();
    ptx::wgmma_pin(scores);
    release(at.k_empty);
    mask(scores, start);
    softmax.step(scores, factor, correction);
    for (int i = 1; i < blocks.count; ++i) {
      start -= BLOCK_N;
      now.advance();
      ptx::mbarrier_wait(at.k_full + now.stage, now.parity);
      settle(out, probabilities, scores, correction);
      if (i > 1) release(at.v_empty + spent);
      wait_turn(i == 1);
      ptx::wgmma_pin(scores);
      ptx::wgmma_pin(out);
      ptx::wgmma_fence();
      multiply_features<OWNED, BLOCK_N>(scores, q(), k(now.stage));
      ptx::wgmma_commit();
      ptx::mbarrier_wait(at.v_full + before.stage, before.parity);
      ptx::wgmma_fence();
      multiply_rows<BLOCK_N>(out, probabilities, v(before.stage));
      ptx::wgmma_commit();
      pass_turn(i == blocks.count - 1);
      ptx::wgmma_wait<1>();
      ptx::wgmma_pin(scores);
      release(at.k_empty + now.stage);
      mask(scores, start);
      softmax.step(scores, factor, correction);
      spent = before.stage;
      before = now;
    }
    ptx::mbarrier_wait(at.v_full + before.stage, before.parity);
    settle(out, probabilities, scores, correction);
    ptx::wgmma_pin(out);
    ptx::wgmma_fence();
    multiply_rows<BLOCK_N>(out, probabilities, v(before.stage));
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    ptx::wgmma_pin(out);
  }
};

// Sums the shares of a row's four threads, divides the output by the total and gives the natural log-sum-exp.
DEVICE void finish_softmax(float (&out)[DIM / 2], const Softmax& softmax, float factor, float (&lse)[2]) {
  float inverse[2];
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    float total = softmax.total[row];
    total += __shfl_xor_sync(0xffffffffu, total, 1);
    total += __shfl_xor_sync(0xffffffffu, total, 2);
    inverse[row] = total == 0.0f ? 0.0f : 1.0f / total;
    lse[row] = total == 0.0f ? -INFINITE : (softmax.maximum[row] * factor + log2f(total)) * LN2;
  }
#pragma unroll
  for (int j = 0; j < DIM / 2; ++j) out[j] *= inverse[j / 2 % 2];
}

}  // namespace hopper

#if defined(KERNEL_attention_hopper_forward)
// q_len, k_len: tokens of a batch entry (packed: of all documents). A query sees `behind` keys before its own position
// and `ahead` after it; factor: scale * log2(e), above 0. section: pairs of head and sequence that share the L2 cache.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    attention_hopper_forward(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
                             const __grid_constant__ TensorMap v_map, ELEMENT* out, float* lse, const int32_t* cu_q,
                             const int32_t* cu_k, int64_t q_len, int64_t k_len, int64_t behind, int64_t ahead,
                             int64_t offset, int64_t heads, int64_t groups, int64_t blocks, int64_t sequences,
                             int64_t section, float factor) {
  using namespace hopper;
  const Owned own = owned(OWNED, ahead == 0, blocks, heads, sequences, section, cu_q, cu_k, q_len, k_len, offset);
  if (own.row >= own.queries) return;
  SHARED_MEMORY(memory);
  const ForwardMemory at(memory);
  if (threadIdx.x == 0) at.start();
  __syncthreads();
  const Band band = {own.shift, int(behind), int(ahead), own.keys};
  const int last_row = min(own.row + OWNED, own.queries) - 1;
  const Blocks seen = seen_blocks<BLOCK_N>(band, own.row, last_row);
  const int group = warp_uniform(threadIdx.x / GROUP);
  if (group == 0) {
    ptx::register_lower<PRODUCER_REGISTERS>();
    if (threadIdx.x == 0 && seen.count > 0) produce(at, &q_map, &k_map, &v_map, own, own.head / int(groups), seen);
    return;
  }
  ptx::register_raise<CONSUMER_REGISTERS>();
  const int number = group - 1, thread = threadIdx.x % GROUP, first = own.row + number * 64;
  const int my_row = first + thread / 32 * 16 + thread % 32 / 4;
  const Consumer consumer = {at,
                             band,
                             seen,
                             number,
                             thread,
                             first,
                             factor,
                             {band.lowest(my_row), band.lowest(my_row + 8)},
                             {band.highest(my_row), band.highest(my_row + 8)}};
  float sum[DIM / 2] = {}, row_lse[2];
  Softmax softmax;
  if (seen.count > 0) consumer.run(sum, softmax, cu_q != nullptr);
  finish_softmax(sum, softmax, factor, row_lse);
  ptx::named_barrier_sync(GROUP_BARRIER + number, GROUP);  // no warp of the group reads Q any more
  const int warp_row = thread / 32 * 16;
  const int64_t token = own.batch * q_len + own.query_start + first + warp_row;
  store_rows(out + (token * heads + own.head) * DIM, heads * DIM, own.queries - first - warp_row, at.q,
             number * 64 + warp_row, sum);
  float* lse_row = lse + (own.batch * heads + own.head) * q_len + own.query_start;
  if (thread % 4 == 0) {
    if (my_row < own.queries) lse_row[my_row] = row_lse[0];
    if (my_row + 8 < own.queries) lse_row[my_row + 8] = row_lse[1];
  }
}
#endif
