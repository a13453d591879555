// Deterministic sums of squares: fixed blocks, added in their order whatever the number of threads.
#include "common.h"

#define MEGALITE_KERNELS "grad_norm.inc"
#include "foreach_isa.h"

namespace megalite {

namespace {

constexpr int64_t kBlock = 65536;

}  // namespace

void sums_of_squares(DType dtype, const void* const* x, const int64_t* sizes, int64_t count, double* sums,
                     int threads) {
  std::vector<int64_t> ends(count);  // blocks of all tensors up to and with this one
  int64_t blocks = 0, elements = 0;
  for (int64_t i = 0; i < count; ++i) {
    ends[i] = blocks += divide_up(sizes[i], kBlock);
    elements += sizes[i];
  }
  std::vector<double> parts(blocks);
  MEGALITE_WITH_TYPE(dtype, {
    const auto kernel = MEGALITE_PICK(block_sum<T>);
    parallel_ranges(parts_for(elements, threads), blocks, [&](int, int64_t begin, int64_t end) {
      int64_t i = std::upper_bound(ends.begin(), ends.end(), begin) - ends.begin();
      for (int64_t b = begin; b < end; ++b) {
        while (b >= ends[i]) ++i;
        const int64_t first = (b - (i == 0 ? 0 : ends[i - 1])) * kBlock;
        parts[b] = kernel(static_cast<const T*>(x[i]) + first, std::min(kBlock, sizes[i] - first));
      }
    });
  });
  for (int64_t i = 0, b = 0; i < count; ++i) {
    sums[i] = 0.0;
    for (; b < ends[i]; ++b) sums[i] += parts[b];
  }
}

}  // namespace megalite
