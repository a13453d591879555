// What every CPU kernel file shares: the 16-bit types, the static partition over threads, and the choice of instruction
// set.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

// One binary for any x86-64: kernels are compiled once per instruction set by target pragmas, which clang lacks.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define MEGALITE_X86 1
#include <immintrin.h>
#else
#define MEGALITE_X86 0
#endif

// The first GCC with which the matrix tiles were built.
#define MEGALITE_AMX (MEGALITE_X86 && __GNUC__ >= 12)

#include "api.h"

// GCC 12 warns about its own AVX-512 headers (undefined pass-through operands, bug 105593).
#if MEGALITE_X86
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

namespace megalite {

struct bf16 {
  uint16_t bits;
};

struct fp16 {
  uint16_t bits;
};

enum class Isa { scalar, avx2, avx512, avx512_bf16 };
Isa isa();

// What attention multiplies pairs of bf16 with, beside the vectors of `isa`.
enum class PairUnit { none, avx512_bf16, amx, amx_emulated };
PairUnit pair_unit();

inline int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }
inline int64_t round_up(int64_t n, int64_t to) { return divide_up(n, to) * to; }

// Below this many elements per thread, waking one costs more than it saves (about 5 us at a few bytes a cycle).
constexpr int64_t kMinElementsPerThread = 16384;

inline int parts_for(int64_t elements, int threads) {
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, elements / kMinElementsPerThread)));
}

// Calls body(part, begin, end) for each of `parts` contiguous ranges of [0, items). The ranges depend on `parts`
// alone, not on how many threads OpenMP grants, so sums over them have the same bits on every run.
template <class Body>
void parallel_ranges(int parts, int64_t items, const Body& body) {
  const auto range = [&](int64_t part) {
    body(static_cast<int>(part), items * part / parts, items * (part + 1) / parts);
  };
  if (parts == 1) return range(0);
#ifdef _OPENMP
#pragma omp parallel for schedule(static) num_threads(parts)
#endif
  for (int part = 0; part < parts; ++part) range(part);
}

// Sums over rows, kept apart per part and added in the order of the parts. Each part has a total and a block that
// kernels add to first (two levels keep the rounding of long float sums down).
class Partials {
 public:
  Partials(int parts, int sums, int64_t cols)
      : parts_(parts), sums_(sums), cols_(cols), data_(2 * parts * sums * cols) {}

  float* total(int part, int which) { return data_.data() + (2 * (part * sums_ + which)) * cols_; }
  float* block(int part, int which) { return total(part, which) + cols_; }

  void sum(int which, float* out) {
    std::copy_n(total(0, which), cols_, out);
    for (int part = 1; part < parts_; ++part) {
      const float* from = total(part, which);
      for (int64_t c = 0; c < cols_; ++c) out[c] += from[c];
    }
  }

 private:
  int parts_, sums_;
  int64_t cols_;
  std::vector<float> data_;
};

}  // namespace megalite

// The instance of a kernel for the instruction set in use.
#if MEGALITE_X86
#define MEGALITE_PICK(...)                              \
  (isa() == Isa::avx512_bf16 ? avx512_bf16::__VA_ARGS__ \
   : isa() == Isa::avx512    ? avx512::__VA_ARGS__      \
   : isa() == Isa::avx2      ? avx2::__VA_ARGS__        \
                             : scalar::__VA_ARGS__)
#else
#define MEGALITE_PICK(...) (isa(), scalar::__VA_ARGS__)
#endif

// Runs `...` with T being the C++ type of a DType.
#define MEGALITE_WITH_TYPE(dtype, ...)      \
  do {                                      \
    if ((dtype) == DType::bfloat16) {       \
      using T = bf16;                       \
      __VA_ARGS__                           \
    } else if ((dtype) == DType::float16) { \
      using T = fp16;                       \
      __VA_ARGS__                           \
    } else {                                \
      using T = float;                      \
      __VA_ARGS__                           \
    }                                       \
  } while (0)
