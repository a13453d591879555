// RMSNorm, forward (with an optional residual addition) and backward.
#include "common.h"

namespace megalite {

struct RmsForward {
  const void *x, *residual;
  const float* weight;
  void *y, *total;
  float* rstd;
  int64_t cols;
  float eps;
};

struct RmsBackward {
  const void *dy, *dresidual, *x;
  const float *weight, *rstd;
  void *dx, *y;  // y, made again, may be null
  int64_t cols;
};

}  // namespace megalite

#define MEGALITE_KERNELS "rms_norm.inc"
#include "foreach_isa.h"

namespace megalite {

namespace {

// Here and not by the caller: there each conversion is a tensor more, 40 us of code that the kernels before have driven
// out of the caches.
std::vector<float> widened(const Gain& gain, int64_t cols) {
  std::vector<float> wide(cols);
  scaled_copy(gain.dtype, gain.weight, 1.0f, DType::float32, wide.data(), cols, 1);
  if (gain.zero_centered)
    for (float& value : wide) value += 1.0f;
  return wide;
}

}  // namespace

void rms_norm_forward(DType dtype, const void* x, const void* residual, Gain gain, void* y, void* total, float* rstd,
                      int64_t rows, int64_t cols, float eps, int threads) {
  const std::vector<float> weight = widened(gain, cols);
  const RmsForward arguments{x, residual, weight.data(), y, total, rstd, cols, eps};
  MEGALITE_WITH_TYPE(dtype, {
    const auto kernel = MEGALITE_PICK(rms_forward_rows<T>);
    parallel_ranges(parts_for(rows * cols, threads), rows,
                    [&](int, int64_t begin, int64_t end) { kernel(arguments, begin, end); });
  });
}

void rms_norm_backward(DType dtype, const void* dy, const void* dresidual, const void* x, Gain gain, const float* rstd,
                       void* dx, void* dweight, void* y, int64_t rows, int64_t cols, int threads) {
  const std::vector<float> weight = widened(gain, cols);
  const RmsBackward arguments{dy, dresidual, x, weight.data(), rstd, dx, y, cols};
  const int parts = parts_for(rows * cols, threads);
  Partials partials(parts, 1, cols);
  MEGALITE_WITH_TYPE(dtype, {
    const auto kernel = MEGALITE_PICK(rms_backward_rows<T>);
    parallel_ranges(parts, rows, [&](int part, int64_t begin, int64_t end) {
      kernel(arguments, begin, end, partials.total(part, 0), partials.block(part, 0));
    });
  });
  std::vector<float> sums(cols);
  partials.sum(0, sums.data());
  scaled_copy(DType::float32, sums.data(), 1.0f, gain.dtype, dweight, cols, 1);
}

}  // namespace megalite
