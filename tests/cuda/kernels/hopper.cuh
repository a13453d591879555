// A whole product by TMA, mbarriers, wgmma, stmatrix and a TMA store, with every option of the operands; bug plants one
// of the mistakes that test_hopper.py lists. Grid: [columns / COLUMNS, rows / 64] blocks of two warp groups: thread 0
// of the first asks for tiles into a ring of STAGES, the second multiplies. Shared memory: the ring, C's tile, the
// barriers.
#pragma once
#include "common.cuh"

enum Bug {
  NONE,
  REWRITTEN,              // no mistake: a thread writes to B's tile, fenced and before a barrier
  NO_WAIT,                // consumers do not wait for the tiles
  WRONG_PHASE,            // ... or for the other parity
  FEW_BYTES,              // fewer bytes are expected than come
  UNREAD_TILE,            // the block ends while a tile is being loaded
  MANY_BYTES,             // more are expected
  NO_EMPTY_WAIT,          // the producer does not wait for the tile to be free
  EARLY_RELEASE,          // the tile is freed before the products are waited for
  READ_AFTER_RELEASE,     // a thread reads the tile after it has freed it
  STORE_WITHOUT_FENCE,    // a thread writes to B's tile, and the products do not see it,
  STORE_WITHOUT_BARRIER,  // or not for sure
  NO_WGMMA_FENCE,
  TOUCHED_AFTER_FENCE,  // an accumulator is written between wgmma_fence and wgmma
  READ_BEFORE_WAIT,     // accumulators are read before wgmma_wait
  NO_COMMIT,            // ... because nothing was committed
  NO_ASYNC_FENCE,       // the TMA store does not see the ordinary stores
  NO_STORE_BARRIER,     // ... or is issued before they are made
  NO_STORE_WAIT,        // the block ends while its tile is being stored
  STORE_OVERWRITTEN,    // the tile changes while it is being stored
  NO_INIT_FENCE,        // barriers are used without fence_mbarrier_init
  NO_INIT_BARRIER,      // ... or without __syncthreads
  ABSENT_WARP,          // one warp of the group issues no product
  OTHER_DESCRIPTOR,     // one warp multiplies another step
  MISALIGNED_TILE,      // tiles start within the swizzle's pattern
  BARRIER_IN_TILE,      // a barrier lies where TMA writes
  WRONG_SWIZZLE,        // numbers are wrong, nothing else
  WRONG_STRIDE
};

constexpr int BLOCK_M = 64, BLOCK_K = 64;
constexpr int WIDE = SWIZZLE ? SWIZZLE / 2 : 8;  // elements of a row of a TMA box
constexpr int A_BYTES = BLOCK_M * BLOCK_K * 2, B_BYTES = COLUMNS * BLOCK_K * 2, C_BYTES = BLOCK_M * COLUMNS * 2;
constexpr int STAGE_BYTES = A_BYTES + B_BYTES;

// Asks for a tile of `rows` rows (of M or N) and BLOCK_K of K, in boxes as wide as the swizzle.
template <bool TRANSPOSED>
DEVICE void load_tile(unsigned char* tile, const TensorMap* map, uint64_t* barrier, int rows, int row, int k) {
  if (TRANSPOSED) {
    for (int part = 0; part < rows / WIDE; ++part) {
      ptx::tma_load_2d(tile + part * BLOCK_K * WIDE * 2, map, barrier, row + part * WIDE, k);
    }
  } else {
    for (int part = 0; part < BLOCK_K / WIDE; ++part) {
      ptx::tma_load_2d(tile + part * rows * WIDE * 2, map, barrier, k + part * WIDE, row);
    }
  }
}

// The descriptor of step `step` (16 of K) of such a tile.
template <bool TRANSPOSED>
DEVICE uint64_t describe(const unsigned char* tile, int rows, int step, int64_t bug) {
  const int swizzle = bug == WRONG_SWIZZLE ? 32 : SWIZZLE;
  const int wrong = bug == WRONG_STRIDE ? 128 : 0;
  if (TRANSPOSED) {
    const unsigned char* start = tile + step * 16 * WIDE * 2;
    const int part = BLOCK_K * WIDE * 2;
    return SWIZZLE ? ptx::wgmma_descriptor(start, part, 8 * SWIZZLE + wrong, swizzle)
                   : ptx::wgmma_descriptor(start, 128, part + wrong, 0);
  }
  const unsigned char* start = tile + step * 16 / WIDE * rows * WIDE * 2 + step * 16 % WIDE * 2;
  return SWIZZLE ? ptx::wgmma_descriptor(start, 16, 8 * SWIZZLE + wrong, swizzle)
                 : ptx::wgmma_descriptor(start, rows * 16, 128 + wrong, 0);
}

DEVICE void produce(unsigned char* ring, uint64_t* full, uint64_t* empty, const TensorMap* a_map,
                    const TensorMap* b_map, int tiles, int64_t bug) {
  for (int i = 0; i < tiles; ++i) {
    const int stage = i % STAGES, parity = i / STAGES % 2;
    if (bug != NO_EMPTY_WAIT) ptx::mbarrier_wait(empty + stage, parity ^ 1);
    const int bytes = A_REGISTERS ? B_BYTES : STAGE_BYTES;
    ptx::mbarrier_arrive_expect(full + stage, bytes + (bug == MANY_BYTES ? 16 : bug == FEW_BYTES ? -16 : 0));
    unsigned char* tile = ring + stage * STAGE_BYTES;
    if (!A_REGISTERS) load_tile<TRANS_A>(tile, a_map, full + stage, BLOCK_M, int(blockIdx.y) * BLOCK_M, i * BLOCK_K);
    load_tile<TRANS_B>(tile + A_BYTES, b_map, full + stage, COLUMNS, int(blockIdx.x) * COLUMNS, i * BLOCK_K);
  }
}

// A's fragment of 16 columns from global memory.
DEVICE void load_fragment(uint32_t (&fragment)[4], const ELEMENT* a, int64_t depth, int column) {
  const int thread = threadIdx.x % 128;
  for (int r = 0; r < 4; ++r) {
    const int64_t row = int64_t(blockIdx.y) * BLOCK_M + thread / 32 * 16 + thread % 32 / 4 + r % 2 * 8;
    const ELEMENT* at = a + row * depth + column + r / 2 * 8 + thread % 4 * 2;
    fragment[r] = at[0].bits | uint32_t(at[1].bits) << 16;
  }
}

DEVICE void consume(float (&sums)[COLUMNS / 2], unsigned char* ring, uint64_t* full, uint64_t* empty, const ELEMENT* a,
                    int tiles, int64_t bug) {
  for (int i = 0; i < tiles; ++i) {
    const int stage = i % STAGES, parity = i / STAGES % 2;
    if (bug != NO_WAIT) ptx::mbarrier_wait(full + stage, bug == WRONG_PHASE ? parity ^ 1 : parity);
    unsigned char* tile = ring + stage * STAGE_BYTES;
    uint32_t fragments[BLOCK_K / 16][4];
    for (int step = 0; A_REGISTERS && step < BLOCK_K / 16; ++step) {
      load_fragment(fragments[step], a, int64_t(tiles) * BLOCK_K, i * BLOCK_K + step * 16);
    }
    if (bug == REWRITTEN || bug == STORE_WITHOUT_FENCE || bug == STORE_WITHOUT_BARRIER) {
      volatile uint32_t* word = reinterpret_cast<uint32_t*>(tile + A_BYTES + 256);
      if (threadIdx.x % 128 == 37) *word = *word;
      if (bug != STORE_WITHOUT_FENCE) ptx::fence_async_shared();
      if (bug != STORE_WITHOUT_BARRIER) ptx::named_barrier_sync(1, 128);
    }
    if (bug != NO_WGMMA_FENCE) ptx::wgmma_fence();
    if (bug == TOUCHED_AFTER_FENCE && i > 0) sums[2] = 0.0f;
    for (int step = 0; step < BLOCK_K / 16; ++step) {
      if (bug == ABSENT_WARP && step == 3 && threadIdx.x / 32 == 7) continue;
      const int mine = bug == OTHER_DESCRIPTOR && threadIdx.x / 32 == 6 ? 0 : step;
      const uint64_t b = describe<TRANS_B>(tile + A_BYTES, COLUMNS, mine, bug);
      if (A_REGISTERS) {
        ptx::wgmma_ra<COLUMNS, ELEMENT, TRANS_B>(sums, fragments[step], b, i + step > 0);
      } else {
        ptx::wgmma<COLUMNS, ELEMENT, TRANS_A, TRANS_B>(sums, describe<TRANS_A>(tile, BLOCK_M, mine, bug), b,
                                                       i + step > 0);
      }
    }
    if (bug == EARLY_RELEASE) ptx::mbarrier_arrive(empty + stage);
    if (bug != NO_COMMIT) ptx::wgmma_commit();
    if (bug == READ_BEFORE_WAIT && i == tiles - 1) sums[1] += 1.0f;
    ptx::wgmma_wait<0>();
    if (bug != EARLY_RELEASE) ptx::mbarrier_arrive(empty + stage);
    if (bug == READ_AFTER_RELEASE) sums[0] += float(*reinterpret_cast<const uint32_t*>(tile));
  }
}

// The accumulators, rounded, into C's tile [64, COLUMNS], and from there by one TMA store.
DEVICE void store(const float (&sums)[COLUMNS / 2], unsigned char* tile, const TensorMap* c_map, int64_t bug) {
  const int lane = lane_index(), thread = threadIdx.x % 128, matrix = lane / 8;
  const int row = thread / 32 * 16 + matrix % 2 * 8 + lane % 8;
  for (int column = 0; column < COLUMNS; column += 16) {
    uint32_t pairs[4];
    for (int i = 0; i < 4; ++i) {
      pairs[i] = ptx::pack2<ELEMENT>(sums[column / 2 + 2 * i], sums[column / 2 + 2 * i + 1]);
    }
    ptx::stmatrix_x4(tile + (row * COLUMNS + column + matrix / 2 * 8) * 2, pairs);
  }
  if (bug != NO_ASYNC_FENCE) ptx::fence_async_shared();
  if (bug != NO_STORE_BARRIER) ptx::named_barrier_sync(1, 128);
  if (thread == 0) {
    ptx::tma_store_2d(c_map, tile, int(blockIdx.x) * COLUMNS, int(blockIdx.y) * BLOCK_M);
    ptx::tma_store_commit();
    if (bug == STORE_OVERWRITTEN) *reinterpret_cast<uint32_t*>(tile) = 0;
    if (bug != NO_STORE_WAIT) ptx::tma_store_wait_read<0>();
  }
}

#if defined(KERNEL_product)
extern "C" __global__ void __launch_bounds__(THREADS)
    product(const __grid_constant__ TensorMap a_map, const __grid_constant__ TensorMap b_map,
            const __grid_constant__ TensorMap c_map, const ELEMENT* a, int64_t tiles, int64_t bug) {
  SHARED_MEMORY(memory);
  unsigned char* ring = memory + (bug == MISALIGNED_TILE ? SWIZZLE : 0);
  unsigned char* c_tile = ring + STAGES * STAGE_BYTES;
  uint64_t* full = reinterpret_cast<uint64_t*>(bug == BARRIER_IN_TILE ? ring + STAGE_BYTES - 64 : c_tile + C_BYTES);
  uint64_t* empty = full + STAGES;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) {
      ptx::mbarrier_init(full + i, 1);
      ptx::mbarrier_init(empty + i, 128);
    }
    if (bug != NO_INIT_FENCE) ptx::fence_mbarrier_init();
  }
  if (bug != NO_INIT_BARRIER) __syncthreads();
  if (threadIdx.x < 128) {
    ptx::register_lower<24>();
    if (threadIdx.x == 0) produce(ring, full, empty, &a_map, &b_map, int(tiles) + (bug == UNREAD_TILE), bug);
    return;
  }
  ptx::register_raise<240>();
  float sums[COLUMNS / 2];
  consume(sums, ring, full, empty, a, int(tiles), bug);
  store(sums, c_tile, &c_map, bug);
}
#endif

// Every block's number, read by all blocks of its cluster: sums [blocks] of (rank + 1) * number over the cluster.
#if defined(KERNEL_cluster_sums)
extern "C" __global__ void __launch_bounds__(THREADS) cluster_sums(const float* numbers, float* sums) {
  SHARED_MEMORY(memory);
  float* mine = reinterpret_cast<float*>(memory);
  if (threadIdx.x == 0) *mine = numbers[blockIdx.x];
  ptx::cluster_sync();
  if (threadIdx.x == 0) {
    float sum = 0;
    for (int rank = 0; rank < ptx::cluster_size(); ++rank) sum += float(rank + 1) * ptx::cluster_load(mine, rank);
    sums[blockIdx.x] = sum + 1000.0f * float(ptx::cluster_rank());
  }
  ptx::cluster_sync();
}
#endif

// A box of 4 dims (or 3) there and back, and `bytes` by a bulk load: every byte of both comes out in `words`.
#if defined(KERNEL_copies)
extern "C" __global__ void __launch_bounds__(THREADS)
    copies(const __grid_constant__ TensorMap from, const __grid_constant__ TensorMap to, const uint32_t* line,
           int64_t box_bytes, int64_t bytes, int64_t c0, int64_t c1, int64_t c2, int64_t c3, uint32_t* words) {
  SHARED_MEMORY(memory);
  uint64_t* barrier = reinterpret_cast<uint64_t*>(memory);
  unsigned char* box = memory + 128;
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier, 1);
    ptx::fence_mbarrier_init();
    ptx::tma_prefetch(&from);
    ptx::mbarrier_arrive_expect(barrier, int(box_bytes + bytes));
    if (DIMS == 4) {
      ptx::tma_load_4d(box, &from, barrier, int(c0), int(c1), int(c2), int(c3));
    } else {
      ptx::tma_load_3d(box, &from, barrier, int(c0), int(c1), int(c2));
    }
    ptx::bulk_load(box + box_bytes, line, barrier, int(bytes));
    ptx::mbarrier_wait(barrier, 0);
    if (DIMS == 4) {
      ptx::tma_store_4d(&to, box, int(c0), int(c1), int(c2), int(c3));
    } else {
      ptx::tma_store_3d(&to, box, int(c0), int(c1), int(c2));
    }
    ptx::tma_store_commit();
    ptx::tma_store_wait<0>();
  }
  __syncthreads();
  for (int64_t i = threadIdx.x; i < (box_bytes + bytes) / 4; i += THREADS) {
    words[i] = reinterpret_cast<const uint32_t*>(box)[i];
  }
}
#endif
