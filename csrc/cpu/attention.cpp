// Attention, forward and backward, with tasks of one document and one key/value head each.
#include "common.h"

namespace megalite {

struct AttentionForward {
  Strided q, k, v;
  void* out;
  float* lse;
  AttentionShape shape;
};

struct AttentionBackward {
  Strided dout, q, k, v, out;
  const float *dlse, *lse;
  void *dq, *dk, *dv;
  AttentionShape shape;
};

}  // namespace megalite

#define MEGALITE_KERNELS "attention.inc"
#include "foreach_isa.h"

namespace megalite {

namespace {

// Tasks go to whichever thread is free: each writes its own outputs, so the bits don't depend on who does it.
template <class Arguments>
void run_tasks(const Arguments& arguments, void (*task)(const Arguments&, int64_t), int threads) {
  const int64_t tasks = arguments.shape.num_segments * arguments.shape.kv_heads;
#ifdef _OPENMP
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1 && tasks > 1)
#endif
  for (int64_t i = 0; i < tasks; ++i) task(arguments, i);
  (void)threads;
}

}  // namespace

void attention_forward(DType dtype, Strided q, Strided k, Strided v, void* out, float* lse, AttentionShape shape,
                       int threads) {
  const AttentionForward arguments{q, k, v, out, lse, shape};
  MEGALITE_WITH_TYPE(dtype, { run_tasks(arguments, MEGALITE_PICK(attention_forward_task<T>), threads); });
}

void attention_backward(DType dtype, Strided dout, const float* dlse, Strided q, Strided k, Strided v, Strided out,
                        const float* lse, void* dq, void* dk, void* dv, AttentionShape shape, int threads) {
  const AttentionBackward arguments{dout, q, k, v, out, dlse, lse, dq, dk, dv, shape};
  MEGALITE_WITH_TYPE(dtype, { run_tasks(arguments, MEGALITE_PICK(attention_backward_task<T>), threads); });
}

}  // namespace megalite
