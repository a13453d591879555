// Rotary position embedding, alone (the backward is the rotation by the opposite angle) or after an RMSNorm of heads.
#include "common.h"

namespace megalite {

struct RopeArguments {
  Strided x, out;
  RopeShape shape;
  bool inverse;
};

struct RopeNormArguments {
  Strided dy, x;
  const float* weight;
  void* out;  // dx in the backward
  float* rstd;
  RopeShape shape;
  float eps;
};

}  // namespace megalite

#define MEGALITE_KERNELS "rope.inc"
#include "foreach_isa.h"

namespace megalite {

namespace {

int parts_of(const RopeShape& shape, int threads) { return parts_for(shape.tokens * shape.heads * shape.dim, threads); }

// Doubled angles and one head; padded so that the threads' buffers share no cache line.
std::vector<float> scratch_of(const RopeShape& shape) { return std::vector<float>(4 * shape.half + shape.dim + 32); }

}  // namespace

void rope(DType dtype, Strided x, Strided out, RopeShape shape, bool inverse, int threads) {
  const RopeArguments arguments{x, out, shape, inverse};
  MEGALITE_WITH_TYPE(dtype, {
    const auto kernel = MEGALITE_PICK(rope_tokens<T>);
    parallel_ranges(parts_of(shape, threads), shape.tokens,
                    [&](int, int64_t begin, int64_t end) { kernel(arguments, begin, end, scratch_of(shape).data()); });
  });
}

void rope_norm_forward(DType dtype, Strided x, const float* weight, void* out, float* rstd, RopeShape shape, float eps,
                       int threads) {
  const RopeNormArguments arguments{{}, x, weight, out, rstd, shape, eps};
  MEGALITE_WITH_TYPE(dtype, {
    const auto kernel = MEGALITE_PICK(rope_norm_forward_tokens<T>);
    parallel_ranges(parts_of(shape, threads), shape.tokens,
                    [&](int, int64_t begin, int64_t end) { kernel(arguments, begin, end, scratch_of(shape).data()); });
  });
}

void rope_norm_backward(DType dtype, Strided dy, Strided x, const float* weight, const float* rstd, void* dx,
                        float* dweight, RopeShape shape, int threads) {
  const RopeNormArguments arguments{dy, x, weight, dx, const_cast<float*>(rstd), shape, 0.0f};
  const int parts = parts_of(shape, threads);
  Partials partials(parts, 1, shape.dim);
  MEGALITE_WITH_TYPE(dtype, {
    const auto kernel = MEGALITE_PICK(rope_norm_backward_tokens<T>);
    parallel_ranges(parts, shape.tokens, [&](int part, int64_t begin, int64_t end) {
      kernel(arguments, begin, end, scratch_of(shape).data(), partials.total(part, 0), partials.block(part, 0));
    });
  });
  partials.sum(0, dweight);
}

}  // namespace megalite
