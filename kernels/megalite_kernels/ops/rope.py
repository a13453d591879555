"""Rotary position embedding of queries and keys in one call, with optional RMSNorm of each head before it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megalite_kernels._library import define
from megalite_kernels.backend import register, register_lazy
from megalite_kernels.ops import checks
from megalite_kernels.ops.native_support import NATIVE, native_supports
from megalite_kernels.ops.rms_norm import rms_norm
from megalite_kernels.reference import rope as reference


def rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    rotary_dim: int | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    norm_eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Rotate pairs of features of every head by the angle of the token's position.

    A pair (a, b) becomes (a cos - b sin, b cos + a sin); pair i is features (i, i + R/2) of the head, or
    (2i, 2i + 1) when interleaved; features from R on pass through. Computed in float32, rounded once.

    Args:
        q: [B, S, N, D], or packed [T, N, D]; may be a view into a fused projection.
        k: [B, S, K, D], or packed [T, K, D], same dtype.
        cos, sin: [S, R/2], [B, S, R/2], or packed [T, R/2], fp32: row t holds the angles of token t, one per
            pair (not doubled as in Hugging Face). They get no gradient.
        interleaved: pairs are neighbours (GPT-J) and not half a head apart (Llama).
        rotary_dim: R; None takes it from cos.
        q_norm, k_norm: [D] weights of an RMSNorm over each head, before the rotation (Qwen 3); both or neither.
        norm_eps: of that norm.

    Returns:
        Rotated q and k, new contiguous tensors of the same shapes.

    Raises:
        ValueError: shapes, dtypes or devices don't fit together.

    Saved: cos and sin (and what `rms_norm` saves, with the norms).
    Source: Su et al., "RoFormer", 2021.
    """
    _check(q, k, cos, sin, rotary_dim)
    if (q_norm is None) != (k_norm is None):
        raise ValueError("q_norm and k_norm must be given together: pass both or neither")
    if q_norm is not None and k_norm is not None:
        q, k = rms_norm(q, q_norm, norm_eps), rms_norm(k, k_norm, norm_eps)
    return _Rope.apply(q, k, cos, sin, interleaved)


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int | None) -> None:
    checks.require_float(q=q, k=k, cos=cos, sin=sin)
    if q.dim() not in (3, 4):
        raise ValueError(f"q has shape {list(q.shape)}: pass [B, S, N, D] or packed [T, N, D]")
    checks.require_shape(k, (*q.shape[:-2], k.shape[-2], q.shape[-1]), "k", f"q of shape {list(q.shape)}")
    checks.require_same_kind(k, q, "k", "q")
    checks.require_like(sin, cos, "sin", "cos")
    checks.require_same_device(cos, q, "cos", "q")
    tokens = tuple(q.shape[:-2])
    if tuple(cos.shape[:-1]) not in (tokens, tokens[-1:]):
        raise ValueError(
            f"cos has shape {list(cos.shape)}, but q of shape {list(q.shape)} needs one row for each of its "
            f"tokens: {[*tokens, 'R/2']} or {[*tokens[-1:], 'R/2']}"
        )
    rotary = 2 * cos.shape[-1]
    if rotary_dim is not None and rotary_dim != rotary:
        raise ValueError(
            f"rotary_dim={rotary_dim} must be twice the columns of cos, which are {cos.shape[-1]}"
        )
    if rotary > q.shape[-1]:
        raise ValueError(
            f"cos has {cos.shape[-1]} columns: at most half of the head's {q.shape[-1]} features"
        )


_forward = define(
    "rope_fwd(Tensor q, Tensor k, Tensor cos, Tensor sin, bool interleaved, bool inverse) -> (Tensor, Tensor)",
    fake=lambda q, k, cos, sin, interleaved, inverse: (q.new_empty(q.shape), k.new_empty(k.shape)),
)
register("rope_fwd", "reference", reference.forward)
register_lazy(
    "rope_fwd", "cpu", "megalite_kernels.native.rope:forward", requires=NATIVE, supports=native_supports
)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _forward(q, k, cos, sin, interleaved, False)

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return *_forward(dq, dk, cos, sin, ctx.interleaved, True), None, None, None
