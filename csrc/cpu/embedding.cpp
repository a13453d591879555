// Gradient of an embedding: a counting sort of the tokens by id, then each row's sum in the order of its tokens.
#include "common.h"

namespace megalite {

struct EmbeddingArguments {
  const void* dy;
  const int64_t *starts, *order;  // tokens of row r: order[starts[r]] .. order[starts[r + 1] - 1]
  void* dweight;
  int64_t cols;
};

}  // namespace megalite

#define MEGALITE_KERNELS "embedding.inc"
#include "foreach_isa.h"

namespace megalite {

namespace {

// Tokens by id, in their order. Returns the first token whose id is out of range, or -1.
int64_t sort_by_id(const int64_t* ids, int64_t tokens, int64_t rows, std::vector<int64_t>& starts,
                   std::vector<int64_t>& order) {
  starts.assign(rows + 2, 0);
  order.resize(tokens);
  for (int64_t t = 0; t < tokens; ++t) {
    if (ids[t] < 0 || ids[t] >= rows) return t;
    ++starts[ids[t] + 2];
  }
  for (int64_t r = 2; r <= rows; ++r) starts[r] += starts[r - 1];
  for (int64_t t = 0; t < tokens; ++t) order[starts[ids[t] + 1]++] = t;
  return -1;
}

template <class Kernel>
int64_t by_rows(EmbeddingArguments arguments, const int64_t* ids, int64_t tokens, int64_t rows, int threads,
                Kernel kernel) {
  std::vector<int64_t> starts, order;
  const int64_t bad = sort_by_id(ids, tokens, rows, starts, order);
  if (bad >= 0) return bad;
  arguments.starts = starts.data();
  arguments.order = order.data();
  const int parts = parts_for(tokens * arguments.cols, threads);
  // Parts of about equally many tokens: words are not equally frequent.
  parallel_ranges(parts, tokens, [&](int part, int64_t begin, int64_t end) {
    const auto row_of = [&](int64_t token) {
      return std::lower_bound(starts.begin(), starts.begin() + rows, token) - starts.begin();
    };
    std::vector<float> sums(arguments.cols);
    kernel(arguments, part == 0 ? 0 : row_of(begin), part == parts - 1 ? rows : row_of(end), sums.data());
  });
  return -1;
}

}  // namespace

int64_t embedding_backward(DType dtype, const void* dy, const int64_t* ids, void* dweight, int64_t tokens, int64_t rows,
                           int64_t cols, int threads) {
  const EmbeddingArguments arguments{dy, nullptr, nullptr, dweight, cols};
  MEGALITE_WITH_TYPE(dtype,
                     { return by_rows(arguments, ids, tokens, rows, threads, MEGALITE_PICK(embedding_rows<T>)); });
}

int64_t embedding_accumulate(DType dtype, const void* dy, const int64_t* ids, float* main_grad, int64_t tokens,
                             int64_t rows, int64_t cols, int threads) {
  const EmbeddingArguments arguments{dy, nullptr, nullptr, main_grad, cols};
  MEGALITE_WITH_TYPE(dtype,
                     { return by_rows(arguments, ids, tokens, rows, threads, MEGALITE_PICK(embedding_add_rows<T>)); });
}

}  // namespace megalite
