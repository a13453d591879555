// A gradient's last step: times the incoming gradient and rounded, in one pass.
#include "common.h"

#define MEGALITE_KERNELS "scaled_copy.inc"
#include "foreach_isa.h"

namespace megalite {

namespace {

template <class From, class To>
void run(const From* x, float scale, To* out, int64_t size, int threads) {
  const auto kernel = MEGALITE_PICK(scaled_range<From, To>);
  parallel_ranges(parts_for(size, threads), size,
                  [&](int, int64_t begin, int64_t end) { kernel(x, scale, out, begin, end); });
}

}  // namespace

void scaled_copy(DType from, const void* x, float scale, DType to, void* out, int64_t size, int threads) {
  MEGALITE_WITH_TYPE(from, {
    using From = T;
    MEGALITE_WITH_TYPE(to, { run(static_cast<const From*>(x), scale, static_cast<T*>(out), size, threads); });
  });
}

}  // namespace megalite
