// Rows in registers: what the norms share.
//
// A row of `hidden` elements belongs to LANES threads, each of which holds ITEMS of them. They are dealt out in runs of
// RUN neighbours, which move as 16 bytes:
//
//     column = (step * LANES + lane) * RUN + place,        step < ITEMS / RUN, place < RUN
//
// so the lanes of a warp read 512 bytes without a gap in one instruction. Rows whose length or address is no multiple
// of 16 bytes take RUN = 1, the same code with 2 or 4 bytes an access (64 or 128 for a warp, still without a gap).
//
//     LANES <= 32      several rows for a warp or one, sums by shuffles only
//     LANES = THREADS  a row for the block, sums by shuffles, then one word a warp in shared memory and one barrier
//
// Template parameters are Width, Items, Lanes, as RUN, ITEMS and LANES are macros of the instance.
// A thread's elements stay as loaded, packed, until they are used: a row of 16 bf16 a thread is 8 registers.
#pragma once

#include "common.cuh"

// Blocks of a backward that share a multiprocessor: 512 threads, which leaves 128 registers for each.
#define RESIDENT_BLOCKS (THREADS < 512 ? 512 / THREADS : 1)

// N neighbouring elements of type T, packed in 32-bit words: 16 bytes an instruction (LDG.E.128), or one element alone.
template <class T, int N>
struct Run {
  static_assert(N * sizeof(T) % 16 == 0, "a run of several elements is a multiple of 16 bytes");
  static constexpr int LOADS = N * sizeof(T) / 16, PER_WORD = 4 / sizeof(T);
  Vector<uint32_t, 4> words[LOADS];

  DEVICE void load(const T* source) {
#pragma unroll
    for (int i = 0; i < LOADS; ++i) words[i] = load_vector<4>(reinterpret_cast<const uint32_t*>(source) + 4 * i);
  }
  DEVICE void store(T* target) const {
#pragma unroll
    for (int i = 0; i < LOADS; ++i) store_vector<4>(reinterpret_cast<uint32_t*>(target) + 4 * i, words[i]);
  }
  DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < LOADS; ++i) words[i] = Vector<uint32_t, 4>{{0, 0, 0, 0}};
  }
  DEVICE float get(int i) const {
    const uint32_t word = words[i / PER_WORD / 4][i / PER_WORD % 4];
    if constexpr (PER_WORD == 1) {
      return __uint_as_float(word);
    } else {
      return i % 2 == 0 ? low_float<T>(word) : high_float<T>(word);
    }
  }
  // From fp32, each rounded to nearest even; a pair takes one instruction.
  DEVICE void set(const float* values) {
#pragma unroll
    for (int i = 0; i < N / PER_WORD; ++i) {
      if constexpr (PER_WORD == 1) {
        words[i / 4][i % 4] = __float_as_uint(values[i]);
      } else {
        words[i / 4][i % 4] = ptx::pack2<T>(values[2 * i], values[2 * i + 1]);
      }
    }
  }
};

template <class T>
struct Run<T, 1> {
  T element;

  DEVICE void load(const T* source) { element = *source; }
  DEVICE void store(T* target) const { *target = element; }
  DEVICE void clear() { element = from_float<T>(0.0f); }
  DEVICE float get(int) const { return to_float(element); }
  DEVICE void set(const float* values) { element = from_float<T>(values[0]); }
};

// A thread's Items elements of a row, or of Items * Lanes columns of a longer one.
template <class T, int Width, int Items, int Lanes>
struct Share {
  static constexpr int STEPS = Items / Width;
  Run<T, Width> runs[STEPS];

  static DEVICE int lane() { return static_cast<int>(threadIdx.x) % Lanes; }
  static DEVICE int column(int step) { return (step * Lanes + lane()) * Width; }

  // Columns from `columns` on are zeros: they add nothing to a sum. `columns` <= 0 loads nothing.
  DEVICE void load(const T* row, int columns) {
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      if (column(step) < columns) {
        runs[step].load(row + column(step));
      } else {
        runs[step].clear();
      }
    }
  }
  DEVICE void store(T* row, int columns) const {
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      if (column(step) < columns) runs[step].store(row + column(step));
    }
  }
  DEVICE float get(int item) const { return runs[item / Width].get(item % Width); }
  DEVICE void set(const float (&values)[Items]) {
#pragma unroll
    for (int step = 0; step < STEPS; ++step) runs[step].set(values + step * Width);
  }
  // The column of an item, and whether it is one of the row's.
  static DEVICE bool inside(int item, int columns) { return column(item / Width) + item % Width < columns; }
};

// Sums of N numbers over the Lanes threads of a row; every thread gets the same bits, since a butterfly adds the same
// two numbers in either lane. `slots` are N * Threads / 32 floats of shared memory, for Lanes > 32 alone: no thread may
// still read what the last call left in them, so callers in a loop alternate between two sets (one barrier a turn).
template <int Lanes, int N>
DEVICE void row_sums(float (&values)[N], float* slots) {
  constexpr int WARPS = Lanes / 32;
#pragma unroll
  for (int n = 0; n < N; ++n) values[n] = warp_sum<(Lanes < 32 ? Lanes : 32)>(values[n]);
  if constexpr (Lanes > 32) {
    if (lane_index() == 0) {
#pragma unroll
      for (int n = 0; n < N; ++n) slots[n * WARPS + warp_index()] = values[n];
    }
    __syncthreads();
#pragma unroll
    for (int n = 0; n < N; ++n) {
      values[n] = 0.0f;
#pragma unroll
      for (int warp = 0; warp < WARPS; ++warp) values[n] += slots[n * WARPS + warp];
    }
  }
}

// Adds up the weight-gradient sums that the Threads / Lanes row groups of a block hold, each in its own registers, and
// writes them as one row of partial sums: `target` + column. `memory` are Items * Threads floats of shared memory,
// laid out [item][thread]: a warp's lanes write neighbouring words. Groups are added in an order that depends on the
// column alone, each starting at another one so that the lanes of a warp read different banks.
template <int Width, int Items, int Lanes, int Threads>
DEVICE void store_partial(const float (&sums)[Items], float* target, int columns, float* memory) {
  using Place = Share<float, Width, Items, Lanes>;
  constexpr int GROUPS = Threads / Lanes;
  if constexpr (GROUPS == 1) {
    Place place;
    place.set(sums);
    place.store(target, columns);
  } else {
    __syncthreads();  // `memory` may have been read for something else
#pragma unroll
    for (int item = 0; item < Items; ++item) memory[item * Threads + threadIdx.x] = sums[item];
    __syncthreads();
    const int group = static_cast<int>(threadIdx.x) / Lanes;
    for (int item = group; item < Items; item += GROUPS) {
      float sum = 0.0f;
      for (int i = 0; i < GROUPS; ++i) {
        const int other = (group + i) % GROUPS;
        sum += memory[item * Threads + other * Lanes + Place::lane()];
      }
      if (Place::inside(item, columns)) target[Place::column(item / Width) + item % Width] = sum;
    }
  }
}
