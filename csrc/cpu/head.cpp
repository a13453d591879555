// The loss head without logits: they are made twice, once for their maximum and sum of exponentials, once for the
// gradient, and each time used while they are in the caches. Making them again costs 67 of 268 GFLOP at 2,048 x 512 x
// 32,000; storing 131 MB and reading it back takes longer where matrix tiles multiply. Each thread owns a range of
// classes. A block of its rows of the weight is packed once and stays in the second cache; all tokens pass by in
// panels of 32. Logits are made transposed, [class][token]: a token is a lane, so sums over classes need no
// shuffling; and two rows of them are words of the right factor of dx^T = weight^T dlogits^T, one row is a row of the
// left factor of dweight = dlogits^T x. Sums of dweight go to memory once, those of dx are one per thread.
#include "head.h"

#include "scratch.h"

#if MEGALITE_AMX
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,amx-tile,amx-bf16")
namespace megalite::head_tiles {
#define ISA_NAMESPACE head_tiles
#define LANES 16
#define MEGALITE_VECTOR_BF16 1
#define MEGALITE_TILES_EMULATED 0
#include "vec.inc"
//
#include "head.inc"
#undef MEGALITE_TILES_EMULATED
#undef MEGALITE_TILE_ZERO
#undef MEGALITE_TILE_LOAD
#undef MEGALITE_TILE_LOAD_ONCE
#undef MEGALITE_TILE_STORE
#undef MEGALITE_TILE_DOT
#undef MEGALITE_VECTOR_BF16
#undef LANES
#undef ISA_NAMESPACE
}  // namespace megalite::head_tiles
#pragma GCC pop_options
#endif

namespace megalite::head_tiles_emulated {
#define ISA_NAMESPACE head_tiles_emulated
#define LANES 4
#define MEGALITE_VECTOR_BF16 0
#define MEGALITE_TILES_EMULATED 1
#include "vec.inc"
//
#include "head.inc"
}  // namespace megalite::head_tiles_emulated

#if MEGALITE_AMX
#define MEGALITE_HEAD(function) (pair_unit() == PairUnit::amx ? head_tiles::function : head_tiles_emulated::function)
#else
#define MEGALITE_HEAD(function) head_tiles_emulated::function
#endif

namespace megalite {

namespace {

constexpr int64_t kSquare = 32;
constexpr int64_t kStatBytes = 512 << 10;  // of the weight's rows that stay in the second cache
constexpr int64_t kGradBytes = 256 << 10;  // beside as much again turned, and twice as much of dweight's sums

// Memory for several arrays, each from a page on.
class Arena {
 public:
  template <class T>
  T* take(int64_t size) {
    return memory_.emplace_back(size * sizeof(T)).template data<T>();
  }

 private:
  std::vector<Scratch> memory_;
};

int64_t features_of(const HeadInputs& in) { return round_up(in.features, kSquare); }

int64_t block_of(const HeadInputs& in, int64_t bytes) {
  return std::max(kSquare, bytes / (features_of(in) * 2) / kSquare * kSquare);
}

int parts_of(const HeadInputs& in, int threads) {
  const int64_t strips = divide_up(in.classes, kSquare);
  return static_cast<int>(std::min<int64_t>(strips, parts_for(in.tokens * in.classes / 32 * in.features, threads)));
}

// Ranges of whole squares of classes, one per part.
HeadPart part_of(const HeadInputs& in, int64_t begin, int64_t end) {
  return {begin * kSquare, std::min(in.classes, end * kSquare)};
}

// Tokens [begin, end) of the whole.
HeadInputs chunk_of(HeadInputs in, int64_t begin, int64_t end) {
  in.x = static_cast<const bf16*>(in.x) + begin * in.features;
  in.target += begin;
  in.tokens = end - begin;
  return in;
}

// What depends on the tokens alone.
void pack_tokens(HeadArguments& a, Arena& arena, int64_t start, bool pairs, int threads) {
  const int64_t padded = round_up(a.in.tokens, kSquare);
  a.features = features_of(a.in);
  int32_t* target = arena.take<int32_t>(padded);
  for (int64_t t = 0; t < padded; ++t) {
    const int64_t here = t >= a.in.tokens || a.in.target[t] == a.options.ignore_index ? -1 : a.in.target[t] - start;
    target[t] = static_cast<int32_t>(here >= 0 && here < a.in.classes ? here : -1);
  }
  a.tokens.count = a.in.tokens, a.tokens.padded = padded, a.tokens.target = target;
  uint32_t* columns = arena.take<uint32_t>(padded * a.features / 2);
  uint32_t* across = pairs ? arena.take<uint32_t>(padded * a.features / 2) : nullptr;
  parallel_ranges(parts_for(padded * a.features, threads), padded / kSquare, [&](int, int64_t begin, int64_t end) {
    MEGALITE_HEAD(head_pack_tokens)(a, begin, end, columns, across);
  });
  a.columns = columns, a.pairs = across;
}

// The statistics of the parts as those of all classes: four values of token t.
struct TokenStats {
  float top;
  double total, plain, at_target;
};

TokenStats combined(const std::vector<HeadStats>& parts, int64_t t) {
  TokenStats all{-std::numeric_limits<float>::infinity(), 0.0, 0.0, 0.0};
  for (const HeadStats& part : parts) all.top = std::max(all.top, part.top[t]);
  const double shift = std::isinf(all.top) ? 0.0 : all.top;
  for (const HeadStats& part : parts) {
    const double from = std::isinf(part.top[t]) ? 0.0 : part.top[t];
    all.total += part.total[t] == 0.0f ? 0.0 : part.total[t] * std::exp(from - shift);
    all.plain += part.plain[t], all.at_target += part.at_target[t];
  }
  if (std::isnan(all.total)) all.top = std::numeric_limits<float>::quiet_NaN();
  return all;
}

// Calls body(token, statistics) for every token.
template <class Body>
void for_stats(const HeadInputs& whole, int64_t start, const LossOptions& options, int threads, const Body& body) {
  const int parts = parts_of(whole, threads);
  for (int64_t from = 0; from < whole.tokens; from += whole.chunk) {
    HeadArguments a{};
    a.in = chunk_of(whole, from, std::min(whole.tokens, from + whole.chunk)), a.options = options;
    a.block = block_of(a.in, kStatBytes);
    Arena arena;
    pack_tokens(a, arena, start, false, threads);
    std::vector<HeadStats> stats(parts);
    for (HeadStats& part : stats) {
      float* memory = arena.take<float>(4 * a.tokens.padded);
      part = {memory, memory + a.tokens.padded, memory + 2 * a.tokens.padded, memory + 3 * a.tokens.padded};
      std::fill_n(memory, 4 * a.tokens.padded, 0.0f);
      std::fill_n(part.top, a.tokens.padded, -std::numeric_limits<float>::infinity());
    }
    std::vector<uint32_t*> blocks(parts);
    for (auto& block : blocks) block = arena.take<uint32_t>(a.block * a.features / 2);
    parallel_ranges(parts, divide_up(a.in.classes, kSquare), [&](int part, int64_t begin, int64_t end) {
      MEGALITE_HEAD(head_stat_part)(a, part_of(a.in, begin, end), stats[part], blocks[part]);
    });
    for (int64_t t = 0; t < a.in.tokens; ++t) body(from + t, combined(stats, t));
  }
}

// What the gradient of each token's row needs.
void describe_gradients(HeadArguments& a, Arena& arena, const float* lse, const float* scale, int64_t scale_stride,
                        int64_t vocabulary) {
  const int64_t padded = a.tokens.padded;
  float* values = arena.take<float>(4 * padded);
  int32_t* keep = arena.take<int32_t>(padded);
  std::fill_n(values, 4 * padded, 0.0f);
  for (int64_t t = 0; t < padded; ++t) {
    keep[t] = t < a.in.tokens && a.in.target[t] != a.options.ignore_index ? -1 : 0;
    if (keep[t] == 0) continue;
    const float whole = scale[t * scale_stride], smoothing = a.options.label_smoothing;
    values[t] = lse[t];
    values[padded + t] = whole * (1.0f + 2.0f * a.options.z_loss * lse[t]);
    values[2 * padded + t] = whole * smoothing / static_cast<float>(vocabulary);
    values[3 * padded + t] = whole * (1.0f - smoothing);
  }
  a.tokens.lse = values, a.tokens.gain = values + padded, a.tokens.smooth = values + 2 * padded;
  a.tokens.hit = values + 3 * padded, a.tokens.keep = keep;
}

HeadBuffers buffers_for(const HeadArguments& a, Arena& arena, float* dx) {
  const int64_t block = a.block * a.features;
  HeadBuffers b{};
  b.rows = arena.take<uint32_t>(block / 2), b.turned = arena.take<uint32_t>(block / 2);
  b.grads = arena.take<uint32_t>(a.block * kGradTokens / 2);
  b.grad_pairs = arena.take<uint32_t>(a.block * kSquare / 2);
  b.dweight = arena.take<float>(block), b.dbias = arena.take<float>(a.block), b.dx = dx;
  return b;
}

}  // namespace

int64_t head_forward(HeadInputs in, float* loss, float* lse, LossOptions options, int threads) {
  for (int64_t t = 0; t < in.tokens; ++t)
    if (in.target[t] != options.ignore_index && (in.target[t] < 0 || in.target[t] >= in.classes)) return t;
  const double smoothing = options.label_smoothing;
  for_stats(in, 0, options, threads, [&](int64_t t, const TokenStats& s) {
    const double whole = static_cast<double>(s.top) + std::log(s.total);
    double value = whole - (1.0 - smoothing) * s.at_target + options.z_loss * whole * whole;
    if (smoothing != 0.0) value -= smoothing * s.plain / static_cast<double>(in.classes);
    loss[t] = in.target[t] == options.ignore_index ? 0.0f : static_cast<float>(value);
    lse[t] = static_cast<float>(whole);
  });
  return -1;
}

void head_stats(HeadInputs in, int64_t start, float* stats, LossOptions options, int threads) {
  for_stats(in, start, options, threads, [&](int64_t t, const TokenStats& s) {
    const double values[4] = {s.top, s.total, s.at_target, s.plain};
    for (int i = 0; i < 4; ++i) stats[i * in.tokens + t] = static_cast<float>(values[i]);
  });
}

void head_backward(HeadInputs whole, int64_t start, int64_t vocabulary, const float* lse, const float* scale,
                   int64_t scale_stride, void* dx, float* dweight, bool add, float* dbias, LossOptions options,
                   int threads) {
  const int parts = parts_of(whole, threads);
  const int64_t strips = divide_up(whole.classes, kSquare);
  for (int64_t from = 0; from < whole.tokens; from += whole.chunk) {
    HeadArguments a{};
    a.in = chunk_of(whole, from, std::min(whole.tokens, from + whole.chunk)), a.options = options;
    a.block = std::min(block_of(a.in, kGradBytes), divide_up(strips, parts) * kSquare);
    a.dweight = dweight, a.add = add || from > 0, a.dbias = dbias, a.add_bias = from > 0;
    Arena arena;
    pack_tokens(a, arena, start, true, threads);
    describe_gradients(a, arena, lse + from, scale + from * scale_stride, scale_stride, vocabulary);
    const int64_t size = a.tokens.padded * a.features;
    float* sums = arena.take<float>(parts * size);
    std::vector<HeadBuffers> buffers(parts);
    for (int i = 0; i < parts; ++i) buffers[i] = buffers_for(a, arena, sums + i * size);
    parallel_ranges(parts, strips, [&](int part, int64_t begin, int64_t end) {
      MEGALITE_HEAD(head_grad_part)(a, part_of(a.in, begin, end), buffers[part]);
    });
    parallel_ranges(parts_for(size, threads), a.tokens.padded / kSquare, [&](int, int64_t begin, int64_t end) {
      MEGALITE_HEAD(head_write_dx)(a, begin, end, sums, parts, static_cast<bf16*>(dx) + from * a.in.features);
    });
  }
}

}  // namespace megalite
