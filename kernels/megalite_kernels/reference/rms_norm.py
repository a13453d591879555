"""RMSNorm in plain torch. Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019."""

from __future__ import annotations

import torch
from torch import Tensor

from megalite_kernels.reference.common import widen


def forward(x: Tensor, weight: Tensor, eps: float, zero_centered: bool) -> tuple[Tensor, Tensor]:
    """`y = x * rstd * weight` with `rstd = 1/sqrt(mean(x^2) + eps)` over the last dim; returns (y, rstd [rows])."""
    wide = widen(x)
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    y = wide * rstd * _gain(weight, wide, zero_centered)
    return y.to(x.dtype), rstd.flatten()


def residual_forward(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, zero_centered: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Norm of `x + residual`; returns (y, x + residual rounded to x's dtype, rstd)."""
    total = (widen(x) + widen(residual)).to(x.dtype)
    y, rstd = forward(total, weight, eps, zero_centered)
    return y, total, rstd


def backward(
    dy: Tensor, dresidual: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor, zero_centered: bool
) -> tuple[Tensor, Tensor]:
    """Gradients (dx, dweight); `dresidual`, the gradient that bypasses the norm, is added into dx.

    With n = x*rstd and g = dy*weight: dx = rstd * (g - n * mean(g*n)).
    """
    wide, wide_dy = widen(x), widen(dy)
    rstd = rstd.view(*x.shape[:-1], 1).to(wide.dtype)
    normed = wide * rstd
    g = wide_dy * _gain(weight, wide, zero_centered)
    dx = rstd * (g - normed * (g * normed).mean(-1, keepdim=True))
    if dresidual is not None:
        dx = dx + widen(dresidual)
    dweight = (wide_dy * normed).reshape(-1, x.shape[-1]).sum(0)
    return dx.to(x.dtype), dweight.to(weight.dtype)


def backward_again(
    dy: Tensor, dresidual: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor, zero_centered: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, y): `backward`, and the forward's output again."""
    wide = widen(x)
    column = rstd.view(*x.shape[:-1], 1).to(wide.dtype)
    y = (wide * column * _gain(weight, wide, zero_centered)).to(x.dtype)
    return *backward(dy, dresidual, x, weight, rstd, zero_centered), y


def _gain(weight: Tensor, like: Tensor, zero_centered: bool) -> Tensor:
    gain = weight.to(like.dtype)
    return gain + 1 if zero_centered else gain
