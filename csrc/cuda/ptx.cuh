// All inline assembly of the CUDA kernels: one thin function per instruction, and nothing else.
//
// The emulator (csrc/emulate) replaces this file by twins of the same names; what it runs is therefore everything
// but this file. The fragment layouts named here are those of the PTX ISA, "Warp-level matrix instructions".
#pragma once

#include "types.cuh"

#ifdef MEGALITE_EMULATE
#include "../emulate/ptx_ampere.h"
#if __has_include("../emulate/ptx_hopper.h")
#include "../emulate/ptx_hopper.h"
#endif
#else

namespace ptx {

// A built-in and no instruction: the compiler sees through it, so that an address of shared memory and a constant stay
// one 32-bit register and an immediate.
DEVICE uint32_t shared_address(const void* pointer) { return uint32_t(__cvta_generic_to_shared(pointer)); }

// ---- arithmetic and conversions

// 2^value, relative error below 2^-22.
DEVICE float exp2_approx(float value) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
}

DEVICE float half_to_float(uint16_t bits) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(bits));
  return result;
}

// Two fp32 values rounded to nearest even, `low` in the lower half.
template <class T>
DEVICE uint32_t pack2(float low, float high);

template <>
DEVICE uint32_t pack2<bf16>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

template <>
DEVICE uint32_t pack2<fp16>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// ---- tensor cores (sm_80)

// d[16][8] += a[16][16] b[16][8]. With group = lane / 4 and pair = 2 * (lane % 4):
//   a: rows group (a[0], a[2]) and group + 8 (a[1], a[3]), columns pair (a[0], a[1]) and pair + 8 (a[2], a[3])
//   b: column group, rows pair (b[0]) and pair + 8 (b[1]);  d: rows group (0, 1), group + 8 (2, 3), columns pair, pair
//   + 1
template <class T>
DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

#define MEGALITE_MMA(TYPE, NAME)                                                                  \
  template <>                                                                                     \
  DEVICE void mma_m16n8k16<TYPE>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME                           \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"           \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                 \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));             \
  }
MEGALITE_MMA(bf16, "bf16")
MEGALITE_MMA(fp16, "f16")
#undef MEGALITE_MMA

// ---- ldmatrix: 8 x 8 matrices of 16-bit elements; lane 8 i + r gives the 16-byte-aligned address of row r of matrix
// i. Lane l gets elements 2 (l % 4) and + 1 of row l / 4 of each; transposed: of column l / 4.

DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared))
               : "memory");
}

DEVICE void ldmatrix_x4_transposed(uint32_t (&r)[4], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared))
               : "memory");
}

DEVICE void ldmatrix_x2(uint32_t (&r)[2], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(shared))
               : "memory");
}

DEVICE void ldmatrix_x2_transposed(uint32_t (&r)[2], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(shared))
               : "memory");
}

// ---- cp.async (sm_80): 16 bytes from global to shared memory, past the registers. What the calling thread has copied
// stands there after its cp_async_wait, and for the other threads after a barrier behind that.

// Copies if `valid`, else writes zeros and does not read `global`.
DEVICE void cp_async_16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}

// The same for 8 bytes, where neither side has a better alignment.
DEVICE void cp_async_8(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 8 : 0)
               : "memory");
}

DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most N of this thread's newest groups are under way.
template <int N>
DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// ---- named barriers: id 1 to 15 (0 is __syncthreads), `threads` a multiple of 32 that counts both kinds of arrival

DEVICE void named_barrier_sync(int id, int threads) {
  asm volatile("barrier.cta.sync.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

DEVICE void named_barrier_arrive(int id, int threads) {
  asm volatile("barrier.cta.arrive.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace ptx

#include "ptx_hopper.cuh"

#endif
