"""LayerNorm, alone or fused with the residual addition before it."""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor

from megalite_kernels._library import define
from megalite_kernels.backend import register, register_lazy
from megalite_kernels.ops import checks
from megalite_kernels.ops.activation import Again
from megalite_kernels.ops.cuda_support import cuda_supports
from megalite_kernels.ops.native_support import NATIVE, native_supports
from megalite_kernels.ops.rms_norm import row_statistic
from megalite_kernels.ops.triton_support import TRITON, triton_supports
from megalite_kernels.reference import layer_norm as reference


@overload
def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: None = None,
    again: Again | None = None,
) -> Tensor: ...
@overload
def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor,
    again: Again | None = None,
) -> tuple[Tensor, Tensor]: ...
def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    again: Again | None = None,
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
        again: called in the backward pass with y, made again; see `rms_norm`.

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
        return _LayerNorm.apply(x, weight, bias, eps, again)
    checks.require_like(residual, x, "residual", "x")
    return _ResidualLayerNorm.apply(x, residual, weight, bias, eps, again)


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


def _fake_backward_again(
    dy: Tensor,
    dresidual: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *_fake_backward(dy, dresidual, x, weight, mean, rstd), x.new_empty(x.shape)


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
_backward_again = define(
    "layer_norm_bwd_again(Tensor dy, Tensor? dresidual, Tensor x, Tensor weight, Tensor? bias, Tensor mean,"
    " Tensor rstd) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_backward_again,
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

register("layer_norm_bwd_again", "reference", reference.backward_again)
register_lazy(
    "layer_norm_bwd_again",
    "cpu",
    "megalite_kernels.native.layer_norm:backward_again",
    requires=NATIVE,
    supports=native_supports,
)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _gradients(ctx: Any, dy: Tensor, dresidual: Tensor | None) -> tuple[Tensor | None, ...]:
    """(dx, dweight, dbias), after who wants y again has got it; on GPUs the forward's kernel makes it."""
    x, weight, mean, rstd, *rest = ctx.saved_tensors
    bias = rest[0] if rest else None
    dy = dy.contiguous()
    if ctx.again is not None and x.device.type == "cpu":
        dx, dweight, dbias, y = _backward_again(dy, dresidual, x, weight, bias, mean, rstd)
        ctx.again(y)
    else:
        dx, dweight, dbias = _backward(dy, dresidual, x, weight, mean, rstd)
        if ctx.again is not None:
            ctx.again(_forward(x, weight, bias, ctx.eps)[0])
    return dx, dweight, dbias if ctx.has_bias else None


def _save(
    ctx: Any,
    tensors: tuple[Tensor, ...],
    bias: Tensor | None,
    eps: float,
    again: Again | None,
) -> None:
    """What `_gradients` reads; the bias only to make y again."""
    kept = (*tensors, bias) if again is not None and bias is not None else tensors
    ctx.save_for_backward(*kept)
    ctx.has_bias, ctx.eps, ctx.again = bias is not None, eps, again


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, again: Again | None
    ) -> Tensor:
        x, weight, bias = x.contiguous(), weight.contiguous(), _contiguous(bias)
        y, mean, rstd = _forward(x, weight, bias, eps)
        _save(ctx, (x, weight, mean, rstd), bias, eps, again)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return *_gradients(ctx, dy, None), None, None


class _ResidualLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        again: Again | None,
    ) -> tuple[Tensor, Tensor]:
        x, residual, weight, bias = (
            x.contiguous(),
            residual.contiguous(),
            weight.contiguous(),
            _contiguous(bias),
        )
        y, total, mean, rstd = _residual_forward(x, residual, weight, bias, eps)
        _save(ctx, (total, weight, mean, rstd), bias, eps, again)
        return y, total

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dtotal: Tensor) -> tuple[Tensor | None, ...]:
        dx, dweight, dbias = _gradients(ctx, dy, dtotal.contiguous())
        return dx, dx, dweight, dbias, None, None
