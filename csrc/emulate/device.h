// What a kernel sees when g++ compiles it: CUDA's keywords and built-ins, as calls into the emulator's runtime.
//
// The kernel's file is compiled with -fsanitize=thread, so that each of its loads and stores calls the runtime
// (intercept.h); the runtime itself is not. Nothing here may therefore touch the runtime's memory directly.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
#define __cluster_dims__(...)

struct uint3 {
  uint32_t x, y, z;
};
struct dim3 {
  uint32_t x, y, z;
};

extern "C" {
// `const`: within one call of the kernel they never change.
uint3 emulate_thread_index() __attribute__((const));
uint3 emulate_block_index() __attribute__((const));
uint3 emulate_block_size() __attribute__((const));
uint3 emulate_grid_size() __attribute__((const));
unsigned char* emulate_shared_memory() __attribute__((const));

enum EmulateShuffle { EMULATE_INDEX, EMULATE_XOR, EMULATE_UP, EMULATE_DOWN };
uint64_t emulate_shuffle(EmulateShuffle kind, uint32_t mask, uint64_t bits, int operand, int width);
uint32_t emulate_ballot(uint32_t mask, int predicate);
void emulate_syncwarp(uint32_t mask);
// Returns how many threads gave a nonzero predicate.
int emulate_syncthreads(int line, int predicate);
void emulate_fence();

// One access of `bytes` that must be aligned to them.
void emulate_load_bytes(void* to, const void* from, int bytes);
void emulate_store_bytes(void* to, const void* from, int bytes);
enum EmulateAtomic { EMULATE_ADD, EMULATE_MAX, EMULATE_MIN, EMULATE_EXCHANGE, EMULATE_COMPARE };
uint64_t emulate_atomic(EmulateAtomic kind, char type, void* address, uint64_t bits, uint64_t expected);

// Copies that the compiler makes by a call are checked too.
void* memcpy(void*, const void*, size_t) __asm__("emulate_memcpy");
void* memmove(void*, const void*, size_t) __asm__("emulate_memcpy");
void* memset(void*, int, size_t) __asm__("emulate_memset");
}

#define threadIdx (emulate_thread_index())
#define blockIdx (emulate_block_index())
#define blockDim (emulate_block_size())
#define gridDim (emulate_grid_size())
#define warpSize 32

#define EMULATE_INLINE inline __attribute__((always_inline))

template <class To, class From>
EMULATE_INLINE To emulate_bits(From value) {
  static_assert(sizeof(To) == sizeof(From) || sizeof(To) == 8, "bits of another size");
  To result{};
  __builtin_memcpy(&result, &value, sizeof(From) < sizeof(To) ? sizeof(From) : sizeof(To));
  return result;
}

template <class To>
EMULATE_INLINE To emulate_narrow(uint64_t bits) {
  To result;
  __builtin_memcpy(&result, &bits, sizeof(To));
  return result;
}

template <class V>
EMULATE_INLINE V emulate_load(const void* pointer) {
  V result;
  emulate_load_bytes(&result, pointer, sizeof(V));
  return result;
}

template <class V>
EMULATE_INLINE void emulate_store(void* pointer, V value) {
  emulate_store_bytes(pointer, &value, sizeof(V));
}

// ---- warps and blocks

template <class T>
EMULATE_INLINE T __shfl_sync(uint32_t mask, T value, int lane, int width = 32) {
  return emulate_narrow<T>(emulate_shuffle(EMULATE_INDEX, mask, emulate_bits<uint64_t>(value), lane, width));
}
template <class T>
EMULATE_INLINE T __shfl_xor_sync(uint32_t mask, T value, int distance, int width = 32) {
  return emulate_narrow<T>(emulate_shuffle(EMULATE_XOR, mask, emulate_bits<uint64_t>(value), distance, width));
}
template <class T>
EMULATE_INLINE T __shfl_up_sync(uint32_t mask, T value, int distance, int width = 32) {
  return emulate_narrow<T>(emulate_shuffle(EMULATE_UP, mask, emulate_bits<uint64_t>(value), distance, width));
}
template <class T>
EMULATE_INLINE T __shfl_down_sync(uint32_t mask, T value, int distance, int width = 32) {
  return emulate_narrow<T>(emulate_shuffle(EMULATE_DOWN, mask, emulate_bits<uint64_t>(value), distance, width));
}
EMULATE_INLINE uint32_t __ballot_sync(uint32_t mask, int predicate) { return emulate_ballot(mask, predicate); }
EMULATE_INLINE int __any_sync(uint32_t mask, int predicate) { return emulate_ballot(mask, predicate) != 0; }
EMULATE_INLINE int __all_sync(uint32_t mask, int predicate) { return emulate_ballot(mask, predicate) == mask; }
EMULATE_INLINE void __syncwarp(uint32_t mask = 0xffffffffu) { emulate_syncwarp(mask); }
// The line tells barriers apart: threads that stand at different ones have diverged.
EMULATE_INLINE void __syncthreads(int line = __builtin_LINE()) { emulate_syncthreads(line, 0); }
EMULATE_INLINE int __syncthreads_count(int predicate, int line = __builtin_LINE()) {
  return emulate_syncthreads(line, predicate);
}
EMULATE_INLINE int __syncthreads_or(int predicate, int line = __builtin_LINE()) {
  return emulate_syncthreads(line, predicate) != 0;
}
EMULATE_INLINE void __threadfence() { emulate_fence(); }
EMULATE_INLINE void __threadfence_block() { emulate_fence(); }

// ---- atomics, by the letters of Python's struct

EMULATE_INLINE int atomicAdd(int* p, int v) { return int(emulate_atomic(EMULATE_ADD, 'i', p, uint32_t(v), 0)); }
EMULATE_INLINE uint32_t atomicAdd(uint32_t* p, uint32_t v) {
  return uint32_t(emulate_atomic(EMULATE_ADD, 'I', p, v, 0));
}
EMULATE_INLINE unsigned long long atomicAdd(unsigned long long* p, unsigned long long v) {
  return emulate_atomic(EMULATE_ADD, 'Q', p, v, 0);
}
EMULATE_INLINE float atomicAdd(float* p, float v) {
  return emulate_narrow<float>(emulate_atomic(EMULATE_ADD, 'f', p, emulate_bits<uint64_t>(v), 0));
}
EMULATE_INLINE int atomicMax(int* p, int v) { return int(emulate_atomic(EMULATE_MAX, 'i', p, uint32_t(v), 0)); }
EMULATE_INLINE int atomicMin(int* p, int v) { return int(emulate_atomic(EMULATE_MIN, 'i', p, uint32_t(v), 0)); }
EMULATE_INLINE int atomicExch(int* p, int v) { return int(emulate_atomic(EMULATE_EXCHANGE, 'i', p, uint32_t(v), 0)); }
EMULATE_INLINE uint32_t atomicExch(uint32_t* p, uint32_t v) {
  return uint32_t(emulate_atomic(EMULATE_EXCHANGE, 'I', p, v, 0));
}
EMULATE_INLINE int atomicCAS(int* p, int expected, int v) {
  return int(emulate_atomic(EMULATE_COMPARE, 'i', p, uint32_t(v), uint32_t(expected)));
}

// ---- numbers

template <class T>
EMULATE_INLINE T __ldg(const T* pointer) {
  return emulate_load<T>(pointer);
}
EMULATE_INLINE float rsqrtf(float value) { return 1.0f / sqrtf(value); }
EMULATE_INLINE float __expf(float value) { return expf(value); }
EMULATE_INLINE float __logf(float value) { return logf(value); }
EMULATE_INLINE float __fdividef(float a, float b) { return a / b; }
EMULATE_INLINE float __frcp_rn(float value) { return 1.0f / value; }
EMULATE_INLINE float __uint_as_float(uint32_t bits) { return emulate_bits<float>(bits); }
EMULATE_INLINE uint32_t __float_as_uint(float value) { return emulate_bits<uint32_t>(value); }
EMULATE_INLINE float __int_as_float(int bits) { return emulate_bits<float>(bits); }
EMULATE_INLINE int __float_as_int(float value) { return emulate_bits<int>(value); }
EMULATE_INLINE int __popc(uint32_t value) { return __builtin_popcount(value); }
EMULATE_INLINE int __ffs(int value) { return __builtin_ffs(value); }
EMULATE_INLINE int __clz(int value) { return value == 0 ? 32 : __builtin_clz(uint32_t(value)); }
EMULATE_INLINE void __trap() { __builtin_trap(); }

#define EMULATE_MIN_MAX(T)                                           \
  EMULATE_INLINE constexpr T min(T a, T b) { return b < a ? b : a; } \
  EMULATE_INLINE constexpr T max(T a, T b) { return a < b ? b : a; }
EMULATE_MIN_MAX(int)
EMULATE_MIN_MAX(uint32_t)
EMULATE_MIN_MAX(int64_t)
EMULATE_MIN_MAX(uint64_t)
#undef EMULATE_MIN_MAX
EMULATE_INLINE float min(float a, float b) { return fminf(a, b); }
EMULATE_INLINE float max(float a, float b) { return fmaxf(a, b); }
