// Which instruction set the kernels run on.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "common.h"

#if MEGALITE_AMX && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace megalite {

namespace {

struct Level {
  const char* name;
  Isa vectors;
  PairUnit pairs;
};

// Rising; what a level needs, those above it need too. amx_emulated is for tests and runs anywhere.
constexpr Level kLevels[] = {
    {"scalar", Isa::scalar, PairUnit::none},  {"avx2", Isa::avx2, PairUnit::none},
    {"avx512", Isa::avx512, PairUnit::none},  {"avx512_bf16", Isa::avx512_bf16, PairUnit::avx512_bf16},
    {"amx", Isa::avx512_bf16, PairUnit::amx}, {"amx_emulated", Isa::scalar, PairUnit::amx_emulated},
};
constexpr int kAmx = 4, kEmulated = 5;

// Linux gives the tile registers to a process that asks: arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA).
bool tiles_granted() {
#if MEGALITE_AMX && defined(__linux__)
  return __builtin_cpu_supports("amx-bf16") && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
  return false;
#endif
}

// The highest level of this CPU. Forcing a lower one asks for the tiles too, which costs nothing.
int best_here() {
#if MEGALITE_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    if (!__builtin_cpu_supports("avx512bf16")) return 2;
    return tiles_granted() ? kAmx : kAmx - 1;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) return 1;
#endif
  return 0;
}

Level pick() {
  const int best = best_here();
  const char* forced = std::getenv("MEGALITE_ISA");
  if (forced == nullptr || *forced == '\0') return kLevels[best];
  for (int i = 0; i <= kEmulated; ++i) {
    if (std::string(forced) != kLevels[i].name) continue;
    if (i > best && i != kEmulated)
      throw std::invalid_argument(std::string("MEGALITE_ISA=") + forced +
                                  " is more than this CPU or build has: " + "use at most " + kLevels[best].name);
    return kLevels[i];
  }
  throw std::invalid_argument(std::string("MEGALITE_ISA=") + forced +
                              " is not known: use scalar, avx2, avx512, avx512_bf16, amx or amx_emulated");
}

const Level& level() {
  static const Level chosen = pick();
  return chosen;
}

}  // namespace

Isa isa() { return level().vectors; }

PairUnit pair_unit() { return level().pairs; }

const char* isa_name() { return level().name; }

}  // namespace megalite
