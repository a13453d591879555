// Deterministic sum of squares: fixed blocks, added in their order whatever the number of threads.
#include "common.h"

#define MEGALITE_KERNELS "grad_norm.inc"
#include "foreach_isa.h"

namespace megalite {

double sum_of_squares(DType dtype, const void* x, int64_t size, int threads) {
  constexpr int64_t kBlock = 65536;
  std::vector<double> sums((size + kBlock - 1) / kBlock);
  MEGALITE_WITH_TYPE(dtype, {
    const auto kernel = MEGALITE_PICK(block_sum<T>);
    const int64_t blocks = static_cast<int64_t>(sums.size());
    parallel_ranges(parts_for(size, threads), blocks, [&](int, int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b)
        sums[b] = kernel(static_cast<const T*>(x) + b * kBlock, std::min(kBlock, size - b * kBlock));
    });
  });
  double total = 0.0;
  for (const double sum : sums) total += sum;
  return total;
}

}  // namespace megalite
