// The emulator's twins of what ptx.cuh has for sm_80: same names, same promises, no assembly.
//
// Fragments are copied to a local array around each call: an array of the kernel whose address the runtime knew
// could no longer stay in registers, and each access to it would be intercepted.
#pragma once

#include "../cuda/types.cuh"

extern "C" {
void emulate_mma_m16n8k16(char type, float* d, const uint32_t* a, const uint32_t* b);
void emulate_ldmatrix(uint32_t* registers, const void* shared, int matrices, bool transposed);
void emulate_stmatrix(const uint32_t* registers, void* shared, int matrices, bool transposed);
void emulate_cp_async(void* shared, const void* global, int bytes, bool valid);
void emulate_cp_async_commit();
void emulate_cp_async_wait(int groups);
void emulate_named_barrier(int id, int threads, bool wait);
uint16_t emulate_float_to_half(float value) __attribute__((const));
float emulate_half_to_float(uint16_t bits) __attribute__((const));
}

namespace ptx {

// 'b' for bf16, 'h' for fp16: how the runtime is told the type of a matrix's elements.
template <class T>
struct TypeCode;
template <>
struct TypeCode<bf16> {
  static constexpr char value = 'b';
};
template <>
struct TypeCode<fp16> {
  static constexpr char value = 'h';
};

DEVICE float exp2_approx(float value) { return value < -126.0f ? 0.0f : exp2f(value); }  // subnormals are flushed
DEVICE float half_to_float(uint16_t bits) { return emulate_half_to_float(bits); }

DEVICE uint32_t round_to_bf16(float value) {
  uint32_t bits = __float_as_uint(value);
  if (value != value) return 0x7fff;  // what cvt.rn.bf16 gives for every NaN
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

template <class T>
DEVICE uint32_t pack2(float low, float high);
template <>
DEVICE uint32_t pack2<bf16>(float low, float high) {
  return round_to_bf16(low) | round_to_bf16(high) << 16;
}
template <>
DEVICE uint32_t pack2<fp16>(float low, float high) {
  return emulate_float_to_half(low) | uint32_t(emulate_float_to_half(high)) << 16;
}

template <class T>
DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  float sums[4] = {d[0], d[1], d[2], d[3]};
  const uint32_t rows[4] = {a[0], a[1], a[2], a[3]}, columns[2] = {b[0], b[1]};
  emulate_mma_m16n8k16(TypeCode<T>::value, sums, rows, columns);
  d[0] = sums[0], d[1] = sums[1], d[2] = sums[2], d[3] = sums[3];
}

DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* shared) {
  uint32_t got[4];
  emulate_ldmatrix(got, shared, 4, false);
  r[0] = got[0], r[1] = got[1], r[2] = got[2], r[3] = got[3];
}

DEVICE void ldmatrix_x4_transposed(uint32_t (&r)[4], const void* shared) {
  uint32_t got[4];
  emulate_ldmatrix(got, shared, 4, true);
  r[0] = got[0], r[1] = got[1], r[2] = got[2], r[3] = got[3];
}

DEVICE void ldmatrix_x2(uint32_t (&r)[2], const void* shared) {
  uint32_t got[2];
  emulate_ldmatrix(got, shared, 2, false);
  r[0] = got[0], r[1] = got[1];
}

DEVICE void ldmatrix_x2_transposed(uint32_t (&r)[2], const void* shared) {
  uint32_t got[2];
  emulate_ldmatrix(got, shared, 2, true);
  r[0] = got[0], r[1] = got[1];
}

DEVICE void stmatrix_x4(void* shared, const uint32_t (&r)[4]) {
  const uint32_t give[4] = {r[0], r[1], r[2], r[3]};
  emulate_stmatrix(give, shared, 4, false);
}

DEVICE void cp_async_16(void* shared, const void* global, bool valid) { emulate_cp_async(shared, global, 16, valid); }
DEVICE void cp_async_8(void* shared, const void* global, bool valid) { emulate_cp_async(shared, global, 8, valid); }
DEVICE void cp_async_commit() { emulate_cp_async_commit(); }
template <int N>
DEVICE void cp_async_wait() {
  emulate_cp_async_wait(N);
}

DEVICE void named_barrier_sync(int id, int threads) { emulate_named_barrier(id, threads, true); }
DEVICE void named_barrier_arrive(int id, int threads) { emulate_named_barrier(id, threads, false); }

}  // namespace ptx
