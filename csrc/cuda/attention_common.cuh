// What the attention kernels for mma.sync share: which tile a block owns, what its rows may see, tiles in shared
// memory, products of tiles.
//
// Positions. Query i of a sequence stands at key position p = i + shift, shift = keys - queries + offset, and sees the
// keys j of [p - behind, p + ahead] that exist. Causal is ahead = 0, a window of w is behind = w - 1 (not causal: ahead
// too), no limit is 2^29: one pair of comparisons serves every mask, and only where a tile is seen in part.
//
// Tiles. A tile is [rows, PITCH] elements of 2 bytes, PITCH = COLUMNS rounded up to 64; its 16-byte chunk c of row r
// lies at chunk c ^ (r % 8) of that row. The eight lanes that one phase of a copy, of `ldmatrix` or of a 16-byte access
// serves touch either eight chunks of one row or one chunk of eight rows that follow one another: with the exclusive or
// both are eight different chunks modulo 8, all 32 banks once, so nothing here has a bank conflict. Columns from the
// head's true dim up to COLUMNS are filled with zeros, as are rows past the end of a sequence.
//
// Fragments (PTX ISA, mma.m16n8k16). With g = lane / 4 and t = lane % 4 a lane's accumulators 0..3 of a 16 x 8 tile
// stand at rows g, g, g + 8, g + 8 and columns 2t, 2t + 1, 2t, 2t + 1. Two such tiles side by side, packed to 16 bits,
// are the left operand of the next product: probabilities never leave the registers.
#pragma once
#include "common.cuh"
#include "ptx.cuh"

namespace attention {

#ifdef __CUDACC_RTC__
constexpr float INFINITE = 1.0f / 0.0f;  // NVRTC has neither <limits> nor g++'s built-in, which has no such division
#else
constexpr float INFINITE = __builtin_huge_valf();
#endif
constexpr float LOG2E = 1.4426950408889634f;
constexpr float LN2 = 0.6931471805599453f;
constexpr int FAR = 1 << 29;  // stands for no limit of ahead or behind

DEVICE constexpr int pitch(int dim) { return (dim + 63) / 64 * 64; }

// The part of one sequence that a block owns: `row` is its first query (or key).
struct Owned {
  int row, head, batch, query_start, key_start, queries, keys, shift;
};

// Pairs of head and sequence go in sections whose other operands fit the L2 cache together; inside a section the tiles
// with the most work come first in every pair, so that the last wave is made of short ones. `cu_q` null: a sequence is
// a batch entry of q_len queries and k_len keys.
DEVICE Owned owned(int tile_rows, bool last_first, int64_t blocks, int64_t heads, int64_t sequences, int64_t section,
                   const int32_t* cu_q, const int32_t* cu_k, int64_t q_len, int64_t k_len, int64_t offset) {
  int program = blockIdx.x, pairs = static_cast<int>(heads * sequences);
  int per_section = static_cast<int>(blocks * section);
  int first = program / per_section * static_cast<int>(section);
  int width = min(static_cast<int>(section), pairs - first);
  int place = program - first * static_cast<int>(blocks);
  int block = place / width, pair = first + place % width;
  if (last_first) block = static_cast<int>(blocks) - 1 - block;
  int sequence = pair / static_cast<int>(heads);
  Owned own;
  own.row = block * tile_rows;
  own.head = pair % static_cast<int>(heads);
  own.batch = sequence;
  own.query_start = own.key_start = 0;
  own.queries = static_cast<int>(q_len);
  own.keys = static_cast<int>(k_len);
  if (cu_q != nullptr) {
    own.batch = 0;
    own.query_start = cu_q[sequence];
    own.queries = cu_q[sequence + 1] - cu_q[sequence];
    own.key_start = cu_k[sequence];
    own.keys = cu_k[sequence + 1] - cu_k[sequence];
  }
  own.shift = own.keys - own.queries + static_cast<int>(offset);
  return own;
}

// What the numbers of a row's chunks are turned by.
DEVICE int turn(int row) { return row & 7; }

// Where chunk `chunk` of row `row` lies in a tile, in elements.
template <int PITCH>
DEVICE int place(int row, int chunk) {
  return row * PITCH + ((chunk ^ turn(row)) << 3);
}

// The same for chunk even + odd, `even` a constant and `odd` 0 or 1: the addresses of a lane in a whole row of chunks
// are four values and constants added to them.
template <int PITCH>
DEVICE int place(int row, int even, int odd) {
  return row * PITCH + (even / 8 * 64) + (((even & 6) ^ (odd ^ turn(row))) << 3);
}

// Starts copying ROWS rows of `dim` elements into a tile; rows from `left` on and columns from `dim` on become zeros.
// The rows start at `rows`, `stride` elements apart, each on 16 bytes. Not committed.
template <typename T, int ROWS, int COLUMNS, int THREAD_COUNT>
DEVICE void load_tile(T* tile, const T* rows, int64_t stride, int left, int dim) {
  constexpr int PITCH = pitch(COLUMNS), CHUNKS = PITCH / 8, STEP = THREAD_COUNT / CHUNKS;
  static_assert(THREAD_COUNT % CHUNKS == 0 && ROWS % STEP == 0,
                "every thread copies the same chunk of ROWS / STEP rows");
  const int chunk = threadIdx.x % CHUNKS, first = threadIdx.x / CHUNKS;
  if (chunk * 8 >= COLUMNS) return;
  const T* from = rows + first * stride + chunk * 8;
#pragma unroll
  for (int i = 0; i < ROWS / STEP; i++) {
    const int row = first + i * STEP;
    ptx::cp_async_16(tile + place<PITCH>(row, chunk), from, row < left && chunk * 8 < dim);
    from += STEP * stride;
  }
}

template <int M, int N>
DEVICE void clear(float (&d)[M][N][4]) {
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) d[m][n][i] = 0.0f;
}

// d = A B': A the 16 * M rows of a warp from `a` on, B the 8 * N rows of `b`, both tiles [rows, COLUMNS].
template <typename T, int COLUMNS, int M, int N>
DEVICE void multiply_rows(float (&d)[M][N][4], const T* a, const T* b) {
  constexpr int PITCH = pitch(COLUMNS);
  static_assert(N % 2 == 0, "one ldmatrix brings two tiles of B");
  const int lane = threadIdx.x % 32;
  clear(d);
#pragma unroll
  for (int k = 0; k < COLUMNS / 16; k++) {
    uint32_t left[M][4];
#pragma unroll
    for (int m = 0; m < M; m++)
      ptx::ldmatrix_x4(left[m], a + m * 16 * PITCH + place<PITCH>(lane % 16, 2 * k, lane / 16));
#pragma unroll
    for (int n = 0; n < N / 2; n++) {
      uint32_t right[4];
      // In the order of A too: matrices 0 and 2 are the first eight columns, and every address has the same lane part.
      ptx::ldmatrix_x4(right, b + n * 16 * PITCH + place<PITCH>(lane % 16, 2 * k, lane / 16));
      const uint32_t even[2] = {right[0], right[2]}, odd[2] = {right[1], right[3]};
#pragma unroll
      for (int m = 0; m < M; m++) {
        ptx::mma_m16n8k16<T>(d[m][2 * n], left[m], even);
        ptx::mma_m16n8k16<T>(d[m][2 * n + 1], left[m], odd);
      }
    }
  }
}

// d += A B: A the packed 16 * M x 16 * K of a warp in registers, B the 16 * K rows of the tile `b` [rows, COLUMNS].
template <typename T, int COLUMNS, int M, int K>
DEVICE void accumulate_columns(float (&d)[M][COLUMNS / 8][4], const uint32_t (&a)[M][K][4], const T* b) {
  constexpr int PITCH = pitch(COLUMNS);
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < K; k++) {
#pragma unroll
    for (int n = 0; n < COLUMNS / 16; n++) {
      uint32_t right[4];
      ptx::ldmatrix_x4_transposed(right, b + k * 16 * PITCH + place<PITCH>(lane % 16, 2 * n, lane / 16));
      const uint32_t even[2] = {right[0], right[1]}, odd[2] = {right[2], right[3]};
#pragma unroll
      for (int m = 0; m < M; m++) {
        ptx::mma_m16n8k16<T>(d[m][2 * n], a[m][k], even);
        ptx::mma_m16n8k16<T>(d[m][2 * n + 1], a[m][k], odd);
      }
    }
  }
}

// Accumulators as the left operand of the next product, rounded to T.
template <typename T, int M, int N>
DEVICE void pack(uint32_t (&a)[M][N / 2][4], const float (&d)[M][N][4]) {
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int n = 0; n < N; n++) {
      a[m][n / 2][n % 2 * 2] = ptx::pack2<T>(d[m][n][0], d[m][n][1]);
      a[m][n / 2][n % 2 * 2 + 1] = ptx::pack2<T>(d[m][n][2], d[m][n][3]);
    }
}

// Puts -infinity where row r of the warp doesn't see column c: c < low + r, c > high + r or c > limit.
template <int M, int N>
DEVICE void hide(float (&d)[M][N][4], int low, int high, int limit) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int row = m * 16 + half * 8 + lane / 4;
      const int from = low + row, to = min(high + row, limit);
#pragma unroll
      for (int n = 0; n < N; n++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
          const int column = n * 8 + lane % 4 * 2 + i;
          if (column < from || column > to) d[m][n][half * 2 + i] = -INFINITE;
        }
    }
}

// Scores before the last factor: tanh(before * scores) with a soft-cap, before * scores where the scale can't be the
// factor (it must be positive, for max(s) * f = max(s * f)), and else the scores as they are.
template <int M, int N>
DEVICE void bend(float (&d)[M][N][4], float before, bool capped) {
  if (!capped && before == 1.0f) return;
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float x = before * d[m][n][i];
        d[m][n][i] = capped ? 1.0f - 2.0f / (1.0f + ptx::exp2_approx(2.0f * LOG2E * x)) : x;
      }
}

// Writes the 16 * M rows of a warp, rounded to T, to rows `stride` elements apart; `tile` points to as many rows of
// shared memory that no other warp uses, so that memory sees whole chunks in order.
template <typename T, int COLUMNS, int M>
DEVICE void store_rows(const float (&d)[M][COLUMNS / 8][4], T* tile, T* rows, int64_t stride, int left, int dim) {
  constexpr int PITCH = pitch(COLUMNS), CHUNKS = PITCH / 8;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int n = 0; n < COLUMNS / 8; n++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int row = m * 16 + half * 8 + lane / 4;
        *reinterpret_cast<uint32_t*>(tile + place<PITCH>(row, n) + lane % 4 * 2) =
            ptx::pack2<T>(d[m][n][half * 2], d[m][n][half * 2 + 1]);
      }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < M * 16 * CHUNKS / 32; i++) {
    const int row = (i * 32 + lane) / CHUNKS, chunk = (i * 32 + lane) % CHUNKS;
    if (row < left && chunk * 8 < dim) {
      store_vector(rows + row * stride + chunk * 8, load_vector<8>(tile + place<PITCH>(row, chunk)));
    }
  }
}

}  // namespace attention
