// Elementary functions of the kernels, for tests.
#include "common.h"

#define MEGALITE_KERNELS "math.inc"
#include "foreach_isa.h"

namespace megalite {

void vector_exp(const float* x, float* y, int64_t size) { MEGALITE_PICK(exp_range)(x, y, size); }
void vector_tanh(const float* x, float* y, int64_t size) { MEGALITE_PICK(tanh_range)(x, y, size); }

}  // namespace megalite
