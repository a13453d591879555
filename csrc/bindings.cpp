// The only pybind11 module, megalite_kernels._C: raw pointers and sizes in, nothing decided here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>
#include <vector>

#include "api.h"

namespace py = pybind11;
using megalite::Activation;
using megalite::DType;

namespace {

// Addresses travel as integers; 0 is a null pointer.
template <class T = void>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

using Address = uintptr_t;
using Release = py::call_guard<py::gil_scoped_release>;

// (dtype, address, zero_centered)
using GainTuple = std::tuple<int, Address, bool>;

megalite::Gain gain(const GainTuple& t) { return {DType(std::get<0>(t)), at(std::get<1>(t)), std::get<2>(t)}; }

void bind_norms(py::module_& m) {
  m.def(
      "rms_norm_forward",
      [](int dtype, Address x, Address residual, const GainTuple& weight, Address y, Address total, Address rstd,
         int64_t rows, int64_t cols, float eps, int threads) {
        megalite::rms_norm_forward(DType(dtype), at(x), at(residual), gain(weight), at(y), at(total), at<float>(rstd),
                                   rows, cols, eps, threads);
      },
      Release());
  m.def(
      "rms_norm_backward",
      [](int dtype, Address dy, Address dresidual, Address x, const GainTuple& weight, Address rstd, Address dx,
         Address dweight, Address y, int64_t rows, int64_t cols, int threads) {
        megalite::rms_norm_backward(DType(dtype), at(dy), at(dresidual), at(x), gain(weight), at<float>(rstd), at(dx),
                                    at(dweight), at(y), rows, cols, threads);
      },
      Release());
  m.def(
      "layer_norm_forward",
      [](int dtype, Address x, Address residual, Address weight, Address bias, Address y, Address total, Address mean,
         Address rstd, int64_t rows, int64_t cols, float eps, int threads) {
        megalite::layer_norm_forward(DType(dtype), at(x), at(residual), at<float>(weight), at<float>(bias), at(y),
                                     at(total), at<float>(mean), at<float>(rstd), rows, cols, eps, threads);
      },
      Release());
  m.def(
      "layer_norm_backward",
      [](int dtype, Address dy, Address dresidual, Address x, Address weight, Address bias, Address mean, Address rstd,
         Address dx, Address dweight, Address dbias, Address y, int64_t rows, int64_t cols, int threads) {
        megalite::layer_norm_backward(DType(dtype), at(dy), at(dresidual), at(x), at<float>(weight), at<float>(bias),
                                      at<float>(mean), at<float>(rstd), at(dx), at<float>(dweight), at<float>(dbias),
                                      at(y), rows, cols, threads);
      },
      Release());
}

// (address, token stride, head stride)
using StridedTuple = std::tuple<Address, int64_t, int64_t>;

megalite::Strided strided(const StridedTuple& t) { return {at(std::get<0>(t)), std::get<1>(t), std::get<2>(t)}; }

// (cos, sin, tokens, heads, dim, half, cos_rows, interleaved)
using RopeTuple = std::tuple<Address, Address, int64_t, int64_t, int64_t, int64_t, int64_t, bool>;

megalite::RopeShape rope_shape(const RopeTuple& t) {
  return {at<float>(std::get<0>(t)),
          at<float>(std::get<1>(t)),
          std::get<2>(t),
          std::get<3>(t),
          std::get<4>(t),
          std::get<5>(t),
          std::get<6>(t),
          std::get<7>(t)};
}

void bind_rope(py::module_& m) {
  m.def(
      "rope",
      [](int dtype, const StridedTuple& x, const StridedTuple& out, const RopeTuple& shape, bool inverse, int threads) {
        megalite::rope(DType(dtype), strided(x), strided(out), rope_shape(shape), inverse, threads);
      },
      Release());
  m.def(
      "rope_norm_forward",
      [](int dtype, const StridedTuple& x, Address weight, Address out, Address rstd, const RopeTuple& shape, float eps,
         int threads) {
        megalite::rope_norm_forward(DType(dtype), strided(x), at<float>(weight), at(out), at<float>(rstd),
                                    rope_shape(shape), eps, threads);
      },
      Release());
  m.def(
      "rope_norm_backward",
      [](int dtype, const StridedTuple& dy, const StridedTuple& x, Address weight, Address rstd, Address dx,
         Address dweight, const RopeTuple& shape, int threads) {
        megalite::rope_norm_backward(DType(dtype), strided(dy), strided(x), at<float>(weight), at<float>(rstd), at(dx),
                                     at<float>(dweight), rope_shape(shape), threads);
      },
      Release());
}

void bind_embedding(py::module_& m) {
  m.def(
      "embedding_backward",
      [](int dtype, Address dy, Address ids, Address dweight, int64_t tokens, int64_t rows, int64_t cols, int threads) {
        return megalite::embedding_backward(DType(dtype), at(dy), at<int64_t>(ids), at(dweight), tokens, rows, cols,
                                            threads);
      },
      Release());
  m.def(
      "embedding_accumulate",
      [](int dtype, Address dy, Address ids, Address main_grad, int64_t tokens, int64_t rows, int64_t cols,
         int threads) {
        return megalite::embedding_accumulate(DType(dtype), at(dy), at<int64_t>(ids), at<float>(main_grad), tokens,
                                              rows, cols, threads);
      },
      Release());
}

void bind_elementwise(py::module_& m) {
  m.def(
      "activation_forward",
      [](int dtype, int kind, Address x, Address y, int64_t size, int threads) {
        megalite::activation_forward(DType(dtype), Activation(kind), at(x), at(y), size, threads);
      },
      Release());
  m.def(
      "activation_backward",
      [](int dtype, int kind, Address dy, Address x, Address dx, Address y, int64_t size, int threads) {
        megalite::activation_backward(DType(dtype), Activation(kind), at(dy), at(x), at(dx), at(y), size, threads);
      },
      Release());
  m.def(
      "gated_forward",
      [](int dtype, int kind, Address gate, Address up, Address y, int64_t rows, int64_t cols, int64_t stride,
         int threads) {
        megalite::gated_forward(DType(dtype), Activation(kind), at(gate), at(up), at(y), rows, cols, stride, threads);
      },
      Release());
  m.def(
      "gated_backward",
      [](int dtype, int kind, Address dy, Address gate, Address up, Address dgate, Address dup, Address y, int64_t rows,
         int64_t cols, int64_t stride, int threads) {
        megalite::gated_backward(DType(dtype), Activation(kind), at(dy), at(gate), at(up), at(dgate), at(dup), at(y),
                                 rows, cols, stride, threads);
      },
      Release());
}

// (dtype, logits' address, row stride, target's address, rows, columns)
using LossRowsTuple = std::tuple<int, Address, int64_t, Address, int64_t, int64_t>;

megalite::LossRows loss_rows(const LossRowsTuple& t) {
  return {DType(std::get<0>(t)),       at(std::get<1>(t)), std::get<2>(t),
          at<int64_t>(std::get<3>(t)), std::get<4>(t),     std::get<5>(t)};
}

// (ignore_index, label_smoothing, z_loss, softcap)
using LossOptionsTuple = std::tuple<int64_t, float, float, float>;

megalite::LossOptions loss_options(const LossOptionsTuple& t) {
  return {std::get<0>(t), std::get<1>(t), std::get<2>(t), std::get<3>(t)};
}

// (x, weight, bias, target, tokens, classes, features, tokens at once)
using HeadTuple = std::tuple<Address, Address, Address, Address, int64_t, int64_t, int64_t, int64_t>;

megalite::HeadInputs head_inputs(const HeadTuple& t) {
  return {at(std::get<0>(t)), at(std::get<1>(t)), at(std::get<2>(t)), at<int64_t>(std::get<3>(t)),
          std::get<4>(t),     std::get<5>(t),     std::get<6>(t),     std::get<7>(t)};
}

void bind_head(py::module_& m) {
  m.def(
      "head_forward",
      [](const HeadTuple& in, Address loss, Address lse, const LossOptionsTuple& options, int threads) {
        return megalite::head_forward(head_inputs(in), at<float>(loss), at<float>(lse), loss_options(options), threads);
      },
      Release());
  m.def(
      "head_stats",
      [](const HeadTuple& in, int64_t start, Address stats, const LossOptionsTuple& options, int threads) {
        megalite::head_stats(head_inputs(in), start, at<float>(stats), loss_options(options), threads);
      },
      Release());
  m.def(
      "head_backward",
      [](const HeadTuple& in, int64_t start, int64_t vocabulary, Address lse, Address scale, int64_t scale_stride,
         Address dx, Address dweight, bool add, Address dbias, const LossOptionsTuple& options, int threads) {
        megalite::head_backward(head_inputs(in), start, vocabulary, at<float>(lse), at<float>(scale), scale_stride,
                                at(dx), at<float>(dweight), add, at<float>(dbias), loss_options(options), threads);
      },
      Release());
}

void bind_loss(py::module_& m) {
  m.def(
      "cross_entropy_forward",
      [](const LossRowsTuple& rows, Address loss, Address lse, const LossOptionsTuple& options, int threads) {
        return megalite::cross_entropy_forward(loss_rows(rows), at<float>(loss), at<float>(lse), loss_options(options),
                                               threads);
      },
      Release());
  m.def(
      "cross_entropy_stats",
      [](const LossRowsTuple& rows, int64_t start, Address stats, const LossOptionsTuple& options, int threads) {
        megalite::cross_entropy_stats(loss_rows(rows), start, at<float>(stats), loss_options(options), threads);
      },
      Release());
  m.def(
      "cross_entropy_backward",
      [](const LossRowsTuple& rows, int64_t start, int64_t vocabulary, Address lse, Address scale, int64_t scale_stride,
         Address dlogits, int64_t dlogits_stride, const LossOptionsTuple& options, int threads) {
        megalite::cross_entropy_backward(loss_rows(rows), start, vocabulary, at<float>(lse), at<float>(scale),
                                         scale_stride, at(dlogits), dlogits_stride, loss_options(options), threads);
      },
      Release());
  m.def(
      "cross_entropy_grad",
      [](const LossRowsTuple& rows, Address scale, int64_t scale_stride, Address loss, Address lse,
         const LossOptionsTuple& options, int threads) {
        return megalite::cross_entropy_grad(loss_rows(rows), at<float>(scale), scale_stride, at<float>(loss),
                                            at<float>(lse), loss_options(options), threads);
      },
      Release());
  m.def(
      "scaled_copy",
      [](int from, Address x, float scale, int to, Address out, int64_t size, int threads) {
        megalite::scaled_copy(DType(from), at(x), scale, DType(to), at(out), size, threads);
      },
      Release());
}

// (cos, sin, half, rows)
using RotationTuple = std::tuple<Address, Address, int64_t, int64_t>;

// (segments' address, their number, heads, kv_heads, dim, lse_head_stride, causal, window, offset, softcap, scale,
// sinks, rotation)
using ShapeTuple = std::tuple<Address, int64_t, int64_t, int64_t, int64_t, int64_t, bool, int64_t, int64_t, float,
                              float, Address, RotationTuple>;

megalite::AttentionShape attention_shape(const ShapeTuple& t) {
  const RotationTuple& turn = std::get<12>(t);
  return {
      at<const megalite::Segment>(std::get<0>(t)),
      std::get<1>(t),
      std::get<2>(t),
      std::get<3>(t),
      std::get<4>(t),
      std::get<5>(t),
      std::get<6>(t),
      std::get<7>(t),
      std::get<8>(t),
      std::get<9>(t),
      std::get<10>(t),
      at<const float>(std::get<11>(t)),
      {at<const float>(std::get<0>(turn)), at<const float>(std::get<1>(turn)), std::get<2>(turn), std::get<3>(turn)}};
}

void bind_attention(py::module_& m) {
  m.def(
      "attention_forward",
      [](int dtype, const StridedTuple& q, const StridedTuple& k, const StridedTuple& v, Address out, Address lse,
         const ShapeTuple& shape, int threads) {
        megalite::attention_forward(DType(dtype), strided(q), strided(k), strided(v), at(out), at<float>(lse),
                                    attention_shape(shape), threads);
      },
      Release());
  m.def(
      "attention_backward",
      [](int dtype, const StridedTuple& dout, Address dlse, const StridedTuple& q, const StridedTuple& k,
         const StridedTuple& v, const StridedTuple& out, Address lse, const StridedTuple& dq, const StridedTuple& dk,
         const StridedTuple& dv, Address dsinks, const ShapeTuple& shape, int threads) {
        megalite::attention_backward(DType(dtype), strided(dout), at<float>(dlse), strided(q), strided(k), strided(v),
                                     strided(out), at<float>(lse), strided(dq), strided(dk), strided(dv),
                                     at<float>(dsinks), attention_shape(shape), threads);
      },
      Release());
}

// (address, stride, inner_last)
using FactorTuple = std::tuple<Address, int64_t, bool>;

megalite::Factor factor(const FactorTuple& t) { return {at(std::get<0>(t)), std::get<1>(t), std::get<2>(t)}; }

void bind_linear(py::module_& m) {
  m.def(
      "gemm",
      [](int dtype, const FactorTuple& left, const FactorTuple& right, Address bias, int out_dtype, Address out,
         int64_t out_stride, bool add, int64_t rows, int64_t cols, int64_t inner, int threads) {
        megalite::gemm(DType(dtype), factor(left), factor(right), at(bias), DType(out_dtype), at(out), out_stride, add,
                       rows, cols, inner, threads);
      },
      Release());
}

void bind_optimizer(py::module_& m) {
  m.def(
      "adamw",
      [](int dtype, Address params, Address master, Address exp_avg, Address exp_avg_sq, Address grads, int64_t size,
         float beta1, float beta2, float eps, float decay, float step_size, float root_correction, float clip,
         int threads) {
        megalite::adamw(DType(dtype), at(params), at<float>(master), at<float>(exp_avg), at<float>(exp_avg_sq),
                        at<float>(grads), size, {beta1, beta2, eps, decay, step_size, root_correction, clip}, threads);
      },
      Release());
  m.def(
      "adamw_remainder",
      [](Address params, Address remainder, Address exp_avg, Address exp_avg_sq, Address grads, int64_t size,
         float beta1, float beta2, float eps, float decay, float step_size, float root_correction, float clip,
         int threads) {
        megalite::adamw_remainder(at(params), at(remainder), at<float>(exp_avg), at<float>(exp_avg_sq),
                                  at<float>(grads), size, {beta1, beta2, eps, decay, step_size, root_correction, clip},
                                  threads);
      },
      Release());
  m.def(
      "adamw_stochastic",
      [](Address params, Address exp_avg, Address exp_avg_sq, Address grads, int64_t size, float beta1, float beta2,
         float eps, float decay, float step_size, float root_correction, float clip, uint32_t key, int threads) {
        megalite::adamw_stochastic(at(params), at<float>(exp_avg), at<float>(exp_avg_sq), at<float>(grads), size,
                                   {beta1, beta2, eps, decay, step_size, root_correction, clip}, key, threads);
      },
      Release());
  m.def(
      "sums_of_squares",
      [](int dtype, const std::vector<Address>& x, const std::vector<int64_t>& sizes, Address sums, int threads) {
        std::vector<const void*> data;
        for (const Address address : x) data.push_back(at(address));
        megalite::sums_of_squares(DType(dtype), data.data(), sizes.data(), sizes.size(), at<double>(sums), threads);
      },
      Release());
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native CPU kernels of megalite_kernels: raw pointers in, checked and documented in Python.";
  m.def("isa_name", &megalite::isa_name,
        "The instruction set in use: scalar, avx2, avx512, avx512_bf16, amx or amx_emulated.");
  m.def("work_in", [](Address take, Address give) {
    megalite::work_in({reinterpret_cast<void* (*)(size_t)>(take), reinterpret_cast<int (*)(void*)>(give)});
  });
  m.def("vector_exp",
        [](Address x, Address y, int64_t size) { megalite::vector_exp(at<float>(x), at<float>(y), size); });
  m.def("vector_tanh",
        [](Address x, Address y, int64_t size) { megalite::vector_tanh(at<float>(x), at<float>(y), size); });
  bind_norms(m);
  bind_rope(m);
  bind_embedding(m);
  bind_elementwise(m);
  bind_loss(m);
  bind_head(m);
  bind_attention(m);
  bind_linear(m);
  bind_optimizer(m);
}
