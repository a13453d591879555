// main_grad += dy^T x without a temporary. dy is packed by blocks of tokens and outputs (2 MB, which the last cache
// keeps), x by panels of a few vectors (the second cache keeps one); a tile of main_grad stays in registers over all
// tokens of a block. Packing needs no transpose: both are read along their rows.
#include <memory>

#include "common.h"

namespace megalite {

struct WeightGradArguments {
  const void *dy, *x;
  int64_t dy_stride, x_stride, in;
  float* main_grad;
};

// Tokens from first_token on, rows [begin, end) of main_grad.
struct WeightGradBlock {
  int64_t first_token, tokens, begin, end;
};

// Left panels are padded to `lanes` columns, a right panel has `panel` of them, a word holds `tokens`.
struct WeightGradSizes {
  int64_t lanes, panel, tokens;
};

}  // namespace megalite

#define MEGALITE_KERNELS "weight_grad.inc"
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
#include "weight_grad.inc"
#undef MEGALITE_PAIRS
#undef MEGALITE_VECTOR_BF16
#undef LANES
#undef ISA_NAMESPACE
}  // namespace megalite::bf16_pairs
#pragma GCC pop_options
#endif

namespace megalite {

namespace {

constexpr int64_t kWords = 1024;             // of tokens in a block
constexpr int64_t kLeftWords = 1024 * 2048;  // of a packed block (8 MB, in the last cache): x is packed once for each

using PackLeft = void (*)(const WeightGradArguments&, const WeightGradBlock&, int64_t, int64_t, void*);
using Panel = void (*)(const WeightGradArguments&, const WeightGradBlock&, int64_t, const void*, void*);

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

void run(const WeightGradArguments& a, int64_t tokens, int64_t out, int threads, const WeightGradSizes& sizes,
         PackLeft pack_left, Panel panel) {
  const int64_t most_words = std::min(kWords, (tokens + sizes.tokens - 1) / sizes.tokens);
  const int64_t outputs = std::max(sizes.lanes, kLeftWords / most_words / sizes.lanes * sizes.lanes);
  const int64_t panels = (a.in + sizes.panel - 1) / sizes.panel;
  const int parts = static_cast<int>(std::min<int64_t>(parts_for(tokens * a.in, threads), panels));
  const int64_t left_size = most_words * round_up(std::min(out, outputs), sizes.lanes);
  const int64_t right_size = most_words * sizes.panel;
  const std::unique_ptr<uint32_t[]> memory(new uint32_t[left_size + parts * right_size + 16]);
  uint32_t* left = memory.get();
  left += (64 - reinterpret_cast<uintptr_t>(left) % 64) % 64 / sizeof(uint32_t);
  for (int64_t token = 0; token < tokens; token += kWords * sizes.tokens)
    for (int64_t row = 0; row < out; row += outputs) {
      const WeightGradBlock block{token, std::min(kWords * sizes.tokens, tokens - token), row,
                                  std::min(out, row + outputs)};
      const int64_t groups = (block.end - row + sizes.lanes - 1) / sizes.lanes;
      parallel_ranges(std::min<int>(parts, groups), groups, [&](int, int64_t begin, int64_t end) {
        pack_left(a, block, row + begin * sizes.lanes, std::min(block.end, row + end * sizes.lanes), left);
      });
      parallel_ranges(parts, panels, [&](int part, int64_t begin, int64_t end) {
        for (int64_t p = begin; p < end; ++p) panel(a, block, p, left, left + left_size + part * right_size);
      });
    }
}

}  // namespace

void linear_weight_grad(DType dtype, const void* dy, int64_t dy_stride, const void* x, int64_t x_stride,
                        float* main_grad, int64_t tokens, int64_t out, int64_t in, int threads) {
  const WeightGradArguments arguments{dy, x, dy_stride, x_stride, in, main_grad};
  if (tokens == 0 || out == 0 || in == 0) return;
#if MEGALITE_X86
  if (dtype == DType::bfloat16 && isa() == Isa::avx512_bf16)
    return run(arguments, tokens, out, threads, bf16_pairs::weight_grad_sizes(), bf16_pairs::weight_grad_left<bf16>,
               bf16_pairs::weight_grad_panel<bf16>);
#endif
  MEGALITE_WITH_TYPE(dtype, {
    run(arguments, tokens, out, threads, MEGALITE_PICK(weight_grad_sizes()), MEGALITE_PICK(weight_grad_left<T>),
        MEGALITE_PICK(weight_grad_panel<T>));
  });
}

bool has_matrix_unit() {
#if MEGALITE_X86
  __builtin_cpu_init();
  return __builtin_cpu_supports("amx-bf16");
#else
  return false;
#endif
}

}  // namespace megalite
