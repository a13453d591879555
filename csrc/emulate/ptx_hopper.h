// The emulator's twins of ptx_hopper.cuh: same names, same promises, no assembly. hopper_*.h hold what they call.
#pragma once

#include "../cuda/descriptor.cuh"
#include "../cuda/types.cuh"
#include "ptx_ampere.h"

extern "C" {
void emulate_mbarrier_init(void* barrier, int count);
void emulate_mbarrier_arrive(void* barrier, int bytes);
void emulate_mbarrier_wait(void* barrier, int parity);
void emulate_fence_mbarrier_init();
void emulate_fence_async_shared();

void emulate_tma_load(void* shared, const void* map, void* barrier, int dims, const int* coordinates);
void emulate_tma_store(const void* map, const void* shared, int dims, const int* coordinates);
void emulate_bulk_load(void* shared, const void* global, void* barrier, int bytes);
void emulate_tma_store_commit();
void emulate_tma_store_wait(int groups, bool only_reads);

int emulate_cluster_rank();
int emulate_cluster_size();
void emulate_cluster_sync();
void emulate_cluster_load(void* to, const void* own_shared, int rank, int bytes);

void emulate_register_limit(int registers, bool raise);
void emulate_wgmma_fence();
void emulate_wgmma_commit();
void emulate_wgmma_wait(int groups);
// The shared address, once it and the offsets have been found to be ones that a descriptor can hold.
uint32_t emulate_wgmma_start(const void* shared, int leading_bytes, int stride_bytes);
// `a_registers` is null when A is described by `a`. `d` belongs to the instruction until it is waited for.
void emulate_wgmma(char type, int n, float* d, const uint32_t* a_registers, uint64_t a, uint64_t b, bool accumulate,
                   bool transpose_a, bool transpose_b);
}

namespace ptx {

DEVICE void mbarrier_init(uint64_t* barrier, int count) { emulate_mbarrier_init(barrier, count); }
DEVICE void fence_mbarrier_init() { emulate_fence_mbarrier_init(); }
DEVICE void mbarrier_arrive(uint64_t* barrier) { emulate_mbarrier_arrive(barrier, 0); }
DEVICE void mbarrier_arrive_expect(uint64_t* barrier, int bytes) { emulate_mbarrier_arrive(barrier, bytes); }
DEVICE void mbarrier_wait(uint64_t* barrier, int parity) { emulate_mbarrier_wait(barrier, parity); }
DEVICE void fence_async_shared() { emulate_fence_async_shared(); }

DEVICE void tma_prefetch(const TensorMap*) {}
DEVICE void tma_load_2d(void* shared, const TensorMap* map, uint64_t* barrier, int c0, int c1) {
  const int at[2] = {c0, c1};
  emulate_tma_load(shared, map, barrier, 2, at);
}
DEVICE void tma_load_3d(void* shared, const TensorMap* map, uint64_t* barrier, int c0, int c1, int c2) {
  const int at[3] = {c0, c1, c2};
  emulate_tma_load(shared, map, barrier, 3, at);
}
DEVICE void tma_load_4d(void* shared, const TensorMap* map, uint64_t* barrier, int c0, int c1, int c2, int c3) {
  const int at[4] = {c0, c1, c2, c3};
  emulate_tma_load(shared, map, barrier, 4, at);
}
DEVICE void tma_store_2d(const TensorMap* map, const void* shared, int c0, int c1) {
  const int at[2] = {c0, c1};
  emulate_tma_store(map, shared, 2, at);
}
DEVICE void tma_store_3d(const TensorMap* map, const void* shared, int c0, int c1, int c2) {
  const int at[3] = {c0, c1, c2};
  emulate_tma_store(map, shared, 3, at);
}
DEVICE void tma_store_4d(const TensorMap* map, const void* shared, int c0, int c1, int c2, int c3) {
  const int at[4] = {c0, c1, c2, c3};
  emulate_tma_store(map, shared, 4, at);
}
DEVICE void bulk_load(void* shared, const void* global, uint64_t* barrier, int bytes) {
  emulate_bulk_load(shared, global, barrier, bytes);
}
DEVICE void tma_store_commit() { emulate_tma_store_commit(); }
template <int N>
DEVICE void tma_store_wait() {
  emulate_tma_store_wait(N, false);
}
template <int N>
DEVICE void tma_store_wait_read() {
  emulate_tma_store_wait(N, true);
}

DEVICE int cluster_rank() { return emulate_cluster_rank(); }
DEVICE int cluster_size() { return emulate_cluster_size(); }
DEVICE void cluster_sync() { emulate_cluster_sync(); }
template <class T>
DEVICE T cluster_load(const T* own_shared, int rank) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "cluster_load reads 4 or 8 bytes");
  T value;
  emulate_cluster_load(&value, own_shared, rank, sizeof(T));
  return value;
}

DEVICE void stmatrix_x4_transposed(void* shared, const uint32_t (&r)[4]) {
  const uint32_t give[4] = {r[0], r[1], r[2], r[3]};
  emulate_stmatrix(give, shared, 4, true);
}

template <int N>
DEVICE void register_raise() {
  static_assert(N % 8 == 0 && N >= 24 && N <= 256, "setmaxnreg takes a multiple of 8 from 24 to 256");
  emulate_register_limit(N, true);
}
template <int N>
DEVICE void register_lower() {
  static_assert(N % 8 == 0 && N >= 24 && N <= 256, "setmaxnreg takes a multiple of 8 from 24 to 256");
  emulate_register_limit(N, false);
}

DEVICE void wgmma_fence() { emulate_wgmma_fence(); }
DEVICE void wgmma_commit() { emulate_wgmma_commit(); }
template <int N>
DEVICE void wgmma_wait() {
  static_assert(N >= 0 && N <= 7, "wgmma.wait_group takes 0 to 7");
  emulate_wgmma_wait(N);
}
template <int COUNT>
DEVICE void wgmma_pin(float (&)[COUNT]) {}
DEVICE uint64_t wgmma_descriptor(const void* shared, int leading_bytes, int stride_bytes, int swizzle) {
  const uint32_t start = emulate_wgmma_start(shared, leading_bytes, stride_bytes);
  return wgmma_descriptor_bits(start, leading_bytes, stride_bytes, swizzle);
}

// The accumulator is passed where it stands, unlike other fragments: each access to it is then intercepted, and one
// before wgmma_wait is caught. A's registers are taken at once: what changes them later is another register on a GPU.
template <int N, class T, int TransA = 0, int TransB = 0>
DEVICE void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(N == 64 || N == 128 || N == 192 || N == 256, "wgmma: N is 64, 128, 192 or 256");
  emulate_wgmma(TypeCode<T>::value, N, d, nullptr, a, b, accumulate, TransA != 0, TransB != 0);
}
template <int N, class T, int TransB = 0>
DEVICE void wgmma_ra(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  static_assert(N == 64 || N == 128 || N == 192 || N == 256, "wgmma: N is 64, 128, 192 or 256");
  const uint32_t registers[4] = {a[0], a[1], a[2], a[3]};
  emulate_wgmma(TypeCode<T>::value, N, d, registers, 0, b, accumulate, false, TransB != 0);
}

}  // namespace ptx
