// One instruction a kernel: fragments go in and come out as they are, so that test_layouts.py can compare each map with
// CuTe's. Grid: one block; THREADS of one warp (or, for wgmma, of one warp group).
#pragma once
#include "ptx.cuh"

// a [32, 4], b [32, 2], d [32, 4]: the registers of every lane.
#if defined(KERNEL_mma_fragments)
extern "C" __global__ void __launch_bounds__(THREADS) mma_fragments(const uint32_t* a, const uint32_t* b, float* d) {
  const int lane = threadIdx.x;
  const uint32_t a_registers[4] = {a[lane * 4], a[lane * 4 + 1], a[lane * 4 + 2], a[lane * 4 + 3]};
  const uint32_t b_registers[2] = {b[lane * 2], b[lane * 2 + 1]};
  float sums[4] = {0, 0, 0, 0};
  ptx::mma_m16n8k16<ELEMENT>(sums, a_registers, b_registers);
  for (int i = 0; i < 4; ++i) d[lane * 4 + i] = sums[i];
}
#endif

// rows [32, 16 bytes] in, r [32, 4] out; lane l gives the address of row l.
#if defined(KERNEL_ldmatrix_fragments)
extern "C" __global__ void __launch_bounds__(THREADS) ldmatrix_fragments(const uint32_t* rows, uint32_t* r) {
  SHARED_MEMORY(memory);
  uint32_t* shared = reinterpret_cast<uint32_t*>(memory);
  const int lane = threadIdx.x;
  for (int i = 0; i < 4; ++i) shared[lane * 4 + i] = rows[lane * 4 + i];
  __syncwarp();
  uint32_t got[4];
  if (TRANSPOSED) {
    ptx::ldmatrix_x4_transposed(got, memory + lane * 16);
  } else {
    ptx::ldmatrix_x4(got, memory + lane * 16);
  }
  for (int i = 0; i < 4; ++i) r[lane * 4 + i] = got[i];
}
#endif

// r [32, 4] in, rows [32, 16 bytes] out.
#if defined(KERNEL_stmatrix_fragments)
extern "C" __global__ void __launch_bounds__(THREADS) stmatrix_fragments(const uint32_t* r, uint32_t* rows) {
  SHARED_MEMORY(memory);
  const uint32_t* shared = reinterpret_cast<const uint32_t*>(memory);
  const int lane = threadIdx.x;
  const uint32_t give[4] = {r[lane * 4], r[lane * 4 + 1], r[lane * 4 + 2], r[lane * 4 + 3]};
  if (TRANSPOSED) {
    ptx::stmatrix_x4_transposed(memory + lane * 16, give);
  } else {
    ptx::stmatrix_x4(memory + lane * 16, give);
  }
  __syncwarp();
  for (int i = 0; i < 4; ++i) rows[lane * 4 + i] = shared[lane * 4 + i];
}
#endif

// Images of shared memory of `a_words` and `b_words` 4-byte words, and descriptors whose start addresses count from
// each image's begin: d [128, COLUMNS / 2] = A B over `steps` steps of K, the descriptors of step i at
// a_descriptors[i].
#if defined(KERNEL_wgmma_shared)
extern "C" __global__ void __launch_bounds__(THREADS)
    wgmma_shared(const uint32_t* a, int64_t a_words, const uint64_t* a_descriptors, const uint32_t* b, int64_t b_words,
                 const uint64_t* b_descriptors, int64_t steps, float* d) {
  SHARED_MEMORY(memory);
  uint32_t* shared = reinterpret_cast<uint32_t*>(memory);
  for (int64_t i = threadIdx.x; i < a_words; i += THREADS) shared[i] = a[i];
  for (int64_t i = threadIdx.x; i < b_words; i += THREADS) shared[a_words + i] = b[i];
  ptx::fence_async_shared();
  __syncthreads();
  const uint64_t a_start = ptx::wgmma_descriptor(memory, 0, 0, 0);
  const uint64_t b_start = ptx::wgmma_descriptor(memory + a_words * 4, 0, 0, 0);
  float sums[COLUMNS / 2];
  ptx::wgmma_fence();
  for (int64_t i = 0; i < steps; ++i) {
    ptx::wgmma<COLUMNS, ELEMENT, TRANS_A, TRANS_B>(sums, a_start + a_descriptors[i], b_start + b_descriptors[i], i > 0);
  }
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  for (int i = 0; i < COLUMNS / 2; ++i) d[threadIdx.x * (COLUMNS / 2) + i] = sums[i];
}
#endif

// The same with A [128, 4] in registers, for one step.
#if defined(KERNEL_wgmma_registers)
extern "C" __global__ void __launch_bounds__(THREADS)
    wgmma_registers(const uint32_t* a, const uint32_t* b, int64_t b_words, const uint64_t* b_descriptors, float* d) {
  SHARED_MEMORY(memory);
  uint32_t* shared = reinterpret_cast<uint32_t*>(memory);
  for (int64_t i = threadIdx.x; i < b_words; i += THREADS) shared[i] = b[i];
  ptx::fence_async_shared();
  __syncthreads();
  const uint32_t registers[4] = {a[threadIdx.x * 4], a[threadIdx.x * 4 + 1], a[threadIdx.x * 4 + 2],
                                 a[threadIdx.x * 4 + 3]};
  float sums[COLUMNS / 2];
  ptx::wgmma_fence();
  ptx::wgmma_ra<COLUMNS, ELEMENT, TRANS_B>(sums, registers, ptx::wgmma_descriptor(memory, 0, 0, 0) + b_descriptors[0],
                                           false);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  for (int i = 0; i < COLUMNS / 2; ++i) d[threadIdx.x * (COLUMNS / 2) + i] = sums[i];
}
#endif

// The descriptor that kernels build, for comparison with CuTe's bits (its start address counts from shared memory's).
#if defined(KERNEL_descriptor_bits)
extern "C" __global__ void __launch_bounds__(THREADS)
    descriptor_bits(int64_t offset, int64_t leading, int64_t stride, int64_t swizzle, uint64_t* bits) {
  SHARED_MEMORY(memory);
  if (threadIdx.x == 0) {
    const uint64_t start = ptx::wgmma_descriptor(memory, 0, 0, 0);
    *bits = ptx::wgmma_descriptor(memory + offset, static_cast<int>(leading), static_cast<int>(stride),
                                  static_cast<int>(swizzle)) -
            start;
  }
}
#endif

// What one TMA box load leaves in shared memory, `words` 4-byte words of it, and the box stored again through `target`.
#if defined(KERNEL_tma_image)
extern "C" __global__ void __launch_bounds__(THREADS)
    tma_image(const __grid_constant__ TensorMap source, const __grid_constant__ TensorMap target, int64_t c0,
              int64_t c1, int64_t words, uint32_t* image) {
  SHARED_MEMORY(memory);
  const uint32_t* shared = reinterpret_cast<const uint32_t*>(memory);
  uint64_t* barrier = reinterpret_cast<uint64_t*>(memory + words * 4);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect(barrier, static_cast<int>(words * 4));
    ptx::tma_load_2d(memory, &source, barrier, static_cast<int>(c0), static_cast<int>(c1));
  }
  __syncthreads();
  ptx::mbarrier_wait(barrier, 0);
  for (int64_t i = threadIdx.x; i < words; i += THREADS) image[i] = shared[i];
  if (threadIdx.x == 0) {
    ptx::tma_store_2d(&target, memory, static_cast<int>(c0), static_cast<int>(c1));
    ptx::tma_store_commit();
    ptx::tma_store_wait<0>();
  }
}
#endif
