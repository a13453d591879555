"""Rotary position embedding in plain torch. Source: Su et al., "RoFormer", 2021."""

from __future__ import annotations

import torch
from torch import Tensor

from megalite_kernels.reference.common import widen


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    """Rotate the first `2 * cos.shape[-1]` features of every head; the rest pass through.

    x is [..., S, heads, D], cos and sin are [S, R/2] (or [B, S, R/2]); feature pairs are (i, i + R/2), or
    (2i, 2i + 1) when interleaved. `inverse` rotates back, which is also the gradient.
    """
    half = cos.shape[-1]
    wide = widen(x)
    cos, sin = cos.unsqueeze(-2).to(wide.dtype), sin.unsqueeze(-2).to(wide.dtype)
    if inverse:
        sin = -sin
    rotary, rest = wide[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        first, second = rotary[..., 0::2], rotary[..., 1::2]
    else:
        first, second = rotary[..., :half], rotary[..., half:]
    turned = (first * cos - second * sin, second * cos + first * sin)
    rotated = torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)
    return torch.cat((rotated.to(x.dtype), rest), dim=-1)


def forward(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    """`rotate` of q and of k."""
    return rotate(q, cos, sin, interleaved, inverse), rotate(k, cos, sin, interleaved, inverse)


def forward_(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> None:
    """`rotate` of q and of k, written over them."""
    for x in (q, k):
        x.copy_(rotate(x, cos, sin, interleaved, inverse))


def norm_forward(
    q: Tensor,
    k: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """RMSNorm of every head, then `rotate`, rounded once; returns (q, k, q_rstd [tokens * heads], k_rstd)."""
    q_out, q_rstd = _norm_and_rotate(q, q_norm, cos, sin, eps, interleaved)
    k_out, k_rstd = _norm_and_rotate(k, k_norm, cos, sin, eps, interleaved)
    return q_out, k_out, q_rstd, k_rstd


def norm_backward(
    dq_out: Tensor,
    dk_out: Tensor,
    q: Tensor,
    k: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    q_rstd: Tensor,
    k_rstd: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dq_norm, dk_norm)."""
    dq, dq_norm = _norm_and_rotate_backward(dq_out, q, q_norm, q_rstd, cos, sin, interleaved)
    dk, dk_norm = _norm_and_rotate_backward(dk_out, k, k_norm, k_rstd, cos, sin, interleaved)
    return dq, dk, dq_norm, dk_norm


def _norm_and_rotate(
    x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float, interleaved: bool
) -> tuple[Tensor, Tensor]:
    wide = widen(x)
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    y = rotate(wide * rstd * weight.to(wide.dtype), cos, sin, interleaved, False)
    return y.to(x.dtype).contiguous(), rstd.flatten()


def _norm_and_rotate_backward(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """With n = x*rstd and g = (dy rotated back)*weight: dx = rstd * (g - n * mean(g*n)), dweight = sum(dy*n)."""
    wide, turned = widen(x), rotate(widen(dy), cos, sin, interleaved, True)
    rstd = rstd.view(*x.shape[:-1], 1).to(wide.dtype)
    normed = wide * rstd
    g = turned * weight.to(wide.dtype)
    dx = rstd * (g - normed * (g * normed).mean(-1, keepdim=True))
    dweight = (turned * normed).reshape(-1, x.shape[-1]).sum(0)
    return dx.to(x.dtype).contiguous(), dweight.to(weight.dtype)
