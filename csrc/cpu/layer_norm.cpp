// LayerNorm, forward (with an optional residual addition) and backward.
#include "common.h"

namespace megalite {

struct LayerForward {
  const void *x, *residual;
  const float *weight, *bias;
  void *y, *total;
  float *mean, *rstd;
  int64_t cols;
  float eps;
};

struct LayerBackward {
  const void *dy, *dresidual, *x;
  const float *weight, *bias, *mean, *rstd;
  void *dx, *y;  // y, made again, may be null
  int64_t cols;
};

}  // namespace megalite

#define MEGALITE_KERNELS "layer_norm.inc"
#include "foreach_isa.h"

namespace megalite {

void layer_norm_forward(DType dtype, const void* x, const void* residual, const float* weight, const float* bias,
                        void* y, void* total, float* mean, float* rstd, int64_t rows, int64_t cols, float eps,
                        int threads) {
  const LayerForward arguments{x, residual, weight, bias, y, total, mean, rstd, cols, eps};
  MEGALITE_WITH_TYPE(dtype, {
    const auto kernel = MEGALITE_PICK(layer_forward_rows<T>);
    parallel_ranges(parts_for(rows * cols, threads), rows,
                    [&](int, int64_t begin, int64_t end) { kernel(arguments, begin, end); });
  });
}

void layer_norm_backward(DType dtype, const void* dy, const void* dresidual, const void* x, const float* weight,
                         const float* bias, const float* mean, const float* rstd, void* dx, float* dweight,
                         float* dbias, void* y, int64_t rows, int64_t cols, int threads) {
  const LayerBackward arguments{dy, dresidual, x, weight, bias, mean, rstd, dx, y, cols};
  const int parts = parts_for(rows * cols, threads);
  Partials partials(parts, 2, cols);
  MEGALITE_WITH_TYPE(dtype, {
    const auto kernel = MEGALITE_PICK(layer_backward_rows<T>);
    parallel_ranges(parts, rows,
                    [&](int part, int64_t begin, int64_t end) { kernel(arguments, begin, end, partials, part); });
  });
  partials.sum(0, dweight);
  partials.sum(1, dbias);
}

}  // namespace megalite
