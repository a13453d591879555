// Atomic operations: they race with plain accesses, never with each other.
#pragma once

#include "intercept.h"

namespace emulate {

template <class T>
uint64_t apply_atomic(int kind, void* address, uint64_t bits, uint64_t expected) {
  T old, value, compare;
  memcpy(&old, address, sizeof(T));
  memcpy(&value, &bits, sizeof(T));
  memcpy(&compare, &expected, sizeof(T));
  const T results[] = {T(old + value), std::max(old, value), std::min(old, value), value, old == compare ? value : old};
  memcpy(address, &results[kind], sizeof(T));
  uint64_t before = 0;
  memcpy(&before, &old, sizeof(T));
  return before;
}

}  // namespace emulate

extern "C" uint64_t emulate_atomic(int kind, char type, void* address, uint64_t bits, uint64_t expected) {
  using namespace emulate;
  check_access(address, type == 'Q' ? 8 : 4, true, true, EMULATE_PC, ATOMIC);
  if (!block_of_shared(address)) order_atomics(address);
  switch (type) {
    case 'i':
      return apply_atomic<int32_t>(kind, address, bits, expected);
    case 'I':
      return apply_atomic<uint32_t>(kind, address, bits, expected);
    case 'Q':
      return apply_atomic<uint64_t>(kind, address, bits, expected);
    default:
      return apply_atomic<float>(kind, address, bits, expected);
  }
}
