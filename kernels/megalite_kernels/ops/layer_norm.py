"""LayerNorm, alone or fused with the residual addition before it."""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor

from megalite_kernels._library import define
from megalite_kernels.backend import register, register_lazy
from megalite_kernels.ops import checks
from megalite_kernels.ops.cuda_support import cuda_supports
from megalite_kernels.ops.native_support import NATIVE, native_supports
from megalite_kernels.ops.rms_norm import row_statistic
from megalite_kernels.ops.triton_support import TRITON, triton_supports
from megalite_kernels.reference import layer_norm as reference


@overload
def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5, *, residual: None = None
) -> Tensor: ...
@overload
def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5, *, residual: Tensor
) -> tuple[Tensor, Tensor]: ...
def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalise each row of `x` to mean 0 and variance 1, optionally after adding it to the residual stream.

    `y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias`, with `x + residual` in the place of x when a
    residual is given; computed in float32 (float64 for float64 inputs) and rounded once.

    Args:
        x: [..., H], bf16, fp16, fp32 or fp64.
        weight: [H], any of these dtypes.
        bias: [H] like weight, or None.
        eps: added to the (biased) variance.
        residual: like x.

    Returns:
        y like x, contiguous; with a residual (y, x + residual).

    Raises:
        ValueError: dtypes, shapes or devices don't fit together, or eps is negative.

    Saved: x (or the new residual), weight, and two float32 per row.
    Source: Ba, Kiros and Hinton, "Layer Normalization", 2016.
    """
    checks.require_float(x=x, weight=weight)
    checks.require_shape(weight, (x.shape[-1],), "weight", f"x with {x.shape[-1]} features")
    checks.require_same_device(weight, x, "weight", "x")
    checks.require_range(eps, "eps")
    if bias is not None:
        checks.require_like(bias, weight, "bias", "weight")
    if residual is None:
        return _LayerNorm.apply(x, weight, bias, eps)
    checks.require_like(residual, x, "residual", "x")
    return _ResidualLayerNorm.apply(x, residual, weight, bias, eps)


def _fake_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), row_statistic(x), row_statistic(x)


def _fake_residual_forward(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape), row_statistic(x), row_statistic(x)


def _fake_backward(
    dy: Tensor, dresidual: Tensor | None, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape)


_forward = define(
    "layer_norm_fwd(Tensor x, Tensor weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor)",
    fake=_fake_forward,
)
_residual_forward = define(
    "layer_norm_residual_fwd(Tensor x, Tensor residual, Tensor weight, Tensor? bias, float eps)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_residual_forward,
)
_backward = define(
    "layer_norm_bwd(Tensor dy, Tensor? dresidual, Tensor x, Tensor weight, Tensor mean, Tensor rstd)"
    " -> (Tensor, Tensor, Tensor)",
    fake=_fake_backward,
)
for _op, _name in (
    ("layer_norm_fwd", "forward"),
    ("layer_norm_residual_fwd", "residual_forward"),
    ("layer_norm_bwd", "backward"),
):
    register(_op, "reference", getattr(reference, _name))
    register_lazy(
        _op, "cpu", f"megalite_kernels.native.layer_norm:{_name}", requires=NATIVE, supports=native_supports
    )
    register_lazy(
        _op,
        "triton",
        f"megalite_kernels.triton.layer_norm:{_name}",
        requires=TRITON,
        supports=triton_supports,
    )
    register_lazy(_op, "cuda", f"megalite_kernels.native.cuda.layer_norm:{_name}", supports=cuda_supports)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        y, mean, rstd = _forward(x, weight, _contiguous(bias), eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.has_bias = bias is not None
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        dx, dweight, dbias = _backward(dy.contiguous(), None, x, weight, mean, rstd)
        return dx, dweight, dbias if ctx.has_bias else None, None


class _ResidualLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        x, residual, weight = x.contiguous(), residual.contiguous(), weight.contiguous()
        y, total, mean, rstd = _residual_forward(x, residual, weight, _contiguous(bias), eps)
        ctx.save_for_backward(total, weight, mean, rstd)
        ctx.has_bias = bias is not None
        return y, total

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dtotal: Tensor) -> tuple[Tensor | None, ...]:
        total, weight, mean, rstd = ctx.saved_tensors
        dx, dweight, dbias = _backward(dy.contiguous(), dtotal.contiguous(), total, weight, mean, rstd)
        return dx, dx, dweight, dbias if ctx.has_bias else None, None
