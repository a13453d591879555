// Rotary position embedding of the query and key heads of a token, alone or after an RMSNorm of each head:
//
//     (a, b) -> (a cos - b sin, b cos + a sin)        pair i is features (i, half + i), or (2 i, 2 i + 1) if
//     INTERLEAVED rope_norm: x * rstd * weight first,  rstd = 1 / sqrt(mean(x^2) + eps) over the head
//
// q [tokens, q_heads, dim] and k [tokens, k_heads, dim] are views with strides by batch, place (token = batch *
// sequence
// + place) and head, in elements, and neighbouring features; cos, sin [table_rows, half] fp32, row token % table_rows.
// Features from 2 half on pass through. Outputs have no gaps, or are q and k themselves. fp32, rounded once.
//
// Grid         forward: one block a token; backward of the norm: some blocks per multiprocessor, which walk over
// tokens. Ownership    LANES threads take a head, THREADS / LANES heads at a time; a lane has UNITS units of 2 RUN
// features, all
//              that one feature needs: RUN pairs (in halves: RUN features and their RUN partners; interleaved: 2 RUN
//              neighbours), or 2 RUN features that pass through. So the angles of a lane are the same for all heads of
//              the token and are loaded once, and in place no thread reads what another writes.
// Shared       backward: 2 RUN UNITS THREADS floats for the sums of the weights' gradients over a block's heads,
// written
//              [item][thread] without bank conflicts; forward none.
// Bytes        e being an element's size: forward 2 e (q_heads + k_heads) dim a token and 8 half of angles, with the
// norm
//              also 4 (q_heads + k_heads) of rstd; in place 4 e (q_heads + k_heads) half. Backward of the norm 3 e
//              (q_heads + k_heads) dim and rstd, and 8 dim of partial sums for each block. Everything is read once.
// FLOPs        3 a feature; with the norm 7, its backward 14.
// Alignment    RUN > 1: half and dim multiples of RUN; all pointers and strides multiples of 16 bytes; else RUN = 1.
// Source       Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021.
//
// Defines: ELEMENT (of q and k), WEIGHT (of the norms' weights), RUN, UNITS, LANES, INTERLEAVED (0 or 1), THREADS.
#include "rows.cuh"

constexpr int ROPE_ITEMS = 2 * RUN * UNITS;  // features of a head that a thread holds
constexpr int SLOTS = THREADS / LANES;       // heads at a time

// Where the two runs of a lane's unit are in a head, and whether they turn.
struct Unit {
  int first, second;
  bool turns, first_there, second_there;

  DEVICE Unit(int index, int dim, int half) {
    const int unit = index * LANES + static_cast<int>(threadIdx.x) % LANES;
    const int turning = ceil_div(half, RUN);
    turns = unit < turning;
    if (turns) {
      first = INTERLEAVED ? 2 * unit * RUN : unit * RUN;
      second = INTERLEAVED ? first + RUN : half + first;
      first_there = second_there = true;
    } else {
      first = 2 * half + 2 * (unit - turning) * RUN;
      second = first + RUN;
      first_there = first < dim;
      second_there = second < dim;
    }
  }
};

// A head's features of one lane: both runs of each unit as loaded. Feature `item` of a unit is of the first run up to
// RUN, of the second from there on.
template <class T>
struct Head {
  Run<T, RUN> runs[UNITS][2];

  DEVICE void load(const T* head, int dim, int half, bool there) {
#pragma unroll
    for (int u = 0; u < UNITS; ++u) {
      const Unit unit(u, dim, half);
      if (there && unit.first_there) {
        runs[u][0].load(head + unit.first);
      } else {
        runs[u][0].clear();
      }
      if (there && unit.second_there) {
        runs[u][1].load(head + unit.second);
      } else {
        runs[u][1].clear();
      }
    }
  }
  DEVICE void store(T* head, int dim, int half, bool there) const {
#pragma unroll
    for (int u = 0; u < UNITS; ++u) {
      const Unit unit(u, dim, half);
      if (there && unit.first_there) runs[u][0].store(head + unit.first);
      if (there && unit.second_there) runs[u][1].store(head + unit.second);
    }
  }
  DEVICE void get(float (&values)[ROPE_ITEMS]) const {
#pragma unroll
    for (int i = 0; i < ROPE_ITEMS; ++i) values[i] = runs[i / (2 * RUN)][i / RUN % 2].get(i % RUN);
  }
  DEVICE void set(const float (&values)[ROPE_ITEMS]) {
#pragma unroll
    for (int run = 0; run < 2 * UNITS; ++run) runs[run / 2][run % 2].set(values + run * RUN);
  }
};

// The angles of a lane's pairs.
struct Angles {
  float cos[RUN * UNITS], sin[RUN * UNITS];
  bool turns[UNITS];

  // `direction` is 1, or -1 to turn back.
  DEVICE void load(const void* cos_table, const void* sin_table, int64_t row, int dim, int half, float direction) {
    const float* cos_row = static_cast<const float*>(cos_table) + row * half;
    const float* sin_row = static_cast<const float*>(sin_table) + row * half;
#pragma unroll
    for (int u = 0; u < UNITS; ++u) {
      const Unit unit(u, dim, half);
      const int pair = INTERLEAVED ? unit.first / 2 : unit.first;
      Run<float, RUN> cosines, sines;
      cosines.clear();
      sines.clear();
      turns[u] = unit.turns;
      if (unit.turns) {
        cosines.load(cos_row + pair);
        sines.load(sin_row + pair);
      }
#pragma unroll
      for (int i = 0; i < RUN; ++i) {
        cos[u * RUN + i] = cosines.get(i);
        sin[u * RUN + i] = direction * sines.get(i);
      }
    }
  }
  // Features that pass through keep their bits.
  DEVICE void turn(float (&values)[ROPE_ITEMS]) const {
#pragma unroll
    for (int pair = 0; pair < RUN * UNITS; ++pair) {
      const int unit = pair / RUN, i = pair % RUN;
      float& a = values[unit * 2 * RUN + (INTERLEAVED ? 2 * i : i)];
      float& b = values[unit * 2 * RUN + (INTERLEAVED ? 2 * i + 1 : RUN + i)];
      if (turns[unit]) {
        const float turned = a * cos[pair] - b * sin[pair];
        b = b * cos[pair] + a * sin[pair];
        a = turned;
      }
    }
  }
};

// Where a head starts in a view.
struct View {
  int64_t by_batch, by_place, by_head;
  DEVICE int64_t at(int64_t batch, int64_t place, int head) const {
    return batch * by_batch + place * by_place + head * by_head;
  }
};

// One token, as every kernel here sees it.
struct Token {
  int64_t index, batch, place;
  int dim, half;
  DEVICE Token(int64_t token, int64_t sequence, int64_t dim_, int64_t half_)
      : index(token),
        batch(token / sequence),
        place(token % sequence),
        dim(static_cast<int>(dim_)),
        half(static_cast<int>(half_)) {}
};

DEVICE int slot() { return static_cast<int>(threadIdx.x) / LANES; }
DEVICE int head_lane() { return static_cast<int>(threadIdx.x) % LANES; }

#if defined(KERNEL_rope_forward)
// Every head of one token of q or of k. In place the target is the source, and what passes through stays.
DEVICE void rope_heads(const Token& token, const Angles& angles, const void* x, void* out, const View& view,
                       int64_t heads, bool in_place) {
  for (int head = slot(); head < heads; head += SLOTS) {
    const int64_t source = view.at(token.batch, token.place, head);
    const int64_t target = in_place ? source : (token.index * heads + head) * token.dim;
    const int moved = in_place ? 2 * token.half : token.dim;
    Head<ELEMENT> values;
    values.load(static_cast<const ELEMENT*>(x) + source, moved, token.half, true);
    float turned[ROPE_ITEMS];
    values.get(turned);
    angles.turn(turned);
#pragma unroll
    for (int run = 0; run < 2 * UNITS; ++run) {
      if (angles.turns[run / 2]) values.runs[run / 2][run % 2].set(turned + run * RUN);
    }
    values.store(static_cast<ELEMENT*>(out) + target, moved, token.half, true);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    rope_forward(const void* q, const void* k, void* q_out, void* k_out, const void* cos, const void* sin,
                 int64_t sequence, int64_t table_rows, int64_t q_heads, int64_t k_heads, int64_t dim, int64_t half,
                 int64_t q_by_batch, int64_t q_by_place, int64_t q_by_head, int64_t k_by_batch, int64_t k_by_place,
                 int64_t k_by_head, int64_t in_place, float direction) {
  const Token token(blockIdx.x, sequence, dim, half);
  Angles angles;
  angles.load(cos, sin, token.index % table_rows, token.dim, token.half, direction);
  rope_heads(token, angles, q, q_out, View{q_by_batch, q_by_place, q_by_head}, q_heads, in_place != 0);
  rope_heads(token, angles, k, k_out, View{k_by_batch, k_by_place, k_by_head}, k_heads, in_place != 0);
}
#endif

#if defined(KERNEL_rope_norm_forward)
// Every head of one token of q or of k. All slots go round together: a slot without a head stays for the shuffles.
DEVICE void rope_norm_heads(const Token& token, const Angles& angles, const void* x, void* out, const void* weight,
                            void* rstd, const View& view, int64_t heads, float eps) {
  Head<WEIGHT> packed;
  packed.load(static_cast<const WEIGHT*>(weight), token.dim, token.half, heads > 0);
  float gain[ROPE_ITEMS];
  packed.get(gain);
  for (int first = 0; first < heads; first += SLOTS) {
    const int head = first + slot();
    const bool there = head < heads;
    Head<ELEMENT> values;
    values.load(static_cast<const ELEMENT*>(x) + view.at(token.batch, token.place, head), token.dim, token.half, there);
    float turned[ROPE_ITEMS], square = 0.0f;
    values.get(turned);
#pragma unroll
    for (int i = 0; i < ROPE_ITEMS; ++i) square += turned[i] * turned[i];
    const float scale = rsqrtf(warp_sum<LANES>(square) / static_cast<float>(token.dim) + eps);
    const int64_t row = token.index * heads + head;
    if (there && head_lane() == 0) static_cast<float*>(rstd)[row] = scale;
#pragma unroll
    for (int i = 0; i < ROPE_ITEMS; ++i) turned[i] *= scale * gain[i];
    angles.turn(turned);
    values.set(turned);
    values.store(static_cast<ELEMENT*>(out) + row * token.dim, token.dim, token.half, there);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    rope_norm_forward(const void* q, const void* k, void* q_out, void* k_out, const void* q_weight,
                      const void* k_weight, void* q_rstd, void* k_rstd, const void* cos, const void* sin,
                      int64_t sequence, int64_t table_rows, int64_t q_heads, int64_t k_heads, int64_t dim, int64_t half,
                      int64_t q_by_batch, int64_t q_by_place, int64_t q_by_head, int64_t k_by_batch, int64_t k_by_place,
                      int64_t k_by_head, float eps) {
  const Token token(blockIdx.x, sequence, dim, half);
  Angles angles;
  angles.load(cos, sin, token.index % table_rows, token.dim, token.half, 1.0f);
  rope_norm_heads(token, angles, q, q_out, q_weight, q_rstd, View{q_by_batch, q_by_place, q_by_head}, q_heads, eps);
  rope_norm_heads(token, angles, k, k_out, k_weight, k_rstd, View{k_by_batch, k_by_place, k_by_head}, k_heads, eps);
}
#endif

#if defined(KERNEL_rope_norm_backward)
// With n = x * rstd, t = dy turned back and g = t * weight: dx = rstd * (g - n * mean(g * n)), and dweight is the sum
// of t * n over heads and tokens, of which each block writes its own to `partial` [2, blocks, dim] fp32: q's, then k's.
DEVICE void rope_norm_heads_backward(const Token& token, const Angles& back, const void* dy, const void* x, void* dx,
                                     const void* weight, const void* rstd, const View& dy_view, const View& view,
                                     int64_t heads, float (&sums)[ROPE_ITEMS]) {
  Head<WEIGHT> gain;
  gain.load(static_cast<const WEIGHT*>(weight), token.dim, token.half, heads > 0);
  for (int first = 0; first < heads; first += SLOTS) {
    const int head = first + slot();
    const bool there = head < heads;
    const int64_t row = token.index * heads + head;
    Head<ELEMENT> values, gradients;
    values.load(static_cast<const ELEMENT*>(x) + view.at(token.batch, token.place, head), token.dim, token.half, there);
    gradients.load(static_cast<const ELEMENT*>(dy) + dy_view.at(token.batch, token.place, head), token.dim, token.half,
                   there);
    const float scale = there ? static_cast<const float*>(rstd)[row] : 0.0f;
    float normed[ROPE_ITEMS], turned[ROPE_ITEMS], weights[ROPE_ITEMS], mean = 0.0f;
    values.get(normed);
    gradients.get(turned);
    gain.get(weights);
    back.turn(turned);
#pragma unroll
    for (int i = 0; i < ROPE_ITEMS; ++i) {
      normed[i] *= scale;
      sums[i] += turned[i] * normed[i];
      turned[i] *= weights[i];
      mean += turned[i] * normed[i];
    }
    mean = warp_sum<LANES>(mean) / static_cast<float>(token.dim);
#pragma unroll
    for (int i = 0; i < ROPE_ITEMS; ++i) turned[i] = scale * (turned[i] - normed[i] * mean);
    values.set(turned);
    values.store(static_cast<ELEMENT*>(dx) + row * token.dim, token.dim, token.half, there);
  }
}

// The sums of a block's slots, added in an order that depends on the feature alone (as in store_partial of rows.cuh).
DEVICE void store_head_partial(const float (&sums)[ROPE_ITEMS], float* target, int dim, int half, float* memory) {
  __syncthreads();  // `memory` may still be read for the other heads
#pragma unroll
  for (int item = 0; item < ROPE_ITEMS; ++item) memory[item * THREADS + threadIdx.x] = sums[item];
  __syncthreads();
  for (int item = slot(); item < ROPE_ITEMS; item += SLOTS) {
    float sum = 0.0f;
    for (int i = 0; i < SLOTS; ++i) sum += memory[item * THREADS + (slot() + i) % SLOTS * LANES + head_lane()];
    const Unit unit(item / (2 * RUN), dim, half);
    const bool second = item / RUN % 2 == 1;
    const int feature = (second ? unit.second : unit.first) + item % RUN;
    if (second ? unit.second_there : unit.first_there) target[feature] = sum;
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 384 / THREADS)
    rope_norm_backward(const void* dq_out, const void* dk_out, const void* q, const void* k, void* dq, void* dk,
                       const void* q_weight, const void* k_weight, const void* q_rstd, const void* k_rstd,
                       const void* cos, const void* sin, void* partial, int64_t tokens, int64_t sequence,
                       int64_t table_rows, int64_t q_heads, int64_t k_heads, int64_t dim, int64_t half,
                       int64_t dq_by_batch, int64_t dq_by_place, int64_t dq_by_head, int64_t dk_by_batch,
                       int64_t dk_by_place, int64_t dk_by_head, int64_t q_by_batch, int64_t q_by_place,
                       int64_t q_by_head, int64_t k_by_batch, int64_t k_by_place, int64_t k_by_head) {
  SHARED_MEMORY(memory);
  float q_sums[ROPE_ITEMS], k_sums[ROPE_ITEMS];
#pragma unroll
  for (int i = 0; i < ROPE_ITEMS; ++i) q_sums[i] = k_sums[i] = 0.0f;
  for (int64_t index = blockIdx.x; index < tokens; index += gridDim.x) {
    const Token token(index, sequence, dim, half);
    Angles back;
    back.load(cos, sin, index % table_rows, token.dim, token.half, -1.0f);
    rope_norm_heads_backward(token, back, dq_out, q, dq, q_weight, q_rstd, View{dq_by_batch, dq_by_place, dq_by_head},
                             View{q_by_batch, q_by_place, q_by_head}, q_heads, q_sums);
    rope_norm_heads_backward(token, back, dk_out, k, dk, k_weight, k_rstd, View{dk_by_batch, dk_by_place, dk_by_head},
                             View{k_by_batch, k_by_place, k_by_head}, k_heads, k_sums);
  }
  float* target = static_cast<float*>(partial) + blockIdx.x * dim;
  float* scratch = reinterpret_cast<float*>(memory);
  store_head_partial(q_sums, target, static_cast<int>(dim), static_cast<int>(half), scratch);
  store_head_partial(k_sums, target + gridDim.x * dim, static_cast<int>(dim), static_cast<int>(half), scratch);
}
#endif
