// The bits that describe an operand of wgmma in shared memory: arithmetic only, so that the emulator runs this very
// code and test_layouts.py compares its bits with CuTe's.
#pragma once

#include "types.cuh"

namespace ptx {

// `start`: the address in the shared window; only its 18 low bits count (in a cluster the others name the block).
// Offsets in bytes, multiples of 16; swizzle 0, 32, 64 or 128. All are kept in units of 16 bytes: start in bits 0 to
// 13, leading in 16 to 29, stride in 32 to 45; the kind of swizzle is in 62 and 63.
DEVICE uint64_t wgmma_descriptor_bits(uint32_t start, int leading_bytes, int stride_bytes, int swizzle) {
  const uint64_t kind = swizzle == 128 ? 1 : swizzle == 64 ? 2 : swizzle == 32 ? 3 : 0;
  return uint64_t((start & 0x3FFFF) >> 4) | uint64_t((leading_bytes & 0x3FFFF) >> 4) << 16 |
         uint64_t((stride_bytes & 0x3FFFF) >> 4) << 32 | kind << 62;
}

}  // namespace ptx
