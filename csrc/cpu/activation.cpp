// gelu, relu^2, and the gated swiglu and geglu; backwards recompute the activation.
#include "common.h"

namespace megalite {

// The backwards make y again where it is not null. y may be dy, dx may be x, and dgate and dup may be gate and up: each
// place is read before it is written, and by one thread alone.
struct ActivationArguments {
  const void *dy, *x;
  void *y, *dx;
};

struct GatedArguments {
  const void *dy, *gate, *up;
  void *y, *dgate, *dup;
  int64_t cols, stride;
};

}  // namespace megalite

#define MEGALITE_KERNELS "activation.inc"
#include "foreach_isa.h"

namespace megalite {

void activation_forward(DType dtype, Activation kind, const void* x, void* y, int64_t size, int threads) {
  const ActivationArguments arguments{nullptr, x, y, nullptr};
  MEGALITE_WITH_TYPE(dtype, {
    const auto kernel = MEGALITE_PICK(activation_forward_range_of<T>);
    parallel_ranges(parts_for(size, threads), size,
                    [&](int, int64_t begin, int64_t end) { kernel(arguments, kind, begin, end); });
  });
}

void activation_backward(DType dtype, Activation kind, const void* dy, const void* x, void* dx, void* y, int64_t size,
                         int threads) {
  const ActivationArguments arguments{dy, x, y, dx};
  MEGALITE_WITH_TYPE(dtype, {
    const auto kernel = MEGALITE_PICK(activation_backward_range_of<T>);
    parallel_ranges(parts_for(size, threads), size,
                    [&](int, int64_t begin, int64_t end) { kernel(arguments, kind, begin, end); });
  });
}

void gated_forward(DType dtype, Activation kind, const void* gate, const void* up, void* y, int64_t rows, int64_t cols,
                   int64_t stride, int threads) {
  const GatedArguments arguments{nullptr, gate, up, y, nullptr, nullptr, cols, stride};
  MEGALITE_WITH_TYPE(dtype, {
    const auto kernel = MEGALITE_PICK(gated_forward_rows_of<T>);
    parallel_ranges(parts_for(rows * cols, threads), rows,
                    [&](int, int64_t begin, int64_t end) { kernel(arguments, kind, begin, end); });
  });
}

void gated_backward(DType dtype, Activation kind, const void* dy, const void* gate, const void* up, void* dgate,
                    void* dup, void* y, int64_t rows, int64_t cols, int64_t stride, int threads) {
  const GatedArguments arguments{dy, gate, up, y, dgate, dup, cols, stride};
  MEGALITE_WITH_TYPE(dtype, {
    const auto kernel = MEGALITE_PICK(gated_backward_rows_of<T>);
    parallel_ranges(parts_for(rows * cols, threads), rows,
                    [&](int, int64_t begin, int64_t end) { kernel(arguments, kind, begin, end); });
  });
}

}  // namespace megalite
