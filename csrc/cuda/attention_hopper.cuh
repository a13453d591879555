// What the attention kernels of Hopper share: tiles in shared memory, products of them, what a row sees, documents.
//
// A tile is [DIM / 64][rows][64 elements] in shared memory: a row of a part is 128 bytes, in which TMA permutes the 16-
// byte pieces by piece ^ (row & 7) (the 128-byte swizzle), so that the eight rows that a tensor core reads at once lie
// in different banks. The permutation is a function of address bits, hence every part starts on a multiple of 1,024
// bytes. One layout serves as operand over the features (K-major: S = Q K') and over the rows (MN-major: O = P V).
//
// Every kernel has a producer warp group (one warp of it works; it gives its registers away) and CONSUMERS warp groups
// of 128 threads, each of which owns 64 rows of the block's tile. A row sees an interval of columns (`Band`), which is
// all that causality, windows, ring offsets and lengths of documents come to; it is symmetric, so that the kernel that
// owns keys uses it with the two sides exchanged.
//
// Sources: Shah et al., "FlashAttention-3", 2024 (warp specialisation, ping-pong, overlap of softmax and products);
// PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions" (fragments and descriptors).
//
// Defines: ELEMENT bf16 or fp16; DIM, features of a head, 64 or 128; CONSUMERS, 2 or 3; STAGES of the ring, 2 or more;
// THREADS.
#pragma once

#include "attention_common.cuh"

#if !defined(ELEMENT) || !defined(DIM) || !defined(CONSUMERS) || !defined(STAGES) || !defined(THREADS)
#error "the Hopper attention kernels need ELEMENT, DIM, CONSUMERS, STAGES and THREADS"
#endif

namespace hopper {

using attention::INFINITE;
using attention::LN2;
using attention::LOG2E;
using attention::Owned;
using attention::owned;

static_assert(DIM == 64 || DIM == 128, "a tile is one or two parts of 64 columns");
static_assert(CONSUMERS == 2 || CONSUMERS == 3, "registers are divided for two or three consumers");
static_assert(STAGES >= 2, "a tile is given back only after the next one has come");
static_assert(THREADS == 128 * (CONSUMERS + 1), "a warp group for the producer, and one for each consumer");

constexpr int GROUP = 128;             // threads of a warp group
constexpr int OWNED = 64 * CONSUMERS;  // rows of the tile that a block owns
constexpr int ROW_BYTES = 128;         // of a part of a tile
constexpr int ATOM_BYTES = 1024;       // eight rows, after which the swizzle repeats

// Registers of a thread after the division: 24 * 128 + 240 * 256 and 32 * 128 + 160 * 384 fit the 65,536 there are.
constexpr int PRODUCER_REGISTERS = CONSUMERS == 2 ? 24 : 32;
constexpr int CONSUMER_REGISTERS = CONSUMERS == 2 ? 240 : 160;

// Named barriers; 0 is that of __syncthreads.
constexpr int GROUP_BARRIER = 1;                            // + consumer: within its warp group
constexpr int CLEARED_BARRIER = GROUP_BARRIER + CONSUMERS;  // all consumers
constexpr int TURN_BARRIER = CLEARED_BARRIER + 1;           // + consumer: it may issue products

// Bytes of a tile of so many rows.
DEVICE constexpr int tile_bytes(int rows) { return rows * DIM * 2; }

// `value` of lane 0: what depends on it is then known not to diverge within a warp. Without that the compiler takes
// every wgmma behind a branch on the warp group for one that may diverge, and waits for each.
DEVICE int warp_uniform(int value) { return __shfl_sync(0xffffffffu, value, 0); }

// Row r sees the columns from lowest(r) to highest(r): `behind` to `ahead` around r + shift, of [0, columns).
struct Band {
  int shift, behind, ahead, columns;

  DEVICE int lowest(int row) const { return row + shift - behind; }
  DEVICE int highest(int row) const {
    const int last = row + shift + ahead;
    return last < columns ? last : columns - 1;
  }
};

// Column blocks that some of the rows from `row` to `last_row` see.
struct Blocks {
  int first, count;
};

template <int SIZE>
DEVICE Blocks seen_blocks(const Band& band, int row, int last_row) {
  const int lowest = band.lowest(row), highest = band.highest(last_row);
  const int first = (lowest > 0 ? lowest : 0) / SIZE;
  const int last = highest < 0 ? -1 : highest / SIZE;
  return {first, last < first ? 0 : last - first + 1};
}

// A stage of a ring of tiles, and the parity of the phase that its barriers are in.
struct Place {
  int stage = 0;
  int parity = 0;

  DEVICE void advance() {
    stage = stage + 1 == STAGES ? 0 : stage + 1;
    parity ^= stage == 0;
  }
};

// Asks for a tile of `rows` rows; the map's dims are features, heads, tokens, batch, its box [64, 1, rows, 1].
DEVICE void load_tile(unsigned char* tile, const TensorMap* map, uint64_t* barrier, int rows, int head, int token,
                      int batch) {
#pragma unroll
  for (int column = 0; column < DIM; column += 64)
    ptx::tma_load_4d(tile + column / 64 * rows * ROW_BYTES, map, barrier, column, head, token, batch);
}

// Zeros in the rows [from, rows) of a tile, by all consumers: rows of the next document, whose contents a factor of 0
// would not keep out if they are not finite. Whole rows, so the swizzle does not matter.
DEVICE void clear_rows(unsigned char* tile, int rows, int from, int thread) {
  const Vector<ELEMENT, 8> zeros = {};
  const int pieces = (rows - from) * (ROW_BYTES / 16);
  for (int part = 0; part < DIM / 64; ++part)
#pragma unroll 1
    for (int piece = thread; piece < pieces; piece += CONSUMERS * GROUP)
      store_vector(reinterpret_cast<ELEMENT*>(tile + (part * rows + from) * ROW_BYTES + piece * 16), zeros);
}

// Makes the zeros visible to the products of every consumer.
DEVICE void finish_clearing() {
  ptx::fence_async_shared();
  ptx::named_barrier_sync(CLEARED_BARRIER, CONSUMERS * GROUP);
}

// Descriptor of a tile that is contracted over its features; where a part's rows go on is no business of it.
DEVICE uint64_t by_features(const unsigned char* tile) { return ptx::wgmma_descriptor(tile, 16, ATOM_BYTES, 128); }

// Descriptor of a tile of `rows` rows that is contracted over them: parts of 64 columns lie rows * 128 bytes apart.
DEVICE uint64_t by_rows(const unsigned char* tile, int rows) {
  return ptx::wgmma_descriptor(tile, rows * ROW_BYTES, ATOM_BYTES, 128);
}

// The same descriptor, `bytes` further on: the address stands in its low bits, in units of 16 bytes.
DEVICE uint64_t further(uint64_t descriptor, int bytes) { return descriptor + (bytes >> 4); }

// scores[64, N] = a[64, DIM] b[N, DIM]', both `by_features` and in tiles of that many rows. Issued, not finished.
template <int A_ROWS, int B_ROWS>
DEVICE void multiply_features(float (&scores)[B_ROWS / 2], uint64_t a, uint64_t b) {
#pragma unroll
  for (int k = 0; k < DIM / 16; ++k) {
    const int part = k / 4 * ROW_BYTES, column = k % 4 * 32;
    ptx::wgmma<B_ROWS, ELEMENT, 0, 0>(scores, further(a, part * A_ROWS + column), further(b, part * B_ROWS + column),
                                      k > 0);
  }
}

// sum[64, DIM] += a[64, ROWS] b[ROWS, DIM] with a in registers and b `by_rows`. Issued, not finished.
template <int ROWS>
DEVICE void multiply_rows(float (&sum)[DIM / 2], const uint32_t (&a)[ROWS / 16][4], uint64_t b) {
#pragma unroll
  for (int k = 0; k < ROWS / 16; ++k) ptx::wgmma_ra<DIM, ELEMENT, 1>(sum, a[k], further(b, k * 16 * ROW_BYTES), true);
}

// An accumulator [64, N], rounded, as left operand of the next product: a thread holds of rows lane / 4 and + 8 the
// columns 8 j + 2 (lane % 4) + {0, 1}, which is what it must hold of the operand.
template <int N>
DEVICE void round_operand(uint32_t (&operand)[N / 16][4], const float (&x)[N / 2]) {
#pragma unroll
  for (int k = 0; k < N / 16; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i) operand[k][i] = ptx::pack2<ELEMENT>(x[8 * k + 2 * i], x[8 * k + 2 * i + 1]);
}

// `value` where a row does not see a column; x[64, N] starts at `column` for this thread, whose rows see [lowest,
// highest].
template <int N>
DEVICE void hide(float (&x)[N / 2], float value, int column, const int (&lowest)[2], const int (&highest)[2]) {
#pragma unroll
  for (int i = 0; i < N / 2; ++i) {
    const int at = column + i / 4 * 8 + i % 2, row = i / 2 % 2;
    if (at < lowest[row] || at > highest[row]) x[i] = value;
  }
}

// Rounds the accumulator of a consumer's 64 rows and writes it to a contiguous tensor [tokens, heads, DIM], of which
// `out` is this warp's first row: by stmatrix into this warp's 16 rows of the swizzled tile of OWNED rows (first row:
// `row`), which no product reads any more, and from there in pieces of 16 bytes, whole rows at a time.
DEVICE void store_rows(ELEMENT* out, int64_t stride, int rows, unsigned char* tile, int row,
                       const float (&x)[DIM / 2]) {
  const int lane = threadIdx.x % 32;
  const int matrix = lane / 8, to = row + matrix % 2 * 8 + lane % 8;
#pragma unroll
  for (int k = 0; k < DIM / 16; ++k) {
    uint32_t pairs[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) pairs[i] = ptx::pack2<ELEMENT>(x[8 * k + 2 * i], x[8 * k + 2 * i + 1]);
    const int piece = 2 * k + matrix / 2;
    ptx::stmatrix_x4(tile + (piece / 8 * OWNED + to) * ROW_BYTES + ((piece % 8) ^ (to % 8)) * 16, pairs);
  }
  __syncwarp();
  constexpr int PIECES = DIM / 8;  // of a row
  const int piece = lane % PIECES;
#pragma unroll
  for (int i = lane / PIECES; i < 16; i += 32 / PIECES) {
    const int from = row + i;
    const unsigned char* at = tile + (piece / 8 * OWNED + from) * ROW_BYTES + ((piece % 8) ^ (from % 8)) * 16;
    if (i < rows) copy_16(out + i * stride + piece * 8, at);
  }
}

}  // namespace hopper
