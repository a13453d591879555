"""Linear layer whose matrix products run in FP8, and the steps that tensor-parallel layers build theirs from.

Two recipes, both with dynamic scales (of the tensor at hand: nothing is remembered between steps) that are powers of
two (reference/fp8.py says why):

- rowwise: each token of x and dy and each row (forward) or column (dgrad) of the weight has its own scale, all e4m3;
  the weight gradient stays in bf16. It sums over tokens, so its operands would need scales for each feature, two
  further quantised copies, and errors in it are never averaged out by a later product; with it in bf16 a rowwise run
  stays nearest to a bf16 one (torchao's `rowwise_with_gw_hp` recipe makes the same choice). e4m3 for gradients too:
  fine scales make e5m2's range needless, and its third significand bit counts (DeepSeek-AI, arXiv 2412.19437).
- tensorwise: one scale a tensor, all three products in FP8, dy in e5m2, whose range one scale for all of dy needs
  (Micikevicius et al., arXiv 2209.05433). A token's result then depends on the other tokens of the batch, by the
  elements that lie below the formats' normal range; with rowwise it never does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from megalite_kernels.ops import checks, fp8
from megalite_kernels.ops.fp8 import E4M3, E5M2
from megalite_kernels.ops.linear import accumulate_weight_gradient
from megalite_kernels.ops.linear_cross_entropy_local import check_main_grad

Scaling = Literal["tensorwise", "rowwise"]
Quantized = tuple[Tensor, Tensor]
"""Data and scale."""


def fp8_linear(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    main_grad: Tensor | None = None,
    scaling: Scaling = "rowwise",
) -> Tensor:
    """`x @ weight.T + bias` with operands rounded to FP8 and sums in fp32.

    Args:
        x: [..., I], bf16, fp16 or fp32.
        weight: [O, I] like x.
        bias: [O] like weight, or None.
        main_grad: [O, I] fp32; if given, the backward adds the weight's gradient into it and `weight` itself gets
            none.
        scaling: "rowwise" or "tensorwise", as above.

    Returns:
        [..., O] like x.

    Raises:
        ValueError: shapes, dtypes or devices don't fit together, or the scaling is not known.

    Saved: x and weight (and with tensorwise scaling their two scales).
    """
    checks.require_float(x=x, weight=weight)
    checks.require_shape(weight, (weight.shape[0], x.shape[-1]), "weight", f"x with {x.shape[-1]} features")
    checks.require_same_kind(weight, x, "weight", "x")
    checks.require_option(scaling, ("rowwise", "tensorwise"), "scaling")
    if bias is not None:
        checks.require_shape(bias, (weight.shape[0],), "bias", f"weight with {weight.shape[0]} rows")
        checks.require_same_kind(bias, weight, "bias", "weight")
    if main_grad is not None:
        check_main_grad(main_grad, weight)
    return _Fp8Linear.apply(x, weight, bias, main_grad, scaling)


def quantize(x: Tensor, scaling: Scaling, dtype: torch.dtype = E4M3) -> Quantized:
    """Data [R, C] and scale, [R] or [], of an operand x [R, C] that a product sums over C."""
    if scaling == "rowwise":
        return fp8.quantize_rows(x, dtype)
    scale = fp8.tensor_scale(x, dtype)
    return fp8.cast(x, scale, dtype), scale


def forward_product(
    x: Quantized, weight: Tensor, bias: Tensor | None, scaling: Scaling
) -> tuple[Tensor, Tensor]:
    """x @ weight.T + bias like weight, and the weight's scale for the backward pass."""
    data, scale = quantize(weight, scaling)
    return fp8.product(*x, data, scale, bias, weight.dtype), scale


def quantize_gradient(dy: Tensor, scaling: Scaling) -> Quantized:
    """Data and scale of dy [T, O]."""
    return quantize(dy, scaling, E4M3 if scaling == "rowwise" else E5M2)


def input_gradient(dy: Quantized, weight: Tensor, weight_scale: Tensor, scaling: Scaling) -> Tensor:
    """dy @ weight [T, I] like weight; `weight_scale` is what `forward_product` gave."""
    if scaling == "rowwise":
        columns = fp8.quantize_columns(weight, E4M3)
    else:
        columns = fp8.cast_transposed(weight, weight_scale, E4M3), weight_scale
    return fp8.product(*dy, *columns, None, weight.dtype)


def weight_gradient(
    dy: Tensor, dy_scale: Tensor, x: Tensor, x_scale: Tensor, scaling: Scaling
) -> Callable[[Tensor], None]:
    """What adds dy.T @ x into an fp32 [O, I], for dy [T, O] and x [T, I] and the scales they were quantised with."""
    if scaling == "rowwise":
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
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, main_grad: Tensor | None, scaling: Scaling
    ) -> Tensor:
        quantized = quantize(x.reshape(-1, x.shape[-1]), scaling)
        out, weight_scale = forward_product(quantized, weight, bias, scaling)
        ctx.save_for_backward(x, weight, quantized[1], weight_scale)
        ctx.main_grad, ctx.has_bias, ctx.scaling = main_grad, bias is not None, scaling
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, x_scale, weight_scale = ctx.saved_tensors
        flat, scaling = dy.reshape(-1, dy.shape[-1]).contiguous(), ctx.scaling
        quantized = quantize_gradient(flat, scaling)
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            dx = input_gradient(quantized, weight, weight_scale, scaling).view(x.shape)
        if ctx.needs_input_grad[1]:
            accumulate = weight_gradient(flat, quantized[1], x.reshape(-1, x.shape[-1]), x_scale, scaling)
            if ctx.main_grad is None:
                total = torch.zeros_like(weight, dtype=torch.float32)
                accumulate(total)
                dweight = total.to(weight.dtype)
            else:
                accumulate(ctx.main_grad)
        return dx, dweight, flat.sum(0) if ctx.has_bias else None, None, None
