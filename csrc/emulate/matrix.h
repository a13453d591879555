// The warp's matrix instructions: mma.sync, ldmatrix, stmatrix, by the fragment layouts of the PTX ISA.
#pragma once

#include <math.h>

#include "collectives.h"
#include "intercept.h"

namespace emulate {

inline float half_to_float(uint16_t bits) {
  const uint32_t sign = uint32_t(bits & 0x8000) << 16;
  const int exponent = bits >> 10 & 31;
  const uint32_t fraction = bits & 1023;
  float value;
  if (exponent == 31) {
    const uint32_t special = sign | 0x7f800000 | fraction << 13;
    memcpy(&value, &special, 4);
    return value;
  }
  value = exponent == 0 ? ldexpf(float(fraction), -24) : ldexpf(float(fraction | 1024), exponent - 25);
  return sign ? -value : value;
}

inline uint16_t float_to_half(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  const uint16_t sign = bits >> 16 & 0x8000;
  const float size = fabsf(value);
  if (size != size) return 0x7fff;  // what cvt.rn.f16 gives for every NaN
  if (size >= 65520.0f) return sign | 0x7c00;
  if (size == 0) return sign;
  int exponent;
  frexpf(size, &exponent);
  // The distance of halves around this value; nearbyint rounds halfway cases to even.
  const int step = std::max(exponent - 11, -24);
  const float units = nearbyintf(ldexpf(size, -step));
  if (step == -24 && units < 1024) return sign | uint16_t(units);
  if (units == 2048) return sign | uint16_t((step + 26) << 10);
  return sign | uint16_t((step + 25) << 10) | uint16_t(units - 1024);
}

inline float element(char type, uint32_t pair, int high) {
  const uint16_t bits = high ? pair >> 16 : pair & 0xffff;
  if (type == 'h') {
    static float* table = nullptr;
    if (!table) {
      table = new float[65536];
      for (int i = 0; i < 65536; i++) table[i] = half_to_float(i);
    }
    return table[bits];
  }
  const uint32_t wide = uint32_t(bits) << 16;
  float value;
  memcpy(&value, &wide, 4);
  return value;
}

struct Mma {
  float* d;
  const uint32_t *a, *b;
  char type;
};

inline void act_mma(Fiber* warp, uint32_t) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < LANES; lane++) {
    const Mma& mma = payload_of<Mma>(warp, lane);
    const int group = lane / 4, pair = lane % 4 * 2;
    for (int high = 0; high < 2; high++) {
      for (int r = 0; r < 4; r++) a[group + r % 2 * 8][pair + r / 2 * 8 + high] = element(mma.type, mma.a[r], high);
      for (int r = 0; r < 2; r++) b[pair + r * 8 + high][group] = element(mma.type, mma.b[r], high);
    }
  }
  for (int lane = 0; lane < LANES; lane++) {
    float* d = payload_of<Mma>(warp, lane).d;
    for (int i = 0; i < 4; i++) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      float sum = 0;
      for (int k = 0; k < 16; k++) sum += a[row][k] * b[k][column];
      d[i] += sum;
    }
  }
}

struct Matrices {
  uint32_t* registers;
  unsigned char* shared;
  int count;
  bool transposed;
  uintptr_t pc;
};

// Checks the row addresses, as accesses of the lanes that gave them; false once the launch has failed.
inline bool check_rows(Fiber* warp, bool write) {
  const Matrices& first = payload_of<Matrices>(warp, 0);
  uint32_t offsets[LANES];
  int lanes[LANES];
  for (int lane = 0; lane < first.count * 8; lane++) {
    const Matrices& mine = payload_of<Matrices>(warp, lane);
    Block& block = *warp->block;
    const size_t offset = mine.shared - block.shared;
    if (offset + 16 > state.launch->shared_bytes || offset % 16) {
      fail("%s: lane %d gives the address of byte %ld of shared memory, which has %u: rows are 16 bytes, aligned to 16",
           warp->wait.what, lane, long(offset), state.launch->shared_bytes);
      return false;
    }
    if (write) {
      shadow_write(block, warp[lane].agent, offset, 16, mine.pc);
    } else {
      shadow_read(block, warp[lane].agent, offset, 16, mine.pc);
    }
    offsets[lane] = uint32_t(offset), lanes[lane] = lane;
  }
  count_access(offsets, lanes, first.count * 8, 16);
  return true;
}

// The address of element (lane's row or column, +k) of matrix i, by the row addresses that lanes 8 i to 8 i + 7 gave.
inline unsigned char* matrix_element(Fiber* warp, int i, int lane, int k, bool transposed) {
  const int group = lane / 4, within = lane % 4 * 2 + k;
  const int row = transposed ? within : group, column = transposed ? group : within;
  return payload_of<Matrices>(warp, 8 * i + row).shared + 2 * column;
}

inline void act_ldmatrix(Fiber* warp, uint32_t) {
  if (!check_rows(warp, false)) return;
  for (int lane = 0; lane < LANES; lane++) {
    const Matrices& mine = payload_of<Matrices>(warp, lane);
    for (int i = 0; i < mine.count; i++) {
      uint16_t pair[2];
      for (int k = 0; k < 2; k++) memcpy(&pair[k], matrix_element(warp, i, lane, k, mine.transposed), 2);
      memcpy(&mine.registers[i], pair, 4);
    }
  }
}

inline void act_stmatrix(Fiber* warp, uint32_t) {
  if (!check_rows(warp, true)) return;
  for (int lane = 0; lane < LANES; lane++) {
    const Matrices& mine = payload_of<Matrices>(warp, lane);
    for (int i = 0; i < mine.count; i++) {
      uint16_t pair[2];
      memcpy(pair, &mine.registers[i], 4);
      for (int k = 0; k < 2; k++) memcpy(matrix_element(warp, i, lane, k, mine.transposed), &pair[k], 2);
    }
  }
}

}  // namespace emulate

extern "C" {
void emulate_mma_m16n8k16(char type, float* d, const uint32_t* a, const uint32_t* b) {
  emulate::Mma mma{d, a, b, type};
  emulate::collective("mma_m16n8k16", 0xffffffffu, &mma, emulate::act_mma, EMULATE_PC);
}

void emulate_ldmatrix(uint32_t* registers, const void* shared, int matrices, bool transposed) {
  unsigned char* address = static_cast<unsigned char*>(const_cast<void*>(shared));
  emulate::Matrices mine{registers, address, matrices, transposed, EMULATE_PC};
  emulate::collective("ldmatrix", 0xffffffffu, &mine, emulate::act_ldmatrix, EMULATE_PC);
}

void emulate_stmatrix(const uint32_t* registers, void* shared, int matrices, bool transposed) {
  emulate::Matrices mine{const_cast<uint32_t*>(registers), static_cast<unsigned char*>(shared), matrices, transposed,
                         EMULATE_PC};
  emulate::collective("stmatrix", 0xffffffffu, &mine, emulate::act_stmatrix, EMULATE_PC);
}

uint16_t emulate_float_to_half(float value) { return emulate::float_to_half(value); }
float emulate_half_to_float(uint16_t bits) { return emulate::half_to_float(bits); }
}
