// Norm of all gradients: sums of squares of fixed chunks, then the root of the sum of those, both in a fixed order.
//
//   grad_norm_partial  grid [chunks of up to SLOTS tensors of type ELEMENT]. A block owns CHUNK elements of one tensor.
//                      Reads every element once, writes 8 bytes a chunk.
//   grad_norm_total    grid [1]. Reads the chunks' sums, writes the norm.
//
// Squares are summed in float64: a gradient of 1e25 or 1e-25 would overflow or vanish in float32. A conversion and a
// fused multiply-add for 2 or 4 bytes keep up with the memory of an A100 or H100 (half of the fp32 rate), and by data
// sheets with that of an RTX 4090 (a 64th): 0.32e12 of these pairs a second and 0.25e12 floats.
//
// The order. Element i of a chunk belongs to thread (i / WIDTH) % THREADS, and goes to its sum number i % SUMS, however
// it is loaded: a tensor that doesn't begin at 16 bytes, or a last chunk, is read one by one, to the same bits. Then
// sums 0 .. SUMS - 1, a butterfly in the warp, and one over the warps: shared memory, 8 bytes for each.
#include "common.cuh"

#if !defined(THREADS)
#error "define THREADS (a multiple of 32), and for grad_norm_partial ELEMENT (float, bf16 or fp16)"
#endif
#ifndef CHUNK
#define CHUNK 32768  // a multiple of THREADS * UNROLL vectors of 16 bytes
#endif
#ifndef UNROLL
#define UNROLL 4  // vectors that a thread loads before it uses the first
#endif

constexpr int WARPS = THREADS / 32;

// In every lane, the same bits: addition commutes.
DEVICE double sum_of_warp(double x) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) x += __shfl_xor_sync(WHOLE_WARP, x, lane);
  return x;
}

// In every thread; `warps` is shared memory for WARPS of them.
DEVICE double sum_of_block(double x, double* warps) {
  x = sum_of_warp(x);
  const int lane = threadIdx.x % 32;
  if (lane == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
  return sum_of_warp(lane < WARPS ? warps[lane] : 0.0);
}

#if defined(KERNEL_grad_norm_partial)
constexpr int SUMS = 4;
constexpr int WIDTH = VECTOR<ELEMENT>;
constexpr int STEP = THREADS * WIDTH;
static_assert(CHUNK % (STEP * UNROLL) == 0, "a chunk is a whole number of turns");

DEVICE int64_t address_of(const ELEMENT* pointer) { return reinterpret_cast<int64_t>(pointer); }

DEVICE void add_squares(double (&sums)[SUMS], const Vector<float, WIDTH>& x) {
#pragma unroll
  for (int i = 0; i < WIDTH; i++) sums[i % SUMS] = fma(double(x[i]), double(x[i]), sums[i % SUMS]);
}

// partial [chunks of x0, x1, ...]; unused tensors have 0 elements.
extern "C" __global__ void __launch_bounds__(THREADS)
    grad_norm_partial(double* partial, const ELEMENT* x0, int64_t n0, const ELEMENT* x1, int64_t n1, const ELEMENT* x2,
                      int64_t n2, const ELEMENT* x3, int64_t n3, const ELEMENT* x4, int64_t n4, const ELEMENT* x5,
                      int64_t n5, const ELEMENT* x6, int64_t n6, const ELEMENT* x7, int64_t n7) {
  SHARED_MEMORY(memory);
  int64_t from = 0, size = 0, chunk = blockIdx.x;
  // The tensor that this chunk is of: written out, since an array of parameters indexed at run time is local memory.
  const auto look = [&](const ELEMENT* pointer, int64_t n) {
    const int64_t chunks = (n + CHUNK - 1) / CHUNK;
    if (chunk >= 0 && chunk < chunks) {
      from = address_of(pointer + chunk * CHUNK) - address_of(x0);
      size = n - chunk * CHUNK;
    }
    chunk -= chunks;
  };
  look(x0, n0), look(x1, n1), look(x2, n2), look(x3, n3);
  look(x4, n4), look(x5, n5), look(x6, n6), look(x7, n7);
  // By its distance from a parameter: of a pointer that is chosen at run time the compiler doesn't know that it is to
  // global memory.
  const ELEMENT* x = reinterpret_cast<const ELEMENT*>(reinterpret_cast<const char*>(x0) + from);
  double sums[SUMS] = {0.0, 0.0, 0.0, 0.0};
  if (size >= CHUNK && address_of(x) % 16 == 0) {
    for (int at = threadIdx.x * WIDTH; at < CHUNK; at += UNROLL * STEP) {
      Vector<ELEMENT, WIDTH> turn[UNROLL];
#pragma unroll
      for (int i = 0; i < UNROLL; i++) turn[i] = load_vector<WIDTH>(x + at + i * STEP);
#pragma unroll
      for (int i = 0; i < UNROLL; i++) add_squares(sums, to_float(turn[i]));
    }
  } else {
    for (int at = threadIdx.x * WIDTH; at < CHUNK && at < size; at += STEP) {
      Vector<float, WIDTH> values;
#pragma unroll
      for (int i = 0; i < WIDTH; i++) values[i] = at + i < size ? to_float(x[at + i]) : 0.0f;
      add_squares(sums, values);
    }
  }
  const double total = sum_of_block((sums[0] + sums[1]) + (sums[2] + sums[3]), reinterpret_cast<double*>(memory));
  if (threadIdx.x == 0) partial[blockIdx.x] = total;
}
#endif

#if defined(KERNEL_grad_norm_total)
// norm [1] = sqrt(sum of partial [count])
extern "C" __global__ void __launch_bounds__(THREADS)
    grad_norm_total(const double* partial, float* norm, int64_t count) {
  SHARED_MEMORY(memory);
  double total = 0.0;
  for (int64_t i = threadIdx.x; i < count; i += THREADS) total += partial[i];
  total = sum_of_block(total, reinterpret_cast<double*>(memory));
  if (threadIdx.x == 0) *norm = float(sqrt(total));
}
#endif
