// Every launcher's declaration, once. Pointers are to contiguous rows unless a stride says otherwise; strides and
// sizes count elements. `threads` is how many parts the rows are cut into: results have the same bits for the
// same number. Element types of activations are given at run time, statistics and weights are float.
#pragma once
#include <cstdint>

namespace megalite {

enum class DType : int { float32 = 0, bfloat16 = 1, float16 = 2 };
enum class Activation : int { silu = 0, gelu_tanh = 1, relu2 = 2, gelu = 3 };

// The instruction set in use ("scalar", "avx2", "avx512", "avx512_bf16", "amx" or "amx_emulated"): the best of this CPU
// (the emulation is for tests), or what MEGALITE_ISA asks for. Throws std::invalid_argument if MEGALITE_ISA is not a
// known name or this CPU lacks it.
const char* isa_name();

// A norm's weight [cols] of any type, which is made float, and 1 added, before anything is computed.
struct Gain {
  DType dtype;
  const void* weight;
  bool zero_centered;  // the gain is weight + 1
};

// y = x * rstd * gain, rstd = 1 / sqrt(mean(x^2) + eps). With a residual, x + residual takes the place
// of x and is stored in total.
void rms_norm_forward(DType dtype, const void* x, const void* residual, Gain gain, void* y, void* total, float* rstd,
                      int64_t rows, int64_t cols, float eps, int threads);

// dx (plus dresidual if not null) and dweight [cols] of the weight's type. All backwards here make y again where it is
// not null, with the forward's bits.
void rms_norm_backward(DType dtype, const void* dy, const void* dresidual, const void* x, Gain gain, const float* rstd,
                       void* dx, void* dweight, void* y, int64_t rows, int64_t cols, int threads);

// y = (x - mean) * rstd * weight + bias (bias may be null); residual and total as in rms_norm_forward.
void layer_norm_forward(DType dtype, const void* x, const void* residual, const float* weight, const float* bias,
                        void* y, void* total, float* mean, float* rstd, int64_t rows, int64_t cols, float eps,
                        int threads);

void layer_norm_backward(DType dtype, const void* dy, const void* dresidual, const void* x, const float* weight,
                         const float* bias, const float* mean, const float* rstd, void* dx, float* dweight,
                         float* dbias, void* y, int64_t rows, int64_t cols, int threads);

// [tokens, heads, dim] with any strides of tokens and heads; features are side by side.
struct Strided {
  const void* data;
  int64_t token, head;
};

// cos and sin are [cos_rows, half]; token t uses row t % cos_rows. Features from 2 * half on are not rotated.
struct RopeShape {
  const float *cos, *sin;
  int64_t tokens, heads, dim, half, cos_rows;
  bool interleaved;
};

// Rotates x into out, which may be x itself.
void rope(DType dtype, Strided x, Strided out, RopeShape shape, bool inverse, int threads);

// RMSNorm of every head (rstd is [tokens * heads]), then the rotation; out is contiguous.
void rope_norm_forward(DType dtype, Strided x, const float* weight, void* out, float* rstd, RopeShape shape, float eps,
                       int threads);

// dx contiguous, dweight [dim].
void rope_norm_backward(DType dtype, Strided dy, Strided x, const float* weight, const float* rstd, void* dx,
                        float* dweight, RopeShape shape, int threads);

// dweight [rows, cols]: row r is the sum of dy [tokens, cols] over the tokens with id r, in their order, rounded once.
// Returns the first token whose id is out of range (then nothing is written), or -1.
int64_t embedding_backward(DType dtype, const void* dy, const int64_t* ids, void* dweight, int64_t tokens, int64_t rows,
                           int64_t cols, int threads);

// The same sums, added into main_grad.
int64_t embedding_accumulate(DType dtype, const void* dy, const int64_t* ids, float* main_grad, int64_t tokens,
                             int64_t rows, int64_t cols, int threads);

void activation_forward(DType dtype, Activation kind, const void* x, void* y, int64_t size, int threads);
void activation_backward(DType dtype, Activation kind, const void* dy, const void* x, void* dx, void* y, int64_t size,
                         int threads);

// y [rows, cols] = activation(gate) * up; rows of gate and up (and of their gradients) are `stride` apart.
void gated_forward(DType dtype, Activation kind, const void* gate, const void* up, void* y, int64_t rows, int64_t cols,
                   int64_t stride, int threads);
void gated_backward(DType dtype, Activation kind, const void* dy, const void* gate, const void* up, void* dgate,
                    void* dup, void* y, int64_t rows, int64_t cols, int64_t stride, int threads);

struct LossOptions {
  int64_t ignore_index;
  float label_smoothing, z_loss, softcap;  // softcap 0: none
};

// Logits [rows, cols] whose rows are `stride` apart, and the target of each row.
struct LossRows {
  DType dtype;
  const void* logits;
  int64_t stride;
  const int64_t* target;
  int64_t rows, cols;
};

// The classes start .. start + cols of a vocabulary, as the columns of the logits.
struct VocabularyShard {
  int64_t start, cols, vocabulary;
};

// loss and lse [rows]. Returns the first row whose target is out of range, or -1.
int64_t cross_entropy_forward(LossRows in, float* loss, float* lse, LossOptions options, int threads);

// What one shard adds: [4, rows] = maximum, sum of exp(s - maximum), s at the target (0 in other shards), sum of s
// (0 without label smoothing).
void cross_entropy_stats(LossRows in, int64_t start, float* stats, LossOptions options, int threads);

// dlogits from the lse over the whole vocabulary; scale is [rows], or one value for all if scale_stride is 0. dlogits
// may be logits.
void cross_entropy_backward(LossRows in, int64_t start, int64_t vocabulary, const float* lse, const float* scale,
                            int64_t scale_stride, void* dlogits, int64_t dlogits_stride, LossOptions options,
                            int threads);

// Forward and backward, row by row while the row is in cache; the logits are overwritten with their gradient.
int64_t cross_entropy_grad(LossRows in, const float* scale, int64_t scale_stride, float* loss, float* lse,
                           LossOptions options, int threads);

// The loss head: logits = x weight^T + bias, x [tokens, features] and the first `classes` rows of weight, contiguous
// bf16; bias [classes] may be null. Tokens are taken `chunk` at a time, a multiple of 32.
struct HeadInputs {
  const void *x, *weight, *bias;
  const int64_t* target;
  int64_t tokens, classes, features, chunk;
};

// As cross_entropy_forward, _stats and _backward of the logits, which are never stored: float sums, not rounded. For
// the instruction sets with matrix tiles, "amx" and "amx_emulated".
int64_t head_forward(HeadInputs in, float* loss, float* lse, LossOptions options, int threads);
void head_stats(HeadInputs in, int64_t start, float* stats, LossOptions options, int threads);

// dx like x, dweight [classes, features] and dbias [classes] (may be null) from the lse over the whole vocabulary; with
// `add` dweight is added to.
void head_backward(HeadInputs in, int64_t start, int64_t vocabulary, const float* lse, const float* scale,
                   int64_t scale_stride, void* dx, float* dweight, bool add, float* dbias, LossOptions options,
                   int threads);

// out [size] = x * scale, computed in float.
void scaled_copy(DType from, const void* x, float scale, DType to, void* out, int64_t size, int threads);

// One document (or batch row). Starts are tokens; lse_start is an offset.
struct Segment {
  int64_t q_start, q_len, k_start, k_len, lse_start;
};

// Pairs of features (i, i + half) of token t turn by the angles in row t % rows, as in `rope`; half 0: none do.
struct Rotation {
  const float *cos, *sin;
  int64_t half, rows;
};

struct AttentionShape {
  const Segment* segments;
  int64_t num_segments, heads, kv_heads, dim, lse_head_stride;
  bool causal;
  int64_t window;  // 0: none
  int64_t offset;  // query i stands at key position i + k_len - q_len + offset, maybe outside the keys
  float softcap;   // 0: none
  float scale;
  const float* sinks;  // [heads], may be null
  Rotation rotation;   // of q and k as they are read; dq and dk are turned back
};

// out [tokens, heads, dim] contiguous; lse at lse_start + head * lse_head_stride + query.
void attention_forward(DType dtype, Strided q, Strided k, Strided v, void* out, float* lse, AttentionShape shape,
                       int threads);

// dlse, laid out as lse, may be null. dsinks [segments, heads] is written if there are sinks: each document's share.
void attention_backward(DType dtype, Strided dout, const float* dlse, Strided q, Strided k, Strided v, Strided out,
                        const float* lse, Strided dq, Strided dk, Strided dv, float* dsinks, AttentionShape shape,
                        int threads);

// [rows, inner] where `inner_last`, else [inner, rows]; memory's rows are `stride` apart.
struct Factor {
  const void* data;
  int64_t stride;
  bool inner_last;
};

// out [left rows, right rows] = left right^T + bias (may be null), or with `add` (out is float) out += left right^T.
// Float sums over the whole inner dimension, in an order that depends on its size alone: the same bits for any number
// of threads. Out is float or like the factors, the bias like out; inner is at least 1.
void gemm(DType dtype, Factor left, Factor right, const void* bias, DType out_dtype, void* out, int64_t out_stride,
          bool add, int64_t rows, int64_t cols, int64_t inner, int threads);

struct AdamWOptions {
  float beta1, beta2, eps;
  float decay;            // 1 - lr * weight_decay
  float step_size;        // lr / (1 - beta1^step)
  float root_correction;  // sqrt(1 - beta2^step)
  float clip;
};

void adamw(DType dtype, void* params, float* master, float* exp_avg, float* exp_avg_sq, const float* grads,
           int64_t size, AdamWOptions options, int threads);

// bf16 params that are the upper halves of their fp32 masters: master's bits = (params' << 16) + remainder, which is
// signed, so that params are the masters rounded to nearest (reference/adamw.py).
void adamw_remainder(void* params, void* remainder, float* exp_avg, float* exp_avg_sq, const float* grads, int64_t size,
                     AdamWOptions options, int threads);

// bf16 params without a master, rounded up or down by random bits: hashes of the index and of `key`, the hash of seed
// and step (reference/adamw.py).
void adamw_stochastic(void* params, float* exp_avg, float* exp_avg_sq, const float* grads, int64_t size,
                      AdamWOptions options, uint32_t key, int threads);

// sums [count] of the squares of each of `count` tensors, in double, each in an order that depends on its size alone.
void sums_of_squares(DType dtype, const void* const* x, const int64_t* sizes, int64_t count, double* sums, int threads);

// Where kernels get their working memory of 64 KB and more from now on: `take` may give null, then malloc's is taken.
struct Memory {
  void* (*take)(size_t bytes);
  int (*give)(void* pointer);
};
void work_in(Memory from);

// The kernels' own exponential and tanh, for tests of their error.
void vector_exp(const float* x, float* y, int64_t size);
void vector_tanh(const float* x, float* y, int64_t size);

}  // namespace megalite
