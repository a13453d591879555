// Compiles the file MEGALITE_KERNELS once per instruction set, each in its own namespace. Include common.h before:
// standard headers must not be seen first under a target pragma, or their inline functions would be shared by all.
namespace megalite::scalar {
#define ISA_NAMESPACE scalar
#define LANES 4
#include "vec.inc"
#include MEGALITE_KERNELS
#undef LANES
#undef ISA_NAMESPACE
}  // namespace megalite::scalar

#if MEGALITE_X86
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
namespace megalite::avx2 {
#define ISA_NAMESPACE avx2
#define LANES 8
#include "vec.inc"
#include MEGALITE_KERNELS
#undef LANES
#undef ISA_NAMESPACE
}  // namespace megalite::avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
namespace megalite::avx512 {
#define ISA_NAMESPACE avx512
#define LANES 16
#include "vec.inc"
#include MEGALITE_KERNELS
#undef LANES
#undef ISA_NAMESPACE
}  // namespace megalite::avx512
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")
namespace megalite::avx512_bf16 {
#define ISA_NAMESPACE avx512_bf16
#define LANES 16
#define MEGALITE_VECTOR_BF16 1
#include "vec.inc"
#include MEGALITE_KERNELS
#undef MEGALITE_VECTOR_BF16
#undef LANES
#undef ISA_NAMESPACE
}  // namespace megalite::avx512_bf16
#pragma GCC pop_options
#endif
