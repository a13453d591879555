"""Linear layer whose matrix products run in FP8, and the steps that tensor-parallel layers build theirs from.

Two recipes, both with dynamic scales (of the tensor at hand: nothing is remembered between steps) that are powers of
two (reference/fp8.py says why):

- rowwise: each token of x and dy and each row (forward) or column (dgrad) of the weight has its own scale, all e4m3;
  the weight gradient stays in bf16. It sums over tokens, so its operands would need scales for each feature, two
  further quantised copies, and errors in it are never averaged out by a later product; with it in bf16 a rowwise run
  stays nearest to a bf16 one (torchao's `rowwise_with_gw_hp` recipe makes the same choice). e4m3 for gradients too:
  fine scales make e5m2's range needless, and its third significand bit counts (DeepSeek-AI, arXiv 2412.19437).
  The output of a norm or an activation comes quantised out of `fp8_rms_norm` and its like, which spares a pass; it is
  kept for the weight gradient in bf16, as it would be, and its FP8 copy is freed after the product.
- tensorwise: one scale a tensor, all three products in FP8, dy in e5m2, whose range one scale for all of dy needs
  (Micikevicius et al., arXiv 2209.05433). A token's result then depends on the other tokens of the batch, by the
  elements that lie below the formats' normal range; with rowwise it never does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from megalite_kernels.ops import checks, fp8
from megalite_kernels.ops.fp8 import E4M3, E5M2
from megalite_kernels.ops.linear import accumulate_weight_gradient
from megalite_kernels.ops.linear_cross_entropy_local import check_main_grad
from megalite_kernels.ops.quantized import Operand, QuantizedTensor, value_of

Scaling = Literal["tensorwise", "rowwise"]
Quantized = tuple[Tensor, Tensor]
"""Data and scale."""


class QuantizedWeight(NamedTuple):
    """A weight [O, I] as both products read it, to be quantised once for several micro-batches."""

    rows: Quantized
    """For the forward pass: data [O, I], scale [O] or []."""
    columns: Quantized
    """For the gradient of the input: data [I, O], scale [I] or []."""


def fp8_linear(
    x: Operand,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    main_grad: Tensor | None = None,
    scaling: Scaling = "rowwise",
    quantized_weight: QuantizedWeight | None = None,
) -> Tensor:
    """`x @ weight.T + bias` with operands rounded to FP8 and sums in fp32.

    Args:
        x: [..., I], bf16, fp16 or fp32; with rowwise scaling also what `fp8_rms_norm`, `fp8_layer_norm` and
            `fp8_activation` give.
        weight: [O, I] like x.
        bias: [O] like weight, or None.
        main_grad: [O, I] fp32; if given, the backward adds the weight's gradient into it and `weight` itself gets
            none.
        scaling: "rowwise" or "tensorwise", as above.
        quantized_weight: what `quantize_weight` made of this weight and scaling; None quantises it here, and again
            in the backward.

    Returns:
        [..., O] like x.

    Raises:
        ValueError: shapes, dtypes or devices don't fit together, or the scaling is not known or not that of x.

    Saved: x and weight (and with tensorwise scaling their two scales; and the columns of `quantized_weight`).
    """
    value = value_of(x)
    checks.require_float(x=value, weight=weight)
    checks.require_shape(
        weight, (weight.shape[0], value.shape[-1]), "weight", f"x with {value.shape[-1]} features"
    )
    checks.require_same_kind(weight, value, "weight", "x")
    checks.require_option(scaling, ("rowwise", "tensorwise"), "scaling")
    if bias is not None:
        checks.require_shape(bias, (weight.shape[0],), "bias", f"weight with {weight.shape[0]} rows")
        checks.require_same_kind(bias, weight, "bias", "weight")
    if main_grad is not None:
        check_main_grad(main_grad, weight)
    nothing: tuple[None, None] = None, None
    rows, columns = quantized_weight or (nothing, nothing)
    quantized = quantized_rows(x, scaling) or nothing
    return _Fp8Linear.apply(value, weight, bias, main_grad, scaling, *quantized, *rows, *columns)


def quantize_weight(weight: Tensor, scaling: Scaling = "rowwise") -> QuantizedWeight:
    """A weight [O, I] for `fp8_linear`; good until the weight changes."""
    rows = quantize(weight, scaling)
    return QuantizedWeight(rows, weight_columns(weight, rows[1], scaling))


def quantized_rows(x: Operand, scaling: Scaling) -> Quantized | None:
    """Data and scale that come with x, None if it is a plain tensor.

    Raises:
        ValueError: they come with it, and the scaling has no scales for rows.
    """
    if not isinstance(x, QuantizedTensor):
        return None
    if scaling != "rowwise":
        raise ValueError(
            f"x has a scale for each row: scaling={scaling!r} takes a plain tensor, or 'rowwise'"
        )
    return x.data, x.scale


def pair(data: Tensor | None, scale: Tensor | None) -> Quantized | None:
    """Both or nothing, as they came through an `autograd.Function`."""
    return None if data is None or scale is None else (data, scale)


def quantize(x: Tensor, scaling: Scaling, dtype: torch.dtype = E4M3) -> Quantized:
    """Data [R, C] and scale, [R] or [], of an operand x [R, C] that a product sums over C."""
    if scaling == "rowwise":
        return fp8.quantize_rows(x, dtype)
    scale = fp8.tensor_scale(x, dtype)
    return fp8.cast(x, scale, dtype), scale


def weight_columns(weight: Tensor, weight_scale: Tensor | None, scaling: Scaling) -> Quantized:
    """Data [I, O] and scale, [I] or [], of a weight [O, I] for `input_gradient`; `weight_scale` is of its rows
    (None will do with rowwise scaling, which makes others)."""
    if scaling == "rowwise" or weight_scale is None:
        return fp8.quantize_columns(weight, E4M3)
    return fp8.cast_transposed(weight, weight_scale, E4M3), weight_scale


def forward_product(x: Quantized, weight: Quantized, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x @ weight.T + bias in `dtype`."""
    return fp8.product(*x, *weight, bias, dtype)


def quantize_gradient(dy: Tensor, scaling: Scaling) -> Quantized:
    """Data and scale of dy [T, O]."""
    return quantize(dy, scaling, E4M3 if scaling == "rowwise" else E5M2)


def input_gradient(dy: Quantized, columns: Quantized, dtype: torch.dtype) -> Tensor:
    """dy @ weight [T, I] in `dtype`; `columns` is what `weight_columns` gave."""
    return fp8.product(*dy, *columns, None, dtype)


def weight_gradient(
    dy: Tensor, dy_scale: Tensor, x: Tensor, x_scale: Tensor | None, scaling: Scaling
) -> Callable[[Tensor], None]:
    """What adds dy.T @ x into an fp32 [O, I], for dy [T, O] and x [T, I] and the scales they were quantised with
    (`x_scale` is None with rowwise scaling, which has no use for it)."""
    if scaling == "rowwise" or x_scale is None:
        return lambda main_grad: accumulate_weight_gradient(dy, x, main_grad)

    def accumulate(main_grad: Tensor) -> None:
        rows, columns = (
            fp8.cast_transposed(dy, dy_scale, E5M2),
            fp8.cast_transposed(x, x_scale, E4M3),
        )
        main_grad += fp8.product(rows, dy_scale, columns, x_scale, None, main_grad.dtype)

    return accumulate


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        main_grad: Tensor | None,
        scaling: Scaling,
        *copies: Tensor | None,
    ) -> Tensor:
        """`copies`: data and scale of x, of the weight's rows and of its columns, each pair there or None."""
        quantized = pair(copies[0], copies[1]) or quantize(x.reshape(-1, x.shape[-1]), scaling)
        rows = pair(copies[2], copies[3]) or quantize(weight, scaling)
        out = forward_product(quantized, rows, bias, weight.dtype)
        scales = (quantized[1], rows[1]) if scaling == "tensorwise" else (None, None)
        ctx.save_for_backward(x, weight, *scales, *copies[4:])
        ctx.main_grad, ctx.has_bias, ctx.scaling = main_grad, bias is not None, scaling
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, x_scale, weight_scale, *copy = ctx.saved_tensors
        flat, scaling = dy.reshape(-1, dy.shape[-1]).contiguous(), ctx.scaling
        quantized = quantize_gradient(flat, scaling)
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            columns = pair(*copy) or weight_columns(weight, weight_scale, scaling)
            dx = input_gradient(quantized, columns, weight.dtype).view(x.shape)
        if ctx.needs_input_grad[1]:
            accumulate = weight_gradient(flat, quantized[1], x.reshape(-1, x.shape[-1]), x_scale, scaling)
            if ctx.main_grad is None:
                total = torch.zeros_like(weight, dtype=torch.float32)
                accumulate(total)
                dweight = total.to(weight.dtype)
            else:
                accumulate(ctx.main_grad)
        return dx, dweight, flat.sum(0) if ctx.has_bias else None, *(None,) * 8
