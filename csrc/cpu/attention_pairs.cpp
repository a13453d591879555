// Attention of bf16 tensors on instructions that multiply bf16 pairs.
#include "attention.h"
#include "scratch.h"

namespace megalite {

// A block is 128 queries (lanes) by 192 keys (rows), a multiple of 6 rows, of 16 words and of 32 keys: the sums it adds
// to come from the second cache level, so larger blocks wait less for them. Float scores are there for a strip of keys
// at a time (16 KB), which stays in the first.
constexpr int64_t kPairQueries = 128, kPairKeys = 192, kPairPad = 32, kMostStrip = 32;

// Sums over queries, of one document and key/value head.
struct KeySums {
  float *dkeys, *dvalues;  // [padded keys, padded dim]
  double* dsinks;          // per query head
};

// What one thread works in. "_words" holds two rows (of keys, queries) per word, "_t" is transposed. Not initialised.
struct PairBuffers {
  Scratch memory;
  uint16_t *keys, *values, *rows, *weights, *dweights;
  uint32_t *keys_t, *values_t, *words, *queries_t, *dout_t, *queries_words, *dout_words, *weights_words;
  double* dsinks;
  float *dkeys, *dvalues, *scores, *dscores, *out_t;

  PairBuffers(const AttentionShape& shape, bool backward) {
    const int64_t dim = round_up(shape.dim, kPairPad), keys_all = round_up(longest_keys(shape), kPairKeys);
    const int64_t tile = kPairQueries * kPairKeys, strip = kPairQueries * kMostStrip;
    const int64_t document = keys_all * dim, block = kPairKeys * dim;
    for (int pass = 0; pass < 2; ++pass) {  // measure, then hand out
      char* const start = memory.data<char>();
      char* next = start;
      const auto take = [&](auto*& pointer, int64_t size) {
        pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(next);
        next += round_up(size * sizeof(*pointer), 64);
      };
      take(keys, document), take(values, document), take(rows, std::max(block, kPairQueries * dim)),
          take(words, std::max(block, kPairQueries * dim) / 2);
      take(queries_t, kPairQueries * dim / 2), take(scores, strip), take(weights_words, tile / 2);
      take(out_t, kPairQueries * dim);
      if (backward) {
        take(keys_t, document / 2), take(dkeys, document), take(dvalues, document);
        take(dsinks, shape.heads);
        take(dout_t, kPairQueries * dim / 2), take(queries_words, kPairQueries * dim / 2);
        take(dout_words, kPairQueries * dim / 2), take(dscores, strip), take(weights, tile), take(dweights, tile);
      } else {
        take(values_t, document / 2);
      }
      if (pass == 0) memory = Scratch(next - start);
    }
  }
};

}  // namespace megalite

// The kernels once per unit that multiplies pairs.
#if MEGALITE_X86
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")
#define MEGALITE_VECTOR_BF16 1
#define LANES 16
namespace megalite::avx512_bf16 {
#define ISA_NAMESPACE avx512_bf16
#define MEGALITE_PAIR_PRODUCTS "pairs.inc"
#include "attention_pairs.inc"
#undef MEGALITE_PAIR_PRODUCTS
#undef ISA_NAMESPACE
}  // namespace megalite::avx512_bf16
#pragma GCC pop_options

#if MEGALITE_AMX
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,amx-tile,amx-bf16")
#define MEGALITE_PAIR_PRODUCTS "tiles.inc"
namespace megalite::amx {
#define ISA_NAMESPACE amx
#define MEGALITE_TILES_EMULATED 0
#include "attention_pairs.inc"
#undef MEGALITE_TILES_EMULATED
#undef ISA_NAMESPACE
}  // namespace megalite::amx
#undef MEGALITE_PAIR_PRODUCTS
#undef MEGALITE_TILE_ZERO
#undef MEGALITE_TILE_LOAD
#undef MEGALITE_TILE_STORE
#undef MEGALITE_TILE_DOT
#pragma GCC pop_options
#endif
#undef LANES
#undef MEGALITE_VECTOR_BF16
#endif

namespace megalite::amx_emulated {
#define ISA_NAMESPACE amx_emulated
#define LANES 4
#define MEGALITE_VECTOR_BF16 0
#define MEGALITE_PAIR_PRODUCTS "tiles.inc"
#define MEGALITE_TILES_EMULATED 1
#include "attention_pairs.inc"
}  // namespace megalite::amx_emulated

namespace megalite {

namespace {

struct PairKernels {
  decltype(&amx_emulated::forward_task) forward;
  decltype(&amx_emulated::backward_task) backward;
  decltype(&amx_emulated::write_keys) write_keys;
};

PairKernels pair_kernels() {
#if MEGALITE_X86
  if (pair_unit() == PairUnit::avx512_bf16)
    return {avx512_bf16::forward_task, avx512_bf16::backward_task, avx512_bf16::write_keys};
#endif
#if MEGALITE_AMX
  if (pair_unit() == PairUnit::amx) return {amx::forward_task, amx::backward_task, amx::write_keys};
#endif
  return {amx_emulated::forward_task, amx_emulated::backward_task, amx_emulated::write_keys};
}

// Parts to cut each of `tasks` tasks into, so that no thread waits long for the last one.
int64_t parts_of_task(int64_t tasks, int64_t threads, int64_t most) {
  if (threads == 1 || tasks == 0 || tasks >= 2 * threads) return 1;
  return std::max<int64_t>(1, std::min((2 * threads + tasks - 1) / tasks, most));
}

int64_t most_blocks(const AttentionShape& shape) {
  int64_t longest = 0;
  for (int64_t i = 0; i < shape.num_segments; ++i) longest = std::max(longest, shape.segments[i].q_len);
  return round_up(longest, kPairQueries) / kPairQueries;
}

// The parts of each task keep their sums apart, in memory that outlives the thread; then they are added in order.
void backward_in_parts(const AttentionBackward& arguments, const PairKernels& kernels, int64_t parts, int threads) {
  const AttentionShape& shape = arguments.shape;
  const int64_t tasks = shape.num_segments * shape.kv_heads, groups = shape.heads / shape.kv_heads;
  const int64_t document = round_up(longest_keys(shape), kPairKeys) * round_up(shape.dim, kPairPad);
  const Scratch memory(tasks * parts * 2 * document * sizeof(float));
  std::vector<double> dsinks(tasks * parts * groups);
  std::vector<KeySums> sums(tasks * parts);
  for (int64_t i = 0; i < tasks * parts; ++i)
    sums[i] = {memory.data<float>() + 2 * i * document, memory.data<float>() + (2 * i + 1) * document,
               dsinks.data() + i * groups};
  run_tasks<PairBuffers>(shape, true, tasks * parts, threads, [&](int64_t i, const PairBuffers& b) {
    const int64_t task = i / parts;
    kernels.backward(arguments, task / shape.kv_heads, task % shape.kv_heads, i % parts, parts, sums[i], b);
  });
#ifdef _OPENMP
#pragma omp parallel for schedule(static) num_threads(threads)
#endif
  for (int64_t i = 0; i < tasks; ++i)
    kernels.write_keys(arguments, i / shape.kv_heads, i % shape.kv_heads, &sums[i * parts], parts);
}

}  // namespace

bool attention_forward_pairs(const AttentionForward& arguments, int threads) {
  if (pair_unit() == PairUnit::none) return false;
  const PairKernels kernels = pair_kernels();
  const AttentionShape& shape = arguments.shape;
  const int64_t tasks = shape.num_segments * shape.kv_heads;
  const int64_t parts = parts_of_task(tasks, threads, most_blocks(shape) * shape.heads / shape.kv_heads);
  run_tasks<PairBuffers>(shape, false, tasks * parts, threads, [&](int64_t i, const PairBuffers& b) {
    const int64_t task = i / parts;
    kernels.forward(arguments, task / shape.kv_heads, task % shape.kv_heads, i % parts, parts, b);
  });
  return true;
}

bool attention_backward_pairs(const AttentionBackward& arguments, int threads) {
  if (pair_unit() == PairUnit::none) return false;
  const PairKernels kernels = pair_kernels();
  const AttentionShape& shape = arguments.shape;
  const int64_t tasks = shape.num_segments * shape.kv_heads;
  const int64_t parts = parts_of_task(tasks, threads, most_blocks(shape) * shape.heads / shape.kv_heads);
  if (parts > 1) return backward_in_parts(arguments, kernels, parts, threads), true;
  run_tasks<PairBuffers>(shape, true, tasks, threads, [&](int64_t i, const PairBuffers& b) {
    const KeySums sums{b.dkeys, b.dvalues, b.dsinks};
    kernels.backward(arguments, i / shape.kv_heads, i % shape.kv_heads, 0, 1, sums, b);
    kernels.write_keys(arguments, i / shape.kv_heads, i % shape.kv_heads, &sums, 1);
  });
  return true;
}

}  // namespace megalite
