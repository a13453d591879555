// What gemm.cpp and gemm.inc share.
#pragma once
#include "common.h"

namespace megalite {

struct Product {
  Factor left, right;
  const void* bias;
  void* out;
  int64_t out_stride;
  bool add;
  int64_t rows, cols, inner;
  bool direct;               // the left factor's own rows are rows of words
  bool past_caches = false;  // out is stored without being read into them
};

struct Span {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// A tile in registers is `rows` x `cols`; a word holds `inner` elements of the inner dimension, or with more `planes`
// each of those words a part of them, and words go by `step`.
// The inner dimension is packed by `words` and goes by `deep` of them; `near` of the left factor stay in the second
// cache, and `sums` of sums, or the sums of `sum_columns`.
struct GemmSizes {
  int64_t rows, cols, inner, step, planes, words, deep, near, sums, sum_columns;
};

// Memory of one thread, in words. Each part starts at a page.
struct GemmScratch {
  uint32_t *left, *right, *sums;
};

// How one thread cuts its part of the product; words of one plane.
struct GemmBlocks {
  int64_t words;  // of the inner dimension, the most that are packed at once
  int64_t deep;   // of those, the most that are multiplied at once
  int64_t rows;   // of the left factor in the second cache, with a panel
  int64_t cols;   // of the right factor packed at once
  bool whole;     // the inner dimension is not cut
};

// A span as pieces of `size`, the last one smaller.
struct Pieces {
  struct Iterator {
    Span left;
    int64_t size;
    Span operator*() const { return {left.begin, std::min(left.end, left.begin + size)}; }
    void operator++() { left.begin += size; }
    bool operator!=(const Iterator&) const { return left.begin < left.end; }
  };
  Span span;
  int64_t size;
  Iterator begin() const { return {span, size}; }
  Iterator end() const { return {span, size}; }
};

inline Pieces pieces(Span span, int64_t size) { return {span, size}; }

}  // namespace megalite
