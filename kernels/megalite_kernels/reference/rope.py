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
