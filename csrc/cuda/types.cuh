// Types and keywords that nvcc, NVRTC (which has no toolkit headers) and the emulator share.
#pragma once

#if defined(MEGALITE_EMULATE)
#include "../emulate/device.h"
#elif defined(__CUDACC_RTC__)
using int8_t = signed char;
using uint8_t = unsigned char;
using int16_t = short;
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;
using uintptr_t = unsigned long long;
#else
#include <stdint.h>
#endif

// All shared memory of a kernel is dynamic: `SHARED_MEMORY(memory);` gives its first byte, aligned to 1024.
#ifndef MEGALITE_EMULATE
#define SHARED_MEMORY(name) extern __shared__ __align__(1024) unsigned char name[]
#define DEVICE __device__ __forceinline__
#else
#define SHARED_MEMORY(name) unsigned char* name = emulate_shared_memory()
#define DEVICE inline __attribute__((always_inline))
#endif

struct bf16 {
  uint16_t bits;
};

struct fp16 {
  uint16_t bits;
};

// What cuTensorMapEncodeTiled fills; a kernel takes it as `const __grid_constant__ TensorMap`.
struct alignas(64) TensorMap {
  uint64_t words[16];
};
