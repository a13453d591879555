"""Scaled dot-product attention: causal or full, grouped heads, packed documents, window, soft-cap, sinks."""

from __future__ import annotations

import math
from typing import Any, Literal, overload

import torch
from torch import Tensor

from megalite_kernels._library import define
from megalite_kernels.backend import register, register_lazy
from megalite_kernels.ops import checks
from megalite_kernels.ops.native_support import (
    NATIVE,
    native_attention_backward_supports,
    native_attention_supports,
)
from megalite_kernels.reference import attention as reference
from megalite_kernels.reference.common import wide_dtype
from megalite_kernels.sdpa import supports_backward, supports_forward


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`softmax(scale * q k^T) v` over the keys that each query may see.

    Args:
        q: [B, S, N, D], or packed documents [T, N, D]; bf16, fp16, fp32 or fp64.
        k, v: [B, Sk, K, D] (packed: [T, K, D]) like q; N is a multiple of K, query head n reads key head
            n // (N / K).
        causal: a query sees no later key. With S < Sk the queries are the last S positions (as with a
            key/value cache).
        window: tokens a query may look back at, itself included (when not causal, also ahead); None: all.
        cu_seqlens: [documents + 1] int32, where each packed document starts, and T; documents never see one
            another, bit for bit.
        max_seqlen: longest document; with cu_seqlens only (needed by GPU kernels, which must not read
            cu_seqlens on the host).
        softcap: logits become `softcap * tanh(logits / softcap)`.
        sinks: [N] logits that take part in each softmax and give no value.
        scale: None takes 1 / sqrt(D).
        return_lse: also return the log-sum-exp of the logits.

    Returns:
        out like q; with return_lse (out, lse), lse [B, N, S] (packed: [N, T]) fp32 and differentiable. A query
        that sees no key gives zeros and an lse of -inf.

    Raises:
        ValueError: shapes, dtypes, devices or an option is out of its range.

    Saved: q, k, v, out, lse.
    Source: Dao, "FlashAttention-2", 2023; the sinks are those of gpt-oss.
    """
    _check(q, k, v, window, cu_seqlens, max_seqlen, softcap, sinks)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    options = (causal, window or 0, softcap or 0.0, scale)
    function = _AttentionWithLse if return_lse else _Attention
    return function.apply(q, k, v, cu_seqlens, sinks, *options)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> None:
    checks.require_float(q=q)
    dims, form = (4, "[B, S, N, D]") if cu_seqlens is None else (3, "packed [T, N, D] with cu_seqlens")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != dims:
            raise ValueError(f"{name} has shape {list(tensor.shape)}: pass {form}")
        checks.require_same_kind(tensor, q, name, "q")
    tokens = k.shape[-3] if cu_seqlens is None else q.shape[0]
    checks.require_shape(
        k, (*q.shape[:-3], tokens, k.shape[-2], q.shape[-1]), "k", f"q of shape {list(q.shape)}"
    )
    checks.require_like(v, k, "v", "k")
    if k.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
        raise ValueError(f"q has {q.shape[-2]} heads: must be a multiple of the {k.shape[-2]} heads of k")
    if window is not None and window < 1:
        raise ValueError(f"window={window} must be at least 1 (the token itself), or None for no limit")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap={softcap} must be greater than 0, or None for no cap")
    if sinks is not None:
        checks.require_shape(sinks, (q.shape[-2],), "sinks", f"q with {q.shape[-2]} heads")
        checks.require_same_device(sinks, q, "sinks", "q")
    if cu_seqlens is not None:
        if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
            shape = list(cu_seqlens.shape)
            raise ValueError(f"cu_seqlens is {cu_seqlens.dtype} {shape}: pass int32 [documents + 1]")
        checks.require_same_device(cu_seqlens, q, "cu_seqlens", "q")
    elif max_seqlen is not None:
        raise ValueError(f"max_seqlen={max_seqlen} has a meaning with cu_seqlens only: pass both or neither")


def reference_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, sinks: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor]:
    """Reference of `attention_fwd`."""
    return reference.forward(q, k, v, cu_seqlens, sinks, reference.Options(*options))


def reference_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    sinks: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Reference of `attention_bwd`."""
    return reference.backward(dout, dlse, q, k, v, out, lse, cu_seqlens, sinks, reference.Options(*options))


def _fake_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, sinks: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor]:
    shape = (q.shape[0], q.shape[2], q.shape[1]) if q.dim() == 4 else (q.shape[1], q.shape[0])
    return q.new_empty(q.shape), q.new_empty(shape, dtype=wide_dtype(q))


def _fake_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    sinks: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dsinks = q.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dsinks


_OPTIONS = "Tensor? cu_seqlens, Tensor? sinks, bool causal, int window, float softcap, float scale"
_forward = define(
    f"attention_fwd(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor)", fake=_fake_forward
)
_backward = define(
    f"attention_bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_OPTIONS})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_backward,
)
register("attention_fwd", "reference", reference_forward)
register("attention_bwd", "reference", reference_backward)
register_lazy(
    "attention_fwd",
    "cpu",
    "megalite_kernels.native.attention:forward",
    requires=NATIVE,
    supports=native_attention_supports,
)
register_lazy(
    "attention_bwd",
    "cpu",
    "megalite_kernels.native.attention:backward",
    requires=NATIVE,
    supports=native_attention_backward_supports,
)
register_lazy("attention_fwd", "sdpa", "megalite_kernels.sdpa:forward", supports=supports_forward)
register_lazy("attention_bwd", "sdpa", "megalite_kernels.sdpa:backward", supports=supports_backward)


def _save(ctx: Any, saved: tuple[Tensor | None, ...], options: tuple[Any, ...]) -> None:
    ctx.save_for_backward(*saved)
    ctx.options = options


def _input_grads(ctx: Any, dout: Tensor, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, cu_seqlens, sinks = ctx.saved_tensors
    dq, dk, dv, dsinks = _backward(dout, dlse, q, k, v, out, lse, cu_seqlens, sinks, *ctx.options)
    return dq, dk, dv, None, dsinks if sinks is not None else None, *(None for _ in ctx.options)


class _Attention(torch.autograd.Function):
    """Returns the output alone: a gradient of the log-sum-exp, even of zeros, costs and bars some backends."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor | None,
        sinks: Tensor | None,
        *options: Any,
    ) -> Tensor:
        out, lse = _forward(q, k, v, cu_seqlens, sinks, *options)
        _save(ctx, (q, k, v, out, lse, cu_seqlens, sinks), options)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        return _input_grads(ctx, dout, None)


class _AttentionWithLse(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor | None,
        sinks: Tensor | None,
        *options: Any,
    ) -> tuple[Tensor, Tensor]:
        out, lse = _forward(q, k, v, cu_seqlens, sinks, *options)
        _save(ctx, (q, k, v, out, lse, cu_seqlens, sinks), options)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        return _input_grads(ctx, dout, dlse)
