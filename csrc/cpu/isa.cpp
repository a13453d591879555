// Which instruction set the kernels run on.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "common.h"

namespace megalite {

namespace {

Isa best_here() {
#if MEGALITE_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return __builtin_cpu_supports("avx512bf16") ? Isa::avx512_bf16 : Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    return Isa::avx2;
#endif
  return Isa::scalar;
}

constexpr const char* kNames[] = {"scalar", "avx2", "avx512", "avx512_bf16"};

Isa pick() {
  const Isa best = best_here();
  const char* forced = std::getenv("MEGALITE_ISA");
  if (forced == nullptr || *forced == '\0') return best;
  for (int i = 0; i < 4; ++i) {
    if (std::string(forced) != kNames[i]) continue;
    if (i > static_cast<int>(best))
      throw std::invalid_argument(std::string("MEGALITE_ISA=") + forced + " is more than this CPU or build has: " +
                                  "use at most " + kNames[static_cast<int>(best)]);
    return static_cast<Isa>(i);
  }
  throw std::invalid_argument(std::string("MEGALITE_ISA=") + forced +
                              " is not known: use scalar, avx2, avx512 or avx512_bf16");
}

}  // namespace

Isa isa() {
  static const Isa chosen = pick();
  return chosen;
}

const char* isa_name() { return kNames[static_cast<int>(isa())]; }

}  // namespace megalite
