// AdamW over flat buffers, in place, in one pass.
//
// Compiled with -DKERNEL_adamw, THREADS and PARAM (float, bf16 or fp16: the parameters' type). MASTER=0: the parameters
// are their own; bf16 ones are then rounded up or down at random (STOCHASTIC=1), or are the upper halves of their fp32
// masters, whose rest is an int16 (REMAINDER=1: what stands at the master's place; reference/adamw.py has the rule).
//
// Grid [size / (4 * ITEMS * THREADS)]. A thread owns ITEMS groups of 4 neighbours, THREADS groups apart: a warp's
// access to an fp32 buffer is 512 bytes side by side (16 a thread), to 16-bit parameters 256 (8 a thread), so no sector
// is fetched twice; all loads are in flight before the first is used. Buffers that don't begin at 16 bytes (8 for
// 16-bit parameters), and the last elements, are taken one by one. No shared memory.
//
// Bytes: 28 and a parameter for each element (master, two moments and the gradient in; master and moments out, the
// parameter out); 20 and two parameters without a master, 28 in all with a remainder. About 15 operations, two
// divisions and a root: far below what a GPU does in the time of moving 30 bytes, so all of them are IEEE's and nothing
// is approximated.
//
// The learning rate, the step, the clipping coefficient and `skip` are read on the device: nothing waits for the host,
// and a CUDA graph may replay the launch. Where skip is set nothing is written.
//
// Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019; the hash is Wellons' lowbias32.
#include "common.cuh"

#if !defined(PARAM) || !defined(THREADS)
#error "define PARAM (float, bf16 or fp16) and THREADS"
#endif
#ifndef MASTER
#define MASTER 1  // 0 where the parameters are their own
#endif
#ifndef STOCHASTIC
#define STOCHASTIC 0  // 1: rounded by random bits (bf16, without a master)
#endif
#ifndef REMAINDER
#define REMAINDER 0  // 1: 16 bits instead of a master complete the parameters (bf16)
#endif
#ifndef ITEMS
#define ITEMS 2  // groups of 4 that a thread loads before it uses the first
#endif

constexpr int GROUP = 4;

DEVICE uint32_t mix(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}

// The part of the random bits that all elements share.
DEVICE uint32_t rounding_key(int64_t seed, int64_t step) {
  uint32_t key = mix(uint32_t(seed) + 0x9E3779B9u);
  key = mix(key + uint32_t(uint64_t(seed) >> 32));
  key = mix(key + uint32_t(step));
  return mix(key + uint32_t(uint64_t(step) >> 32));
}

DEVICE uint32_t rounding_bits(uint32_t key, int64_t index) {
  const uint32_t word = mix(key + uint32_t(uint64_t(index) >> 32));
  return mix(mix(uint32_t(index) ^ word) + word) >> 16;
}

// fp32 to bf16 (in the upper half of a word), up or down by random bits; infinities and NaN as usual.
DEVICE bf16 round_stochastic(float x, uint32_t bits) {
  const uint32_t pattern = __float_as_uint(x);
  if ((pattern & 0x7F800000u) == 0x7F800000u) return from_float<bf16>(x);
  return from_float<bf16>(__uint_as_float((pattern + bits) & 0xFFFF0000u));
}

// The fp32 number whose upper half is `high`, rounded, and whose rest is `low`, signed.
DEVICE float join(bf16 high, int16_t low) {
  return __uint_as_float((uint32_t(high.bits) << 16) + uint32_t(int32_t(low)));
}

// The halves of x: the nearest bf16 (of two, that farther from zero) and the rest. NaN loses its payload.
DEVICE bf16 split(float x, int16_t& low) {
  const uint32_t pattern = x == x ? __float_as_uint(x) : 0x7FC00000u;
  low = int16_t(pattern & 0xFFFFu);
  return bf16{uint16_t((pattern + 0x8000u) >> 16)};
}

// What a step is, the same for all elements. 1 - beta is given, made in double: in float it has 4 digits of 0.001.
struct Step {
  float beta1, rest1, beta2, rest2, eps, decay, size, root, clip;

  // The new value, with the moments updated. Fused operations are spelled out: the same bits in every instance.
  DEVICE float update(float value, float gradient, float& m, float& v) const {
    const float g = gradient * clip;
    m = fmaf(m, beta1, g * rest1);
    v = fmaf(v, beta2, g * g * rest2);
    const float change = size * m / (sqrtf(v) / root + eps);
    return fmaf(value, decay, -change);
  }
};

// 1 - beta^step without cancellation.
DEVICE float bias_correction(float step, float log_beta) { return -expm1f(step * log_beta); }

template <class T>
DEVICE uintptr_t address_of(const T* pointer) {
  return reinterpret_cast<uintptr_t>(pointer);
}

// N neighbours, or as many as there are: WHOLE says that they all exist and lie at their alignment.
template <bool WHOLE, class T>
DEVICE Vector<T, GROUP> fetch(const T* buffer, int64_t at, int64_t size) {
  if constexpr (WHOLE) {
    return load_vector<GROUP>(buffer + at);
  } else {
    Vector<T, GROUP> x = {};
#pragma unroll
    for (int k = 0; k < GROUP; k++) {
      if (at + k < size) x[k] = buffer[at + k];
    }
    return x;
  }
}

template <bool WHOLE, class T>
DEVICE Vector<float, GROUP> read(const T* buffer, int64_t at, int64_t size) {
  return to_float(fetch<WHOLE>(buffer, at, size));
}

template <bool WHOLE, class T>
DEVICE void write(T* buffer, const Vector<T, GROUP>& x, int64_t at, int64_t size) {
  if constexpr (WHOLE) {
    store_vector(buffer + at, x);
  } else {
#pragma unroll
    for (int k = 0; k < GROUP; k++) {
      if (at + k < size) buffer[at + k] = x[k];
    }
  }
}

#if REMAINDER
using Rest = int16_t;
#else
using Rest = float;
#endif

struct Buffers {
  PARAM* params;
  Rest* rest;  // of the parameters: their masters, or what completes them to those
  float *exp_avg, *exp_avg_sq;
  const float* grads;
  int64_t size;

  DEVICE bool aligned() const {
    const uintptr_t wide = address_of(exp_avg) | address_of(exp_avg_sq) | address_of(grads);
    return wide % 16 == 0 && address_of(rest) % (GROUP * sizeof(Rest)) == 0 &&
           address_of(params) % (GROUP * sizeof(PARAM)) == 0;
  }
};

// What is read on the device.
struct Scalars {
  const float *rate, *clip;
  const void* step;
  bool step_is_integer;
  const unsigned char* skip;
  const int64_t* seed;

  DEVICE int64_t step_number() const {
    return step_is_integer ? *static_cast<const int64_t*>(step) : int64_t(*static_cast<const float*>(step));
  }
  DEVICE float step_count() const {
    return step_is_integer ? float(*static_cast<const int64_t*>(step)) : *static_cast<const float*>(step);
  }
};

struct Coefficients {
  float beta1, rest1, log_beta1, beta2, rest2, log_beta2, eps, weight_decay;

  DEVICE Step at(const Scalars& scalars) const {
    const float rate = *scalars.rate, count = scalars.step_count();
    const float size = rate / bias_correction(count, log_beta1);
    const float root = sqrtf(bias_correction(count, log_beta2));
    return {beta1, rest1, beta2, rest2, eps, 1.0f - rate * weight_decay, size, root, *scalars.clip};
  }
};

template <bool WHOLE>
DEVICE void step_of_thread(const Buffers& to, const Scalars& scalars, const Coefficients& coefficients, int64_t first) {
  Vector<float, GROUP> value[ITEMS], m[ITEMS], v[ITEMS], g[ITEMS];
#pragma unroll
  for (int i = 0; i < ITEMS; i++) {
    const int64_t at = first + i * THREADS * GROUP;
#if REMAINDER
    const Vector<PARAM, GROUP> high = fetch<WHOLE>(to.params, at, to.size);
    const Vector<Rest, GROUP> low = fetch<WHOLE>(to.rest, at, to.size);
#pragma unroll
    for (int k = 0; k < GROUP; k++) value[i][k] = join(high[k], low[k]);
#else
    value[i] = MASTER ? read<WHOLE>(to.rest, at, to.size) : read<WHOLE>(to.params, at, to.size);
#endif
    m[i] = read<WHOLE>(to.exp_avg, at, to.size);
    v[i] = read<WHOLE>(to.exp_avg_sq, at, to.size);
    g[i] = read<WHOLE>(to.grads, at, to.size);
  }
  if (*scalars.skip) return;  // after the reads, which need not wait for it
  const Step now = coefficients.at(scalars);
#if STOCHASTIC
  const uint32_t key = rounding_key(*scalars.seed, scalars.step_number());
#endif
#pragma unroll
  for (int i = 0; i < ITEMS; i++) {
    const int64_t at = first + i * THREADS * GROUP;
    Vector<PARAM, GROUP> rounded;
    Vector<Rest, GROUP> rest;
#pragma unroll
    for (int k = 0; k < GROUP; k++) {
      const float x = now.update(value[i][k], g[i][k], m[i][k], v[i][k]);
#if REMAINDER
      rounded[k] = split(x, rest[k]);
#elif STOCHASTIC
      rounded[k] = round_stochastic(x, rounding_bits(key, at + k));
#else
      rest[k] = x;
      rounded[k] = from_float<PARAM>(x);
#endif
    }
    if (MASTER || REMAINDER) write<WHOLE>(to.rest, rest, at, to.size);
    write<WHOLE>(to.exp_avg, m[i], at, to.size);
    write<WHOLE>(to.exp_avg_sq, v[i], at, to.size);
    write<WHOLE>(to.params, rounded, at, to.size);
  }
}

#if defined(KERNEL_adamw)
// `step` is an int64 where step_is_integer, else a float. rest is null without MASTER or REMAINDER, seed without
// STOCHASTIC.
extern "C" __global__ void __launch_bounds__(THREADS)
    adamw(PARAM* params, Rest* rest, float* exp_avg, float* exp_avg_sq, const float* grads, const float* lr,
          const void* step, const float* clip, const unsigned char* skip, const int64_t* seed, int64_t size,
          int64_t step_is_integer, float beta1, float rest1, float log_beta1, float beta2, float rest2, float log_beta2,
          float eps, float weight_decay) {
  const Buffers buffers = {params, rest, exp_avg, exp_avg_sq, grads, size};
  const Scalars scalars = {lr, clip, step, step_is_integer != 0, skip, seed};
  const Coefficients coefficients = {beta1, rest1, log_beta1, beta2, rest2, log_beta2, eps, weight_decay};
  const int64_t begin = int64_t(blockIdx.x) * (ITEMS * THREADS * GROUP), first = begin + threadIdx.x * GROUP;
  if (buffers.aligned() && begin + ITEMS * THREADS * GROUP <= size) {
    step_of_thread<true>(buffers, scalars, coefficients, first);
  } else {
    step_of_thread<false>(buffers, scalars, coefficients, first);
  }
}
#endif
