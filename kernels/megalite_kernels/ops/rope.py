"""Rotary position embedding of queries and keys in one call: alone, in place, or after an RMSNorm of each head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megalite_kernels._library import define
from megalite_kernels.backend import register, register_lazy
from megalite_kernels.ops import checks
from megalite_kernels.ops.cuda_support import cuda_rope_supports
from megalite_kernels.ops.native_support import NATIVE, native_supports
from megalite_kernels.ops.rms_norm import row_statistic
from megalite_kernels.ops.triton_support import TRITON, triton_supports
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
        ValueError: shapes, dtypes or devices don't fit together, or norm_eps is negative.

    Saved: cos and sin; with the norms also q, k, their weights, and one float32 per head.
    Source: Su et al., "RoFormer", 2021.
    """
    check(q, k, cos, sin, rotary_dim)
    if (q_norm is None) != (k_norm is None):
        raise ValueError("q_norm and k_norm must be given together: pass both or neither")
    if q_norm is None or k_norm is None:
        return _Rope.apply(q, k, cos, sin, interleaved)
    checks.require_range(norm_eps, "norm_eps")
    for name, weight in (("q_norm", q_norm), ("k_norm", k_norm)):
        checks.require_float(**{name: weight})
        checks.require_shape(weight, (q.shape[-1],), name, f"heads of {q.shape[-1]} features")
        checks.require_same_device(weight, q, name, "q")
    return _RopeNorm.apply(q, k, q_norm.contiguous(), k_norm.contiguous(), cos, sin, norm_eps, interleaved)


def rope_(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    rotary_dim: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`rope` written over q and k, which saves their copies: for fresh outputs of a projection.

    Nothing else may need the old values. The product that made q and k does not, so its outputs, or slices of
    them such as `qkv[..., :heads, :]`, are fine; `split` and `chunk` make views that torch refuses to overwrite.

    Args:
        q, k, cos, sin, interleaved, rotary_dim: as in `rope`.

    Returns:
        q and k themselves.

    Raises:
        ValueError: shapes, dtypes or devices don't fit together.

    Saved: cos and sin.
    Source: Su et al., "RoFormer", 2021.
    """
    check(q, k, cos, sin, rotary_dim)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        # One at a time: torch takes one output of a Function that overwrites views, and these may share a base.
        return _RopeInPlace.apply(q, cos, sin, interleaved), _RopeInPlace.apply(k, cos, sin, interleaved)
    _forward_(q, k, cos, sin, interleaved, False)
    return q, k


def check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int | None) -> None:
    checks.require_float(q=q, k=k)
    if q.dim() not in (3, 4):
        raise ValueError(f"q has shape {list(q.shape)}: pass [B, S, N, D] or packed [T, N, D]")
    checks.require_shape(k, (*q.shape[:-2], k.shape[-2], q.shape[-1]), "k", f"q of shape {list(q.shape)}")
    checks.require_same_kind(k, q, "k", "q")
    check_tables(q, tuple(q.shape), cos, sin)
    rotary = 2 * cos.shape[-1]
    if rotary_dim is not None and rotary_dim != rotary:
        raise ValueError(
            f"rotary_dim={rotary_dim} must be twice the columns of cos, which are {cos.shape[-1]}"
        )


def check_tables(q: Tensor, shape: tuple[int, ...], cos: Tensor, sin: Tensor) -> None:
    """The part of `check` about angles, for queries of this shape; q is any tensor on the device."""
    checks.require_float(cos=cos, sin=sin)
    checks.require_like(sin, cos, "sin", "cos")
    checks.require_same_device(cos, q, "cos", "q")
    tokens = shape[:-2]
    if tuple(cos.shape[:-1]) not in (tokens, tokens[-1:]):
        raise ValueError(
            f"cos has shape {list(cos.shape)}, but q of shape {list(shape)} needs one row for each of its "
            f"tokens: {[*tokens, 'R/2']} or {[*tokens[-1:], 'R/2']}"
        )
    if 2 * cos.shape[-1] > shape[-1]:
        raise ValueError(f"cos has {cos.shape[-1]} columns: at most half of the head's {shape[-1]} features")


def _fake_norm_forward(
    q: Tensor, k: Tensor, q_norm: Tensor, k_norm: Tensor, cos: Tensor, sin: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), row_statistic(q), row_statistic(k)


def _fake_norm_backward(
    dq_out: Tensor, dk_out: Tensor, q: Tensor, k: Tensor, q_norm: Tensor, k_norm: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        q_norm.new_empty(q_norm.shape),
        k_norm.new_empty(k_norm.shape),
    )


_forward = define(
    "rope_fwd(Tensor q, Tensor k, Tensor cos, Tensor sin, bool interleaved, bool inverse) -> (Tensor, Tensor)",
    fake=lambda q, k, cos, sin, interleaved, inverse: (q.new_empty(q.shape), k.new_empty(k.shape)),
)
_forward_ = define(
    "rope_(Tensor(a!) q, Tensor(b!) k, Tensor cos, Tensor sin, bool interleaved, bool inverse) -> ()",
    fake=lambda q, k, cos, sin, interleaved, inverse: None,
)
_norm_forward = define(
    "rope_norm_fwd(Tensor q, Tensor k, Tensor q_norm, Tensor k_norm, Tensor cos, Tensor sin, float eps, "
    "bool interleaved) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_norm_forward,
)
_norm_backward = define(
    "rope_norm_bwd(Tensor dq_out, Tensor dk_out, Tensor q, Tensor k, Tensor q_norm, Tensor k_norm, "
    "Tensor q_rstd, Tensor k_rstd, Tensor cos, Tensor sin, bool interleaved) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_norm_backward,
)
for _op, _name in (
    ("rope_fwd", "forward"),
    ("rope_", "forward_"),
    ("rope_norm_fwd", "norm_forward"),
    ("rope_norm_bwd", "norm_backward"),
):
    register(_op, "reference", getattr(reference, _name))
    register_lazy(
        _op, "cpu", f"megalite_kernels.native.rope:{_name}", requires=NATIVE, supports=native_supports
    )
    register_lazy(
        _op, "triton", f"megalite_kernels.triton.rope:{_name}", requires=TRITON, supports=triton_supports
    )
    register_lazy(_op, "cuda", f"megalite_kernels.native.cuda.rope:{_name}", supports=cuda_rope_supports)


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


class _RopeInPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        ctx.mark_dirty(x)
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        _forward_(x, _no_heads(x), cos, sin, interleaved, False)
        return x

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _forward(dx, _no_heads(dx), cos, sin, ctx.interleaved, True)[0], None, None, None


def _no_heads(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-2], 0, x.shape[-1]))


class _RopeNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        q_norm: Tensor,
        k_norm: Tensor,
        cos: Tensor,
        sin: Tensor,
        eps: float,
        interleaved: bool,
    ) -> tuple[Tensor, Tensor]:
        q_out, k_out, *statistics = _norm_forward(q, k, q_norm, k_norm, cos, sin, eps, interleaved)
        ctx.save_for_backward(q, k, q_norm, k_norm, *statistics, cos, sin)
        ctx.interleaved = interleaved
        return q_out, k_out

    @staticmethod
    def backward(ctx: Any, dq_out: Tensor, dk_out: Tensor) -> tuple[Tensor | None, ...]:
        grads = _norm_backward(dq_out, dk_out, *ctx.saved_tensors, ctx.interleaved)
        return *grads, None, None, None, None
