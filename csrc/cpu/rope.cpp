// Rotary position embedding; the backward is the rotation by the opposite angle.
#include "common.h"

namespace megalite {

struct RopeArguments {
  const void* x;
  int64_t token_stride, head_stride;
  const float *cos, *sin;
  void* out;
  int64_t heads, dim, half, cos_rows;
  bool interleaved, inverse;
};

}  // namespace megalite

#define MEGALITE_KERNELS "rope.inc"
#include "foreach_isa.h"

namespace megalite {

void rope(DType dtype, const void* x, int64_t token_stride, int64_t head_stride, const float* cos, const float* sin,
          void* out, int64_t tokens, int64_t heads, int64_t dim, int64_t half, int64_t cos_rows, bool interleaved,
          bool inverse, int threads) {
  const RopeArguments arguments{x,     token_stride, head_stride, cos,      sin,         out,
                                heads, dim,          half,        cos_rows, interleaved, inverse};
  MEGALITE_WITH_TYPE(dtype, {
    const auto kernel = MEGALITE_PICK(rope_tokens<T>);
    parallel_ranges(parts_for(tokens * heads * dim, threads), tokens,
                    [&](int, int64_t begin, int64_t end) { kernel(arguments, begin, end); });
  });
}

}  // namespace megalite
