// Attention of bf16 tensors on instructions that multiply bf16 pairs.
#include <new>

#include "attention.h"

namespace megalite {

// A block is 64 queries (lanes) by 96 keys (rows): its float scores (24 KB) and bf16 weights (12 KB) stay in the first
// two cache levels, and 96 is a multiple of 6 rows, of 16 words and of 32 keys.
constexpr int64_t kPairQueries = 64, kPairKeys = 96, kPairPad = 32;

// What one thread works in. "_words" holds two rows (of keys, queries) per word, "_t" is transposed. Not initialised.
struct PairBuffers {
  char* memory;
  uint16_t *keys, *values, *rows, *weights, *dweights;
  uint32_t *keys_t, *values_t, *words, *queries_t, *dout_t, *queries_words, *dout_words, *weights_words;
  float *dkeys, *dvalues, *scores, *dscores, *out_t, *out;

  PairBuffers(const AttentionShape& shape, bool backward) {
    const int64_t dim = round_up(shape.dim, kPairPad), keys_all = round_up(longest_keys(shape), kPairKeys);
    const int64_t tile = kPairQueries * kPairKeys, document = keys_all * dim, block = kPairKeys * dim;
    int64_t bytes = 0;
    memory = nullptr;
    for (int pass = 0; pass < 2; ++pass) {  // measure, then hand out
      char* next = memory;
      const auto take = [&](auto*& pointer, int64_t size) {
        pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(next);
        next += round_up(size * sizeof(*pointer), 64);
      };
      take(keys, document), take(rows, block), take(words, block / 2);
      take(queries_t, kPairQueries * dim / 2), take(scores, tile), take(weights_words, tile / 2);
      take(out_t, kPairQueries * dim), take(out, kPairQueries * dim);
      if (backward) {
        take(values, document), take(keys_t, document / 2), take(dkeys, document), take(dvalues, document);
        take(dout_t, kPairQueries * dim / 2), take(queries_words, kPairQueries * dim / 2);
        take(dout_words, kPairQueries * dim / 2), take(dscores, tile), take(weights, tile), take(dweights, tile);
      } else {
        take(values_t, document / 2);
      }
      bytes = next - memory;
      if (pass == 0) memory = static_cast<char*>(::operator new(bytes, std::align_val_t(64)));
    }
  }
  ~PairBuffers() { ::operator delete(memory, std::align_val_t(64)); }
  PairBuffers(const PairBuffers&) = delete;
  PairBuffers& operator=(const PairBuffers&) = delete;
};

}  // namespace megalite

#if MEGALITE_X86
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")
namespace megalite::avx512_bf16 {
#define ISA_NAMESPACE avx512_bf16
#define LANES 16
#include "vec.inc"
//
#include "pairs.inc"
#include "transpose.inc"
//
#include "attention_pairs.inc"
#undef LANES
#undef ISA_NAMESPACE
}  // namespace megalite::avx512_bf16
#pragma GCC pop_options
#endif

namespace megalite {

bool attention_forward_pairs(const AttentionForward& arguments, int threads) {
#if MEGALITE_X86
  const AttentionShape& shape = arguments.shape;
  if (isa() < Isa::avx512_bf16) return false;
  // A task is a query head: packing the keys anew for each costs 4 / k_len of its products.
  run_tasks<PairBuffers>(shape, false, shape.num_segments * shape.heads, threads, [&](int64_t i, const PairBuffers& b) {
    avx512_bf16::forward_task(arguments, i / shape.heads, i % shape.heads, b);
  });
  return true;
#else
  return (void)arguments, (void)threads, false;
#endif
}

bool attention_backward_pairs(const AttentionBackward& arguments, int threads) {
#if MEGALITE_X86
  const AttentionShape& shape = arguments.shape;
  if (isa() < Isa::avx512_bf16) return false;
  run_tasks<PairBuffers>(shape, true, shape.num_segments * shape.kv_heads, threads,
                         [&](int64_t i, const PairBuffers& b) {
                           avx512_bf16::backward_task(arguments, i / shape.kv_heads, i % shape.kv_heads, b);
                         });
  return true;
#else
  return (void)arguments, (void)threads, false;
#endif
}

}  // namespace megalite
