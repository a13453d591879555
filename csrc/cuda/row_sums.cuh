// Maximum and sum of exponentials of a row of scores, over a thread, a warp, a block and a cluster of blocks.
//
// A thread keeps one running maximum m and one sum of exp(s - m) ("Online normalizer calculation for softmax", Milakov
// and Gimelshein, 2018); it takes the maximum of a vector first, so that there is one rescaling for 4 or 8 scores, and
// little more than one exponential each. Threads are then joined by a butterfly in the warp, warps by shared memory (12
// bytes a warp, read by one lane each: no bank is asked twice), blocks of a cluster by each other's shared memory:
// always in the same order, so the bits repeat.
//
// Infinities and NaN come out as from torch: the maximum is held within the finite range, so that a row of -inf sums to
// 0 (logsumexp -inf), one with +inf to inf, and only NaN to NaN.
#pragma once

#include "common.cuh"

constexpr int WARPS = THREADS / 32;
constexpr float LARGEST = 3.4028234663852886e38f;
constexpr float LOG2_E = 1.4426950408889634f;

DEVICE float infinity() { return __int_as_float(0x7f800000); }
DEVICE float not_a_number() { return __int_as_float(0x7fffffff); }
DEVICE float exponential(float x) { return ptx::exp2_approx(x * LOG2_E); }

DEVICE float capped(float x, float softcap) { return softcap == 0.0f ? x : softcap * tanhf(x * (1.0f / softcap)); }

// Maximum of some scores, sum of exp(score - top), and sum of scores.
struct Sums {
  float top, total, plain;

  static DEVICE Sums none() { return {-LARGEST, 0.0f, 0.0f}; }

  template <bool EXTRAS, int N>
  DEVICE void add(Vector<float, N> s, float softcap) {
    float best = top;
#pragma unroll
    for (int i = 0; i < N; i++) {
      if (EXTRAS) {
        s[i] = capped(s[i], softcap);
        plain += s[i];
      }
      best = fmaxf(best, s[i]);
    }
    best = fminf(best, LARGEST);
    float part = 0.0f;
#pragma unroll
    for (int i = 0; i < N; i++) part += exponential(s[i] - best);
    total = fmaf(total, exponential(top - best), part);
    top = best;
  }

  DEVICE void raise(float best) {
    total *= exponential(top - best);
    top = best;
  }

  DEVICE float lse() const { return top + logf(total); }

  // The maximum as torch's amax has it: a sum that is NaN or infinite says that there is such a score.
  DEVICE float maximum() const {
    if (!(total <= LARGEST)) return total;
    return total == 0.0f ? -infinity() : top;
  }
};

// The same Sums in all lanes of a warp: addition commutes, so a butterfly leaves the same bits in each.
DEVICE Sums sums_of_warp(Sums mine) {
  float best = mine.top;
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) best = fmaxf(best, __shfl_xor_sync(WHOLE_WARP, best, lane));
  mine.raise(best);
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) {
    mine.total += __shfl_xor_sync(WHOLE_WARP, mine.total, lane);
    mine.plain += __shfl_xor_sync(WHOLE_WARP, mine.plain, lane);
  }
  return mine;
}

// The same Sums in all threads of a block; `warps` is shared memory for WARPS of them.
DEVICE Sums sums_of_block(Sums mine, Sums* warps) {
  mine = sums_of_warp(mine);
  const int lane = threadIdx.x % 32;
  if (lane == 0) warps[threadIdx.x / 32] = mine;
  __syncthreads();
  return sums_of_warp(lane < WARPS ? warps[lane] : Sums::none());
}

// The same Sums in all blocks of a cluster; `exchange` is shared memory for 1 + 8 of them.
DEVICE Sums sums_of_cluster(Sums mine, Sums* exchange) {
#if CLUSTERED
  Sums* every = exchange + 1;
  if (threadIdx.x == 0) *exchange = mine;
  ptx::cluster_sync();
  const int blocks = ptx::cluster_size();
  const int from = threadIdx.x;
  if (from < blocks) {
    every[from] = {ptx::cluster_load<float>(&exchange->top, from), ptx::cluster_load<float>(&exchange->total, from),
                   ptx::cluster_load<float>(&exchange->plain, from)};
  }
  ptx::cluster_sync();  // and none ends while another reads its sums
  mine = every[0];
  for (int i = 1; i < blocks; i++) {
    Sums other = every[i];
    const float best = fmaxf(mine.top, other.top);
    mine.raise(best);
    other.raise(best);
    mine.total += other.total;
    mine.plain += other.plain;
  }
#endif
  return mine;
}
