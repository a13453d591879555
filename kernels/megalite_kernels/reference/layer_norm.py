"""LayerNorm in plain torch. Source: Ba, Kiros and Hinton, "Layer Normalization", 2016."""

from __future__ import annotations

import torch
from torch import Tensor

from megalite_kernels.reference.common import widen


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """`y = (x - mean) * rstd * weight + bias` over the last dim; returns (y, mean [rows], rstd [rows])."""
    wide = widen(x)
    mean = wide.mean(-1, keepdim=True)
    centered = wide - mean
    rstd = torch.rsqrt(centered.square().mean(-1, keepdim=True) + eps)
    y = centered * rstd * weight.to(wide.dtype)
    if bias is not None:
        y = y + bias.to(wide.dtype)
    return y.to(x.dtype), mean.flatten(), rstd.flatten()


def residual_forward(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Norm of `x + residual`; returns (y, x + residual rounded to x's dtype, mean, rstd)."""
    total = (widen(x) + widen(residual)).to(x.dtype)
    y, mean, rstd = forward(total, weight, bias, eps)
    return y, total, mean, rstd


def backward(
    dy: Tensor, dresidual: Tensor | None, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dx, dweight, dbias); `dresidual`, the gradient that bypasses the norm, is added into dx.

    With n = (x - mean)*rstd and g = dy*weight: dx = rstd * (g - mean(g) - n * mean(g*n)).
    """
    wide, wide_dy = widen(x), widen(dy)
    column = (*x.shape[:-1], 1)
    rstd = rstd.view(column).to(wide.dtype)
    normed = (wide - mean.view(column).to(wide.dtype)) * rstd
    g = wide_dy * weight.to(wide.dtype)
    dx = rstd * (g - g.mean(-1, keepdim=True) - normed * (g * normed).mean(-1, keepdim=True))
    if dresidual is not None:
        dx = dx + widen(dresidual)
    rows = x.shape[-1]
    dweight = (wide_dy * normed).reshape(-1, rows).sum(0)
    dbias = wide_dy.reshape(-1, rows).sum(0)
    return dx.to(x.dtype), dweight.to(weight.dtype), dbias.to(weight.dtype)


def backward_again(
    dy: Tensor,
    dresidual: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias, y): `backward`, and the forward's output again."""
    wide, column = widen(x), (*x.shape[:-1], 1)
    normed = (wide - mean.view(column).to(wide.dtype)) * rstd.view(column).to(wide.dtype)
    y = normed * weight.to(wide.dtype)
    if bias is not None:
        y = y + bias.to(wide.dtype)
    return *backward(dy, dresidual, x, weight, mean, rstd), y.to(x.dtype)
