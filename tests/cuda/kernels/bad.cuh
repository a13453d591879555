// Pairs of kernels: each does one thing that it must not if `bad` is 1, and is right if it is 0.
#include "common.cuh"

// x, y: THREADS floats or more; by one block of THREADS threads, unless said otherwise.
#define KERNEL(name) extern "C" __global__ void __launch_bounds__(THREADS) name

#if defined(KERNEL_missing_barrier)
KERNEL(missing_barrier)(const float* x, float* y, int64_t bad) {
  SHARED_MEMORY(memory);
  float* shared = reinterpret_cast<float*>(memory);
  const int i = threadIdx.x;
  shared[i] = x[i];
  if (!bad) __syncthreads();
  y[i] = shared[THREADS - 1 - i];
}
#endif

#if defined(KERNEL_overwritten_too_early)
// The second round's stores must not overtake the first round's loads.
KERNEL(overwritten_too_early)(const float* x, float* y, int64_t bad) {
  SHARED_MEMORY(memory);
  float* shared = reinterpret_cast<float*>(memory);
  const int i = threadIdx.x;
  float sum = 0;
  for (int round = 0; round < 2; round++) {
    shared[i] = x[i] + round;
    __syncthreads();
    sum += shared[(i + 33) % THREADS];
    if (!bad) __syncthreads();
  }
  y[i] = sum;
}
#endif

#if defined(KERNEL_missing_syncwarp)
KERNEL(missing_syncwarp)(const float* x, float* y, int64_t bad) {
  SHARED_MEMORY(memory);
  float* shared = reinterpret_cast<float*>(memory);
  const int i = threadIdx.x;
  shared[i] = x[i];
  if (bad) {
    y[i] = __shfl_sync(WHOLE_WARP, x[i], 0);  // a shuffle orders no memory
  } else {
    __syncwarp();
  }
  y[i] = shared[i ^ 1];
}
#endif

#if defined(KERNEL_uninitialised_shared)
KERNEL(uninitialised_shared)(const float* x, float* y, int64_t bad) {
  SHARED_MEMORY(memory);
  float* shared = reinterpret_cast<float*>(memory);
  const int i = threadIdx.x;
  if (i < THREADS - bad) shared[i] = x[i];
  __syncthreads();
  y[i] = shared[i];
}
#endif

#if defined(KERNEL_reads_past_the_end)
KERNEL(reads_past_the_end)(const float* x, float* y, int64_t bad) {
  const int i = threadIdx.x;
  y[i] = x[i + bad];
}
#endif

#if defined(KERNEL_writes_before_the_start)
KERNEL(writes_before_the_start)(const float* x, float* y, int64_t bad) {
  const int i = threadIdx.x;
  y[i - bad] = x[i];
}
#endif

#if defined(KERNEL_writes_its_input)
KERNEL(writes_its_input)(const float* x, float* y, int64_t bad) {
  const int i = threadIdx.x;
  (bad ? const_cast<float*>(x) : y)[i] = 1.0f;
}
#endif

#if defined(KERNEL_shared_too_small)
KERNEL(shared_too_small)(const float* x, float* y, int64_t bad) {
  SHARED_MEMORY(memory);
  float* shared = reinterpret_cast<float*>(memory);
  const int i = threadIdx.x;
  shared[i + bad] = x[i];
  y[i] = shared[i + bad];
}
#endif

#if defined(KERNEL_misaligned_vector)
KERNEL(misaligned_vector)(const float* x, float* y, int64_t bad) {
  const int i = threadIdx.x;
  if (i < THREADS / 4 - 1) store_vector<4>(y + 4 * i, load_vector<4>(x + 4 * i + bad));
}
#endif

#if defined(KERNEL_misaligned_plain)
// A store that is no vector's, through a pointer of another type.
KERNEL(misaligned_plain)(const float* x, float* y, int64_t bad) {
  unsigned char* bytes = reinterpret_cast<unsigned char*>(y);
  if (threadIdx.x == 0) *reinterpret_cast<uint64_t*>(bytes + (bad ? 4 : 8)) = uint64_t(x[0]);
}
#endif

#if defined(KERNEL_local_of_another)
KERNEL(local_of_another)(const float* x, float* y, int64_t bad) {
  SHARED_MEMORY(memory);
  float** shared = reinterpret_cast<float**>(memory);
  const int i = threadIdx.x;
  float local[2] = {x[i], x[i]};
  shared[i] = local;
  __syncthreads();
  y[i] = shared[bad ? i ^ 1 : i][i & 1];
  __syncthreads();
}
#endif

#if defined(KERNEL_null_pointer)
KERNEL(null_pointer)(const float* x, float* y, int64_t bad, const float* bias) {
  const int i = threadIdx.x;
  y[i] = x[i] + (bad || bias ? bias[i] : 0.0f);
}
#endif

#if defined(KERNEL_absent_lane)
KERNEL(absent_lane)(const float* x, float* y, int64_t bad) {
  const int i = threadIdx.x;
  if (bad && i % 32 == 5) return;
  y[i] = __shfl_xor_sync(WHOLE_WARP, x[i], 1);
}
#endif

#if defined(KERNEL_lane_not_in_mask)
KERNEL(lane_not_in_mask)(const float* x, float* y, int64_t bad) {
  const int i = threadIdx.x;
  if (i % 32 < 16) y[i] = __shfl_sync(0x0000ffffu, x[i], bad ? 16 : 15);
}
#endif

#if defined(KERNEL_caller_not_in_mask)
KERNEL(caller_not_in_mask)(const float* x, float* y, int64_t bad) {
  const int i = threadIdx.x;
  if (i % 32 < 16 + bad) y[i] = __shfl_sync(0x0000ffffu, x[i], 3);
}
#endif

#if defined(KERNEL_diverged_lanes)
KERNEL(diverged_lanes)(const float* x, float* y, int64_t bad) {
  const int i = threadIdx.x;
  if (bad && i % 2) {
    y[i] = __ballot_sync(WHOLE_WARP, 1);
  } else {
    y[i] = __shfl_xor_sync(WHOLE_WARP, x[i], 1);
  }
}
#endif

#if defined(KERNEL_diverged_barrier)
KERNEL(diverged_barrier)(const float* x, float* y, int64_t bad) {
  const int i = threadIdx.x;
  if (bad ? i < THREADS / 2 : i < THREADS) {
    __syncthreads();
    y[i] = x[i];
  } else {
    y[i] = 0.0f;
    __syncthreads();
  }
}
#endif

#if defined(KERNEL_early_exit_before_barrier)
KERNEL(early_exit_before_barrier)(const float* x, float* y, int64_t bad) {
  const int i = threadIdx.x;
  if (bad && i == THREADS - 1) return;
  __syncthreads();
  y[i] = x[i];
}
#endif

#if defined(KERNEL_named_barrier_too_many)
// Half of the block at a barrier of its own: bad waits for more threads than come.
KERNEL(named_barrier_too_many)(const float* x, float* y, int64_t bad) {
  const int i = threadIdx.x;
  if (i < THREADS / 2) ptx::named_barrier_sync(1, bad ? THREADS : THREADS / 2);
  y[i] = x[i];
}
#endif

#if defined(KERNEL_named_barrier_wrong_id)
// A producer half and a consumer half, handing over by arrive and sync; bad arrives at another barrier's id.
KERNEL(named_barrier_wrong_id)(const float* x, float* y, int64_t bad) {
  SHARED_MEMORY(memory);
  float* shared = reinterpret_cast<float*>(memory);
  const int i = threadIdx.x % (THREADS / 2);
  if (threadIdx.x < THREADS / 2) {
    shared[i] = x[i];
    ptx::named_barrier_arrive(bad ? 2 : 1, THREADS);
  } else {
    ptx::named_barrier_sync(1, THREADS);
    y[i] = shared[i];
  }
}
#endif

#if defined(KERNEL_missing_async_wait)
KERNEL(missing_async_wait)(const float* x, float* y, int64_t bad) {
  SHARED_MEMORY(memory);
  float* shared = reinterpret_cast<float*>(memory);
  const int i = threadIdx.x;
  if (i < THREADS / 4) ptx::cp_async_16(shared + 4 * i, x + 4 * i, true);
  ptx::cp_async_commit();
  ptx::cp_async_commit();  // an empty group: waiting for all but one waits for the first
  if (bad) {
    ptx::cp_async_wait<2>();
  } else {
    ptx::cp_async_wait<1>();
  }
  __syncthreads();
  y[i] = shared[i];
  ptx::cp_async_wait<0>();
}
#endif

#if defined(KERNEL_async_over_reads)
// A copy is issued into what other threads still read.
KERNEL(async_over_reads)(const float* x, float* y, int64_t bad) {
  SHARED_MEMORY(memory);
  float* shared = reinterpret_cast<float*>(memory);
  const int i = threadIdx.x;
  shared[i] = x[i];
  __syncthreads();
  const float other = shared[THREADS - 1 - i];
  if (!bad) __syncthreads();
  if (i < THREADS / 4) ptx::cp_async_16(shared + 4 * i, x + 4 * i, true);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();
  y[i] = other + shared[i];
}
#endif

#if defined(KERNEL_global_race_in_block)
KERNEL(global_race_in_block)(const float* x, float* y, int64_t bad) {
  const int i = threadIdx.x;
  y[i] = x[i];
  if (!bad) __syncthreads();
  const float next = y[(i + 1) % THREADS];
  __syncthreads();
  y[i] = next;
}
#endif

#if defined(KERNEL_global_race_of_blocks)
// Two blocks.
KERNEL(global_race_of_blocks)(const float* x, float* y, int64_t bad) {
  const int i = threadIdx.x;
  y[i + (bad ? 0 : blockIdx.x * THREADS)] = x[i];
}
#endif

#if defined(KERNEL_last_block)
// Two blocks or more: the last to finish adds up what all have written. bad forgets the fence. y: one float and a
// counter a block, at the end the sum.
KERNEL(last_block)(const float* x, float* y, int64_t bad, int* counter) {
  SHARED_MEMORY(memory);
  int* last = reinterpret_cast<int*>(memory);
  if (threadIdx.x == 0) {
    y[blockIdx.x] = x[blockIdx.x];
    if (!bad) __threadfence();
    *last = atomicAdd(counter, 1) == int(gridDim.x) - 1;
  }
  __syncthreads();
  if (*last && threadIdx.x == 1) {
    float sum = 0;
    for (uint32_t block = 0; block < gridDim.x; block++) sum += y[block];
    y[gridDim.x] = sum;
  }
}
#endif

#if defined(KERNEL_atomic_and_plain)
KERNEL(atomic_and_plain)(const float* x, float* y, int64_t bad) {
  SHARED_MEMORY(memory);
  int* counter = reinterpret_cast<int*>(memory);
  const int i = threadIdx.x;
  if (i == 0) *counter = 0;
  __syncthreads();
  if (bad && i == THREADS - 1) {
    *counter += 1;
  } else {
    atomicAdd(counter, 1);
  }
  __syncthreads();
  y[i] = x[i] * *counter;
}
#endif

#if defined(KERNEL_unaligned_rows)
// ldmatrix with rows of 12 bytes.
KERNEL(unaligned_rows)(const float* x, float* y, int64_t bad) {
  SHARED_MEMORY(memory);
  const int i = threadIdx.x;
  float* shared = reinterpret_cast<float*>(memory);
  for (int k = 0; k < 4; k++) shared[4 * i + k] = x[i];
  __syncthreads();
  uint32_t registers[4];
  ptx::ldmatrix_x4(registers, memory + i % 32 * (bad ? 12 : 16));
  y[i] = __uint_as_float(registers[0]);
}
#endif

#if defined(KERNEL_large_locals)
KERNEL(large_locals)(const float* x, float* y, int64_t) {
  volatile float locals[LOCALS];
  for (int i = 0; i < LOCALS; i++) locals[i] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = locals[threadIdx.x];
}
#endif

#if defined(KERNEL_endless_loop)
KERNEL(endless_loop)(const float* x, float* y, int64_t bad) {
  for (int64_t i = threadIdx.x; i < THREADS; i += bad ? 0 : THREADS) y[i] = x[i];
}
#endif

#if defined(KERNEL_leaves_its_cluster)
// A cluster of two: each reads the other's shared memory; bad leaves while it may still be read.
KERNEL(leaves_its_cluster)(const float* x, float* y, int64_t bad) {
  SHARED_MEMORY(memory);
  float* shared = reinterpret_cast<float*>(memory);
  const int i = threadIdx.x, rank = ptx::cluster_rank();
  shared[i] = x[i] + rank;
  ptx::cluster_sync();
  y[rank * THREADS + i] = ptx::cluster_load<float>(shared + i, rank ^ 1);
  if (!bad) ptx::cluster_sync();
}
#endif

#if defined(KERNEL_cluster_race)
KERNEL(cluster_race)(const float* x, float* y, int64_t bad) {
  SHARED_MEMORY(memory);
  float* shared = reinterpret_cast<float*>(memory);
  const int i = threadIdx.x, rank = ptx::cluster_rank();
  shared[i] = x[i] + rank;
  if (bad) {
    __syncthreads();
  } else {
    ptx::cluster_sync();
  }
  y[rank * THREADS + i] = ptx::cluster_load<float>(shared + i, rank ^ 1);
  ptx::cluster_sync();
}
#endif

#if defined(KERNEL_strided)
// Counts of bank conflicts: each lane reads a float WIDTH apart from its neighbour's.
KERNEL(strided)(const float* x, float* y, int64_t bad) {
  SHARED_MEMORY(memory);
  float* shared = reinterpret_cast<float*>(memory);
  const int i = threadIdx.x;
  for (int k = 0; k < WIDTH; k++) shared[k * THREADS + i] = x[i] + k;
  __syncthreads();
  y[i] = shared[i * WIDTH];
}
#endif

#if defined(KERNEL_vectors)
// The same by 16-byte loads: SKEW 0 reads consecutive vectors, SKEW 1 every second.
KERNEL(vectors)(const float* x, float* y, int64_t bad) {
  SHARED_MEMORY(memory);
  float* shared = reinterpret_cast<float*>(memory);
  const int i = threadIdx.x;
  for (int k = 0; k < 8; k++) shared[k * THREADS + i] = x[i] + k;
  __syncthreads();
  const Vector<float, 4> got = load_vector<4>(shared + 4 * i * (1 + SKEW));
  y[i] = got[0] + got[3];
}
#endif
