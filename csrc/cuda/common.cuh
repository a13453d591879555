// What every kernel here builds on: conversions, vector loads and stores, reductions. Needs no toolkit header.
#pragma once

#include "ptx.cuh"
#include "types.cuh"

constexpr uint32_t WHOLE_WARP = 0xffffffffu;

template <class I>
DEVICE constexpr I ceil_div(I count, I size) {
  return (count + size - 1) / size;
}

DEVICE int lane_index() { return int(threadIdx.x) & 31; }
DEVICE int warp_index() { return int(threadIdx.x) >> 5; }

// ---- conversions: everything is computed in fp32, and rounded once, to nearest even

DEVICE float to_float(float value) { return value; }
DEVICE float to_float(bf16 value) { return __uint_as_float(uint32_t(value.bits) << 16); }
DEVICE float to_float(fp16 value) { return ptx::half_to_float(value.bits); }

template <class T>
DEVICE T from_float(float value);
template <>
DEVICE float from_float<float>(float value) {
  return value;
}
template <>
DEVICE bf16 from_float<bf16>(float value) {
  return bf16{uint16_t(ptx::pack2<bf16>(value, 0.0f))};
}
template <>
DEVICE fp16 from_float<fp16>(float value) {
  return fp16{uint16_t(ptx::pack2<fp16>(value, 0.0f))};
}

// The two halves of a 32-bit register of a pair, as fp32.
template <class T>
DEVICE float low_float(uint32_t pair) {
  return to_float(T{uint16_t(pair)});
}
template <class T>
DEVICE float high_float(uint32_t pair) {
  return to_float(T{uint16_t(pair >> 16)});
}

// ---- vectors: elements that one instruction loads or stores, aligned to their size (at most 16 bytes)

template <class T, int Count>
struct alignas(sizeof(T) * Count) Vector {
  T values[Count];
  DEVICE T& operator[](int i) { return values[i]; }
  DEVICE const T& operator[](int i) const { return values[i]; }
};

// Elements of a 16-byte vector.
template <class T>
constexpr int VECTOR = 16 / int(sizeof(T));

template <int Count, class T>
DEVICE Vector<T, Count> load_vector(const T* pointer) {
  static_assert(sizeof(T) * Count <= 16, "the widest load is 16 bytes");
#ifdef MEGALITE_EMULATE
  return emulate_load<Vector<T, Count>>(pointer);
#else
  return *reinterpret_cast<const Vector<T, Count>*>(pointer);
#endif
}

template <int Count, class T>
DEVICE void store_vector(T* pointer, const Vector<T, Count>& vector) {
  static_assert(sizeof(T) * Count <= 16, "the widest store is 16 bytes");
#ifdef MEGALITE_EMULATE
  emulate_store<Vector<T, Count>>(pointer, vector);
#else
  *reinterpret_cast<Vector<T, Count>*>(pointer) = vector;
#endif
}

// Copies 16 bytes, both ends aligned to them. load_vector and store_vector would do, but where the compiler sees a
// struct of 16-bit members go from one memory straight to another it splits the store into four of 4 bytes; CUDA's own
// type is not.
DEVICE void copy_16(void* to, const void* from) {
#ifdef MEGALITE_EMULATE
  emulate_store(to, emulate_load<Vector<uint32_t, 4>>(from));
#else
  *static_cast<uint4*>(to) = *static_cast<const uint4*>(from);
#endif
}

template <int Count>
DEVICE Vector<float, Count> zeros() {
  Vector<float, Count> result;
#pragma unroll
  for (int i = 0; i < Count; i++) result[i] = 0.0f;
  return result;
}

template <class T, int Count>
DEVICE Vector<float, Count> to_float(const Vector<T, Count>& vector) {
  Vector<float, Count> result;
#pragma unroll
  for (int i = 0; i < Count; i++) result[i] = to_float(vector[i]);
  return result;
}

// By pairs where it can: one instruction rounds two elements into a register.
template <class T, int Count>
DEVICE Vector<T, Count> from_float(const Vector<float, Count>& vector) {
  Vector<T, Count> result;
  if constexpr (sizeof(T) == 2 && Count % 2 == 0) {
#pragma unroll
    for (int i = 0; i < Count; i += 2) {
      const uint32_t pair = ptx::pack2<T>(vector[i], vector[i + 1]);
      result[i] = T{uint16_t(pair)}, result[i + 1] = T{uint16_t(pair >> 16)};
    }
  } else {
#pragma unroll
    for (int i = 0; i < Count; i++) result[i] = from_float<T>(vector[i]);
  }
  return result;
}

// ---- reductions. The butterfly leaves the same bits in every lane: each adds the same pairs.

struct Sum {
  static DEVICE float of(float a, float b) { return a + b; }
};
struct Max {
  static DEVICE float of(float a, float b) { return fmaxf(a, b); }
};

// Over aligned groups of Width lanes; every lane of the warp must take part.
template <class Operation, int Width = 32>
DEVICE float warp_reduce(float value) {
#pragma unroll
  for (int distance = Width / 2; distance > 0; distance /= 2) {
    value = Operation::of(value, __shfl_xor_sync(WHOLE_WARP, value, distance));
  }
  return value;
}

template <int Width = 32>
DEVICE float warp_sum(float value) {
  return warp_reduce<Sum, Width>(value);
}

template <int Width = 32>
DEVICE float warp_max(float value) {
  return warp_reduce<Max, Width>(value);
}

// The same value in each of the block's Threads threads. `scratch`: Threads / 32 floats of shared memory, which may
// be used again at once: a barrier stands at both ends. Every thread must call it.
template <class Operation, int Threads>
DEVICE float block_reduce(float value, float* scratch) {
  static_assert(Threads % 32 == 0, "whole warps only");
  value = warp_reduce<Operation>(value);
  if (Threads == 32) return value;
  if (lane_index() == 0) scratch[warp_index()] = value;
  __syncthreads();
  value = scratch[0];
#pragma unroll
  for (int warp = 1; warp < Threads / 32; warp++) value = Operation::of(value, scratch[warp]);
  __syncthreads();
  return value;
}

template <int Threads>
DEVICE float block_sum(float value, float* scratch) {
  return block_reduce<Sum, Threads>(value, scratch);
}

template <int Threads>
DEVICE float block_max(float value, float* scratch) {
  return block_reduce<Max, Threads>(value, scratch);
}
