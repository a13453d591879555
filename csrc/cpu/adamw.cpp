// AdamW over flat buffers: one pass reads 16 bytes an element and writes 12, and the parameter where there is a master.
#include "common.h"

namespace megalite {

struct AdamWArguments {
  void* params;
  float *master, *exp_avg, *exp_avg_sq;
  const float* grads;
  AdamWOptions options;
  uint32_t key = 0;
  bf16* remainder = nullptr;
};

}  // namespace megalite

#define MEGALITE_KERNELS "adamw.inc"
#include "foreach_isa.h"

namespace megalite {

void adamw(DType dtype, void* params, float* master, float* exp_avg, float* exp_avg_sq, const float* grads,
           int64_t size, AdamWOptions options, int threads) {
  const AdamWArguments arguments{params, master, exp_avg, exp_avg_sq, grads, options};
  MEGALITE_WITH_TYPE(dtype, {
    const auto kernel = MEGALITE_PICK(adamw_range<T>);
    parallel_ranges(parts_for(size, threads), size,
                    [&](int, int64_t begin, int64_t end) { kernel(arguments, begin, end); });
  });
}

void adamw_remainder(void* params, void* remainder, float* exp_avg, float* exp_avg_sq, const float* grads, int64_t size,
                     AdamWOptions options, int threads) {
  AdamWArguments arguments{params, nullptr, exp_avg, exp_avg_sq, grads, options};
  arguments.remainder = static_cast<bf16*>(remainder);
  const auto kernel = MEGALITE_PICK(adamw_remainder_range);
  parallel_ranges(parts_for(size, threads), size,
                  [&](int, int64_t begin, int64_t end) { kernel(arguments, begin, end); });
}

void adamw_stochastic(void* params, float* exp_avg, float* exp_avg_sq, const float* grads, int64_t size,
                      AdamWOptions options, uint32_t key, int threads) {
  const AdamWArguments arguments{params, nullptr, exp_avg, exp_avg_sq, grads, options, key};
  const auto kernel = MEGALITE_PICK(adamw_stochastic_range);
  parallel_ranges(parts_for(size, threads), size,
                  [&](int, int64_t begin, int64_t end) { kernel(arguments, begin, end); });
}

}  // namespace megalite
