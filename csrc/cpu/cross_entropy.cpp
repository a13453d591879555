// Cross-entropy: loss and log-sum-exp of rows of logits, what a shard of the vocabulary adds to them, and the gradient.
#include "common.h"

namespace megalite {

struct LossArguments {
  const void* logits;
  int64_t stride;
  const int64_t* target;
  int64_t rows;
  VocabularyShard shard;
  LossOptions options;
  const float* scale = nullptr;
  int64_t scale_stride = 0;
  float *loss = nullptr, *lse = nullptr;  // loss: the four statistics where those are asked for
  void* dlogits = nullptr;
  int64_t dlogits_stride = 0;
};

}  // namespace megalite

#define MEGALITE_KERNELS "cross_entropy.inc"
#include "foreach_isa.h"

namespace megalite {

namespace {

template <class Kernel>
int64_t first_bad_row(const LossArguments& arguments, int threads, Kernel kernel) {
  const int parts = parts_for(arguments.rows * arguments.shard.cols, threads);
  std::vector<int64_t> bad(parts, -1);
  parallel_ranges(parts, arguments.rows,
                  [&](int part, int64_t begin, int64_t end) { bad[part] = kernel(arguments, begin, end); });
  const auto found = std::find_if(bad.begin(), bad.end(), [](int64_t row) { return row >= 0; });
  return found == bad.end() ? -1 : *found;
}

}  // namespace

int64_t cross_entropy_forward(LossRows in, float* loss, float* lse, LossOptions options, int threads) {
  LossArguments arguments{in.logits, in.stride, in.target, in.rows, {0, in.cols, in.cols}, options};
  arguments.loss = loss, arguments.lse = lse;
  MEGALITE_WITH_TYPE(in.dtype, { return first_bad_row(arguments, threads, MEGALITE_PICK(loss_rows<T>)); });
}

void cross_entropy_stats(LossRows in, int64_t start, float* stats, LossOptions options, int threads) {
  LossArguments arguments{in.logits, in.stride, in.target, in.rows, {start, in.cols, in.cols}, options};
  arguments.loss = stats;
  MEGALITE_WITH_TYPE(in.dtype, { first_bad_row(arguments, threads, MEGALITE_PICK(stat_rows<T>)); });
}

void cross_entropy_backward(LossRows in, int64_t start, int64_t vocabulary, const float* lse, const float* scale,
                            int64_t scale_stride, void* dlogits, int64_t dlogits_stride, LossOptions options,
                            int threads) {
  LossArguments arguments{in.logits, in.stride, in.target, in.rows, {start, in.cols, vocabulary}, options};
  arguments.scale = scale, arguments.scale_stride = scale_stride;
  arguments.lse = const_cast<float*>(lse);
  arguments.dlogits = dlogits, arguments.dlogits_stride = dlogits_stride;
  MEGALITE_WITH_TYPE(in.dtype, { first_bad_row(arguments, threads, MEGALITE_PICK(grad_rows<T>)); });
}

int64_t cross_entropy_grad(LossRows in, const float* scale, int64_t scale_stride, float* loss, float* lse,
                           LossOptions options, int threads) {
  LossArguments arguments{in.logits, in.stride, in.target, in.rows, {0, in.cols, in.cols}, options};
  arguments.scale = scale, arguments.scale_stride = scale_stride;
  arguments.loss = loss, arguments.lse = lse;
  arguments.dlogits = const_cast<void*>(in.logits), arguments.dlogits_stride = in.stride;
  MEGALITE_WITH_TYPE(in.dtype, { return first_bad_row(arguments, threads, MEGALITE_PICK(loss_and_grad_rows<T>)); });
}

}  // namespace megalite
