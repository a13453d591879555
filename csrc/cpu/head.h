// What head.cpp and head.inc share.
#pragma once
#include "common.h"

namespace megalite {

// A chunk of tokens, padded to squares: what each token's row of logits needs.
struct HeadTokens {
  int64_t count, padded;
  // Class of the target within the shard, or negative.
  const int32_t* target;
  // Of the gradient: it is (exp(s - lse) * gain - smooth - hit at the target), 0 where keep is 0 (all bits set: kept).
  const float *lse, *gain, *smooth, *hit;
  const int32_t* keep;
};

// A part of the classes, whose rows of the weight one thread takes.
struct HeadPart {
  int64_t begin, end;
};

struct HeadArguments {
  HeadInputs in;
  LossOptions options;
  HeadTokens tokens;
  const uint32_t* columns;  // x as right tiles: pairs of features by tokens, [token / 32][feature / 32][2]
  const uint32_t* pairs;    // x as right tiles: pairs of tokens by features, [feature / 32][token / 32][2]
  int64_t features;         // padded
  int64_t block;            // classes taken at once
  float* dweight;
  bool add;  // what is in dweight stays
  float* dbias;
  bool add_bias;
};

// Whose gradients wait for the product that makes dweight: with 256 its sums came and went too often (1.06 times).
constexpr int64_t kGradTokens = 512;

// What a thread works in.
struct HeadBuffers {
  uint32_t *rows, *turned;  // the weight's block, as it stands and with classes as its inner dimension
  uint32_t* grads;          // of kGradTokens tokens, left tiles [class / 32][token / 32][2]
  uint32_t* grad_pairs;     // of 32 tokens, right tiles [class / 32][2]
  float *dweight, *dbias;   // sums of the block, squares [class / 32][feature / 32]
  float* dx;                // sums of the part, squares [token / 32][feature / 32]
};

// Running statistics of one part, [tokens.padded] each.
struct HeadStats {
  float *top, *total, *plain, *at_target;
};

}  // namespace megalite
