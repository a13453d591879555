// Cross-entropy: loss and log-sum-exp of rows of logits, their gradient, and both in one pass.
#include "common.h"

namespace megalite {

struct LossArguments {
  const void* logits;
  const int64_t* target;
  const float* scale;
  int64_t scale_stride;
  float *loss, *lse;
  void* dlogits;
  int64_t cols;
  LossOptions options;
};

}  // namespace megalite

#define MEGALITE_KERNELS "cross_entropy.inc"
#include "foreach_isa.h"

namespace megalite {

namespace {

template <class Kernel>
int64_t first_bad_row(const LossArguments& arguments, int64_t rows, int threads, Kernel kernel) {
  const int parts = parts_for(rows * arguments.cols, threads);
  std::vector<int64_t> bad(parts, -1);
  parallel_ranges(parts, rows,
                  [&](int part, int64_t begin, int64_t end) { bad[part] = kernel(arguments, begin, end); });
  const auto found = std::find_if(bad.begin(), bad.end(), [](int64_t row) { return row >= 0; });
  return found == bad.end() ? -1 : *found;
}

}  // namespace

int64_t cross_entropy_forward(DType dtype, const void* logits, const int64_t* target, float* loss, float* lse,
                              int64_t rows, int64_t cols, LossOptions options, int threads) {
  const LossArguments arguments{logits, target, nullptr, 0, loss, lse, nullptr, cols, options};
  MEGALITE_WITH_TYPE(dtype, { return first_bad_row(arguments, rows, threads, MEGALITE_PICK(loss_rows<T>)); });
}

void cross_entropy_backward(DType dtype, const float* dloss, int64_t dloss_stride, const void* logits,
                            const int64_t* target, const float* lse, void* dlogits, int64_t rows, int64_t cols,
                            LossOptions options, int threads) {
  const LossArguments arguments{logits,  target, dloss,  dloss_stride, nullptr, const_cast<float*>(lse),
                                dlogits, cols,   options};
  MEGALITE_WITH_TYPE(dtype, { first_bad_row(arguments, rows, threads, MEGALITE_PICK(grad_rows<T>)); });
}

int64_t cross_entropy_grad(DType dtype, void* logits, const int64_t* target, const float* scale, int64_t scale_stride,
                           float* loss, float* lse, int64_t rows, int64_t cols, LossOptions options, int threads) {
  const LossArguments arguments{logits, target, scale, scale_stride, loss, lse, logits, cols, options};
  MEGALITE_WITH_TYPE(dtype, { return first_bad_row(arguments, rows, threads, MEGALITE_PICK(loss_and_grad_rows<T>)); });
}

}  // namespace megalite
