// out (+)= left right^T, whatever side the factors' inner dimension is on: that only changes how they are packed. The
// right factor becomes panels a few vectors wide, [panel][word][lane], which the second cache feeds to the tile; the
// left one is read where it stands, a word for all lanes at a time, if its inner elements are side by side. Source:
// Goto and van de Geijn, Anatomy of High-Performance Matrix Multiplication, 2008.
#include "gemm.h"

#include <type_traits>

#include "scratch.h"

#define MEGALITE_KERNELS "gemm.inc"
#include "foreach_isa.h"

#if MEGALITE_X86
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")
namespace megalite::bf16_pairs {
#define ISA_NAMESPACE bf16_pairs
#define LANES 16
#define MEGALITE_VECTOR_BF16 1
#define MEGALITE_PAIRS
#include "vec.inc"
//
#include "gemm.inc"
#undef ISA_NAMESPACE
}  // namespace megalite::bf16_pairs
#pragma GCC pop_options

#if MEGALITE_AMX
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,amx-tile,amx-bf16")
namespace megalite::bf16_tiles {
#define ISA_NAMESPACE bf16_tiles
#define MEGALITE_TILES
#define MEGALITE_TILES_EMULATED 0
#include "vec.inc"
//
#include "gemm.inc"
#undef MEGALITE_TILE_ZERO
#undef MEGALITE_TILE_LOAD
#undef MEGALITE_TILE_STORE
#undef MEGALITE_TILE_DOT
#undef ISA_NAMESPACE
}  // namespace megalite::bf16_tiles

namespace megalite::split_tiles {
#define ISA_NAMESPACE split_tiles
#define MEGALITE_SPLIT
#include "vec.inc"
//
#include "gemm.inc"
#undef MEGALITE_SPLIT
#undef MEGALITE_TILES_EMULATED
#undef MEGALITE_TILE_ZERO
#undef MEGALITE_TILE_LOAD
#undef MEGALITE_TILE_STORE
#undef MEGALITE_TILE_DOT
#undef MEGALITE_TILES
#undef ISA_NAMESPACE
}  // namespace megalite::split_tiles
#pragma GCC pop_options
#endif
#undef MEGALITE_PAIRS
#undef MEGALITE_VECTOR_BF16
#undef LANES
#endif

namespace megalite::bf16_tiles_emulated {
#define ISA_NAMESPACE bf16_tiles_emulated
#define LANES 4
#define MEGALITE_VECTOR_BF16 0
#define MEGALITE_PAIRS
#define MEGALITE_TILES
#define MEGALITE_TILES_EMULATED 1
#include "vec.inc"
//
#include "gemm.inc"
#undef MEGALITE_TILE_ZERO
#undef MEGALITE_TILE_LOAD
#undef MEGALITE_TILE_STORE
#undef MEGALITE_TILE_DOT
#undef ISA_NAMESPACE
}  // namespace megalite::bf16_tiles_emulated

namespace megalite::split_tiles_emulated {
#define ISA_NAMESPACE split_tiles_emulated
#define MEGALITE_SPLIT
#include "vec.inc"
//
#include "gemm.inc"
}  // namespace megalite::split_tiles_emulated

namespace megalite {

namespace {

constexpr int64_t kFarWords = 1024 * 1024;  // 4 MB, in the last cache
constexpr int64_t kSumWords = 4096 * 1024;  // 16 MB of sums that wait for the rest of the inner dimension

// Parts of the rows and of the columns.
struct Grid {
  int rows, cols;
};

// The cut with the least work for the slowest thread: tiles it computes, words it packs (about as long as six
// multiplications each).
Grid cut(const Product& a, const GemmSizes& sizes, int threads) {
  const int64_t strips = divide_up(a.rows, sizes.rows), panels = divide_up(a.cols, sizes.cols);
  Grid best{1, 1};
  int64_t least = std::numeric_limits<int64_t>::max();
  for (int rows = 1; rows <= threads; ++rows) {
    if (threads % rows != 0) continue;
    const int64_t r = divide_up(strips, rows) * sizes.rows, c = divide_up(panels, threads / rows) * sizes.cols;
    const int64_t work = r * c + 6 * (c + (a.direct ? 0 : r));
    if (work >= least) continue;
    least = work;
    best = {rows, threads / rows};
  }
  return best;
}

using Part = void (*)(const Product&, const Span&, const Span&, const GemmBlocks&, const GemmScratch&);

void run(const Product& a, int threads, const GemmSizes& sizes, Part part) {
  // 32 multiplications take about as long as an element elsewhere.
  const Grid grid = cut(a, sizes, parts_for(a.rows * a.cols / 32 * std::max<int64_t>(a.inner, 1), threads));
  const int64_t words = divide_up(a.inner, sizes.inner);
  const int64_t strips = divide_up(a.rows, sizes.rows), panels = divide_up(a.cols, sizes.cols);
  GemmBlocks blocks;
  blocks.words = round_up(divide_up(words, divide_up(words, sizes.words)), sizes.step);
  blocks.whole = blocks.words >= words;
  // Rows that are read where they stand are read whole: 1 KB of each took 1.15 times as long.
  blocks.deep =
      a.direct ? blocks.words : round_up(divide_up(blocks.words, divide_up(blocks.words, sizes.deep)), sizes.step);
  const int64_t deep = blocks.deep;
  const int64_t most_cols = divide_up(panels, grid.cols) * sizes.cols;
  const int64_t most_rows = divide_up(strips, grid.rows) * sizes.rows;
  const auto fitting = [](int64_t most, int64_t by, int64_t unit) { return std::max(unit, most / by / unit * unit); };
  const auto even = [](int64_t all, int64_t most, int64_t unit) {
    return round_up(divide_up(all, divide_up(all, most)), unit);
  };
  int64_t cols = fitting(kFarWords, blocks.words * sizes.planes, sizes.cols);
  if (!blocks.whole) cols = std::min(cols, fitting(kSumWords, most_rows, sizes.cols));
  blocks.cols = even(most_cols, cols, sizes.cols);
  int64_t rows = fitting(sizes.near, deep * sizes.planes, sizes.rows);
  const bool summed = deep < blocks.words || !blocks.whole;
  if (deep < blocks.words) rows = std::min(rows, fitting(sizes.sums, blocks.cols, sizes.rows));
  blocks.rows = even(most_rows, rows, sizes.rows);
  const int64_t left = a.direct ? 0 : round_up(blocks.rows * (deep + 32) * sizes.planes, 1024);
  const int64_t right = round_up(blocks.cols * (blocks.words + 16) * sizes.planes, 1024);
  const int64_t sum_cols = summed ? blocks.cols : std::min(blocks.cols, sizes.sum_columns);
  const int64_t sums = (blocks.whole ? blocks.rows : most_rows) * sum_cols;
  parallel_ranges(grid.rows * grid.cols, grid.rows * grid.cols, [&](int index, int64_t, int64_t) {
    const auto range = [&](int64_t items, int64_t i, int64_t n, int64_t unit, int64_t end) {
      return Span{std::min(end, items * i / n * unit), std::min(end, items * (i + 1) / n * unit)};
    };
    const Span rows = range(strips, index / grid.cols, grid.rows, sizes.rows, a.rows);
    const Span cols = range(panels, index % grid.cols, grid.cols, sizes.cols, a.cols);
    const Scratch memory((left + right + sums) * sizeof(uint32_t));
    uint32_t* start = memory.data<uint32_t>();
    part(a, rows, cols, blocks, {start, start + left, start + left + right});
  });
}

// A result of half the second cache or more is not there any more when it is needed: storing it line by line, unread,
// took 0.7 of the time with 2,048 x 2,816 of 512 whose factors came from memory too.
constexpr int64_t kNearBytes = 1 << 20;

bool whole_lines(const Product& a, int64_t bytes) {
  const auto lines = [](int64_t n) { return n % 64 == 0; };
  return lines(reinterpret_cast<intptr_t>(a.out)) && lines(bytes * a.out_stride) &&
         bytes * a.rows * a.cols >= kNearBytes;
}

// Two neighbours in memory are a word, if none is cut and the rows hold all that is read of them.
Product pairs(Product a, const GemmSizes& sizes, bool to_float) {
  a.direct = sizes.planes == 1 && a.left.inner_last && a.inner % (2 * sizes.step) == 0 && a.left.stride % 2 == 0 &&
             (sizes.step == 1 || a.rows % sizes.rows == 0);
  a.past_caches = sizes.step > 1 && !a.add && whole_lines(a, to_float ? sizeof(float) : sizeof(bf16));
  return a;
}

#define MEGALITE_MULTIPLY_PAIRS(unit)                                            \
  run(pairs(product, unit::gemm_sizes(), to_float), threads, unit::gemm_sizes(), \
      to_float ? unit::multiply_part<bf16, float> : unit::multiply_part<bf16, bf16>)

#define MEGALITE_MULTIPLY_SPLIT(unit) \
  run(pairs(product, unit::gemm_sizes(), true), threads, unit::gemm_sizes(), unit::multiply_part<float, float>)

}  // namespace

void gemm(DType dtype, Factor left, Factor right, const void* bias, DType out_dtype, void* out, int64_t out_stride,
          bool add, int64_t rows, int64_t cols, int64_t inner, int threads) {
  if (rows == 0 || cols == 0) return;
  const Product product{left, right, bias, out,   out_stride,
                        add,  rows,  cols, inner, dtype == DType::float32 && left.inner_last};
  const bool to_float = out_dtype == DType::float32;
  if (dtype == DType::bfloat16) {
#if MEGALITE_AMX
    if (pair_unit() == PairUnit::amx) return MEGALITE_MULTIPLY_PAIRS(bf16_tiles);
#endif
#if MEGALITE_X86
    if (pair_unit() == PairUnit::avx512_bf16) return MEGALITE_MULTIPLY_PAIRS(bf16_pairs);
#endif
    if (pair_unit() == PairUnit::amx_emulated) return MEGALITE_MULTIPLY_PAIRS(bf16_tiles_emulated);
  }
  if (dtype == DType::float32) {
#if MEGALITE_AMX
    if (pair_unit() == PairUnit::amx) return MEGALITE_MULTIPLY_SPLIT(split_tiles);
#endif
    if (pair_unit() == PairUnit::amx_emulated) return MEGALITE_MULTIPLY_SPLIT(split_tiles_emulated);
  }
  MEGALITE_WITH_TYPE(dtype, {
    run(product, threads, MEGALITE_PICK(gemm_sizes()),
        to_float ? MEGALITE_PICK(multiply_part<T, float>) : MEGALITE_PICK(multiply_part<T, T>));
  });
}

}  // namespace megalite
