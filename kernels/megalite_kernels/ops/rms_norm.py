"""RMSNorm, alone or fused with the residual addition before it."""

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
from megalite_kernels.ops.triton_support import TRITON, triton_supports
from megalite_kernels.reference import rms_norm as reference
from megalite_kernels.reference.common import wide_dtype


@overload
def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    *,
    residual: None = None,
    zero_centered: bool = False,
    again: Again | None = None,
) -> Tensor: ...
@overload
def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    *,
    residual: Tensor,
    zero_centered: bool = False,
    again: Again | None = None,
) -> tuple[Tensor, Tensor]: ...
def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    *,
    residual: Tensor | None = None,
    zero_centered: bool = False,
    again: Again | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scale each row of `x` to unit root mean square, optionally after adding it to the residual stream.

    `y = x / sqrt(mean(x^2) + eps) * weight`, with `x + residual` in the place of x when a residual is given;
    computed in float32 (float64 for float64 inputs) and rounded once.

    Args:
        x: [..., H], bf16, fp16, fp32 or fp64.
        weight: [H], any of these dtypes.
        eps: added to the mean square.
        residual: like x.
        zero_centered: the gain is `1 + weight`.
        again: called in the backward pass with y, which that makes again (the same bits) while it reads what y is
            made from: who needs y for a gradient, as the weights' of the layer after this, need not keep it.

    Returns:
        y like x, contiguous; with a residual (y, x + residual).

    Raises:
        ValueError: dtypes, shapes or devices don't fit together, or eps is negative.

    Saved: x (or the new residual), weight, and one float32 per row.
    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
    """
    checks.require_float(x=x, weight=weight)
    checks.require_shape(weight, (x.shape[-1],), "weight", f"x with {x.shape[-1]} features")
    checks.require_same_device(weight, x, "weight", "x")
    checks.require_range(eps, "eps")
    if residual is None:
        return _RMSNorm.apply(x, weight, eps, zero_centered, again)
    checks.require_like(residual, x, "residual", "x")
    return _ResidualRMSNorm.apply(x, residual, weight, eps, zero_centered, again)


def row_statistic(x: Tensor) -> Tensor:
    """An empty [rows] of the dtype statistics have; for fakes."""
    return x.new_empty((x.shape[:-1].numel(),), dtype=wide_dtype(x))


def _fake_forward(x: Tensor, weight: Tensor, eps: float, zero_centered: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), row_statistic(x)


def _fake_residual_forward(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, zero_centered: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape), row_statistic(x)


def _fake_backward(
    dy: Tensor, dresidual: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor, zero_centered: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _fake_backward_again(
    dy: Tensor, dresidual: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor, zero_centered: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), x.new_empty(x.shape)


_forward = define(
    "rms_norm_fwd(Tensor x, Tensor weight, float eps, bool zero_centered) -> (Tensor, Tensor)",
    fake=_fake_forward,
)
_residual_forward = define(
    "rms_norm_residual_fwd(Tensor x, Tensor residual, Tensor weight, float eps, bool zero_centered)"
    " -> (Tensor, Tensor, Tensor)",
    fake=_fake_residual_forward,
)
_backward = define(
    "rms_norm_bwd(Tensor dy, Tensor? dresidual, Tensor x, Tensor weight, Tensor rstd, bool zero_centered)"
    " -> (Tensor, Tensor)",
    fake=_fake_backward,
)
_backward_again = define(
    "rms_norm_bwd_again(Tensor dy, Tensor? dresidual, Tensor x, Tensor weight, Tensor rstd, bool zero_centered)"
    " -> (Tensor, Tensor, Tensor)",
    fake=_fake_backward_again,
)
for _op, _name in (
    ("rms_norm_fwd", "forward"),
    ("rms_norm_residual_fwd", "residual_forward"),
    ("rms_norm_bwd", "backward"),
):
    register(_op, "reference", getattr(reference, _name))
    register_lazy(
        _op, "cpu", f"megalite_kernels.native.rms_norm:{_name}", requires=NATIVE, supports=native_supports
    )
    register_lazy(
        _op, "triton", f"megalite_kernels.triton.rms_norm:{_name}", requires=TRITON, supports=triton_supports
    )
    register_lazy(_op, "cuda", f"megalite_kernels.native.cuda.rms_norm:{_name}", supports=cuda_supports)

register("rms_norm_bwd_again", "reference", reference.backward_again)
register_lazy(
    "rms_norm_bwd_again",
    "cpu",
    "megalite_kernels.native.rms_norm:backward_again",
    requires=NATIVE,
    supports=native_supports,
)


def _gradients(ctx: Any, dy: Tensor, dresidual: Tensor | None) -> tuple[Tensor, Tensor]:
    """(dx, dweight), after who wants y again has got it; on GPUs the forward's kernel makes it."""
    x, weight, rstd = ctx.saved_tensors
    arguments = (dy.contiguous(), dresidual, x, weight, rstd, ctx.zero_centered)
    if ctx.again is None:
        return _backward(*arguments)
    if x.device.type == "cpu":
        dx, dweight, y = _backward_again(*arguments)
    else:
        dx, dweight = _backward(*arguments)
        y, _ = _forward(x, weight, ctx.eps, ctx.zero_centered)
    ctx.again(y)
    return dx, dweight


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, eps: float, zero_centered: bool, again: Again | None
    ) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        y, rstd = _forward(x, weight, eps, zero_centered)
        ctx.save_for_backward(x, weight, rstd)
        ctx.eps, ctx.zero_centered, ctx.again = eps, zero_centered, again
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return *_gradients(ctx, dy, None), None, None, None


class _ResidualRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor,
        weight: Tensor,
        eps: float,
        zero_centered: bool,
        again: Again | None,
    ) -> tuple[Tensor, Tensor]:
        x, residual, weight = x.contiguous(), residual.contiguous(), weight.contiguous()
        y, total, rstd = _residual_forward(x, residual, weight, eps, zero_centered)
        ctx.save_for_backward(total, weight, rstd)
        ctx.eps, ctx.zero_centered, ctx.again = eps, zero_centered, again
        return y, total

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dtotal: Tensor) -> tuple[Tensor | None, ...]:
        dx, dweight = _gradients(ctx, dy, dtotal.contiguous())
        return dx, dx, dweight, None, None, None
