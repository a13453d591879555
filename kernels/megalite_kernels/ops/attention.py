"""Scaled dot-product attention: causal or full, grouped heads, packed documents, window, soft-cap, sinks."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from megalite_kernels._library import define
from megalite_kernels.backend import register, register_lazy
from megalite_kernels.ops import checks
from megalite_kernels.ops.attention_checks import check, lse_shape, raw_options
from megalite_kernels.ops.cuda_support import cuda_attention_backward_supports, cuda_attention_supports
from megalite_kernels.ops.native_support import (
    NATIVE,
    native_attention_backward_supports,
    native_attention_supports,
)
from megalite_kernels.ops.triton_support import TRITON, triton_attention_supports
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
    check(q, k, v, window, (cu_seqlens, None), max_seqlen, softcap, sinks)
    options = raw_options(q.shape[-1], causal, window, 0, max_seqlen, softcap, scale)
    function = _AttentionWithLse if return_lse else _Attention
    return function.apply(q, k, v, cu_seqlens, sinks, *options)


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen: int | None = None,
    offset: int = 0,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """One part of an attention whose keys come in parts (ring attention), without autograd.

    Query i of a document stands at key position `i + (k_len - q_len) + offset`, which may lie before or behind
    these keys. Partial results merge by their log-sum-exp:

        lse = logaddexp(lse_1, lse_2);  out = exp(lse_1 - lse) * out_1 + exp(lse_2 - lse) * out_2

    with weight 0 where an lse is -inf. `attention_backward` is then called once per part, each time with the
    *merged* out and lse: its probabilities come out as those of the whole, dq of the parts adds up, dk and dv
    are those of the part's keys.

    Args:
        q, k, v, causal, window, cu_seqlens, softcap, scale: as in `attention`.
        cu_seqlens_k: [documents + 1] int32, where the documents start in k and v [Tk, K, D]; None: as in q.
        max_seqlen: longest document, of queries and of keys; with cu_seqlens only.
        offset: how much later than aligned at the end the queries stand; keys that come from a rank `r` places
            earlier in the ring, with documents cut into equal chunks, need `r * chunk`.
        sinks: [N]; a sink counts once per call, so give it to one of the parts only.

    Returns:
        (out like q, lse [B, N, S] or [N, T] in fp32), zeros and -inf for a query that sees no key.

    Raises:
        ValueError: as `attention`.
    """
    bounds = (cu_seqlens, cu_seqlens_k)
    check(q, k, v, window, bounds, max_seqlen, softcap, sinks)
    return _forward(
        q, k, v, *bounds, sinks, *raw_options(q.shape[-1], causal, window, offset, max_seqlen, softcap, scale)
    )


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen: int | None = None,
    offset: int = 0,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    dlse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of one part of an attention, from the out and lse of the whole (see `attention_forward`).

    Args:
        dout, out: like q, of the merged result.
        lse, dlse: [B, N, S] or [N, T] fp32, of the merged result; dlse None: zero.
        q, k, v and the options: those of this part.

    Returns:
        (dq, dk, dv, dsinks); dsinks is None without sinks. dq is this part's share of the sum.

    Raises:
        ValueError: as `attention`, or dout, out, lse or dlse don't fit q.
    """
    bounds = (cu_seqlens, cu_seqlens_k)
    check(q, k, v, window, bounds, max_seqlen, softcap, sinks)
    checks.require_like(dout, q, "dout", "q")
    checks.require_like(out, q, "out", "q")
    checks.require_shape(lse, lse_shape(q), "lse", f"q of shape {list(q.shape)}")
    if dlse is not None:
        checks.require_like(dlse, lse, "dlse", "lse")
    options = raw_options(q.shape[-1], causal, window, offset, max_seqlen, softcap, scale)
    dq, dk, dv, dsinks = _backward(dout, dlse, q, k, v, out, lse, *bounds, sinks, *options)
    return dq, dk, dv, dsinks if sinks is not None else None


def reference_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    sinks: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    """Reference of `attention_fwd`."""
    bounds = reference.Bounds(cu_seqlens, cu_seqlens_k)
    return reference.forward(q, k, v, bounds, sinks, reference.Options(*options))


def reference_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    sinks: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Reference of `attention_bwd`."""
    bounds = reference.Bounds(cu_seqlens, cu_seqlens_k)
    return reference.backward(dout, dlse, q, k, v, out, lse, bounds, sinks, reference.Options(*options))


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(lse_shape(q), dtype=wide_dtype(q))


def _fake_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    sinks: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dsinks = q.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dsinks


_OPTIONS = (
    "Tensor? cu_seqlens, Tensor? cu_seqlens_k, Tensor? sinks, "
    "bool causal, int window, int offset, SymInt max_seqlen, float softcap, float scale"
)
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
for _op, _function in (("attention_fwd", "forward"), ("attention_bwd", "backward")):
    register_lazy(
        _op,
        "triton",
        f"megalite_kernels.triton.attention:{_function}",
        requires=TRITON,
        supports=triton_attention_supports,
    )
register_lazy(
    "attention_fwd",
    "cuda",
    "megalite_kernels.native.cuda.attention:forward",
    supports=cuda_attention_supports,
)
register_lazy(
    "attention_bwd",
    "cuda",
    "megalite_kernels.native.cuda.attention:backward",
    supports=cuda_attention_backward_supports,
)
register_lazy("attention_fwd", "sdpa", "megalite_kernels.sdpa:forward", supports=supports_forward)
register_lazy("attention_bwd", "sdpa", "megalite_kernels.sdpa:backward", supports=supports_backward)


def _save(ctx: Any, saved: tuple[Tensor | None, ...], options: tuple[Any, ...]) -> None:
    ctx.save_for_backward(*saved)
    ctx.options = options


def _input_grads(ctx: Any, dout: Tensor, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, cu_seqlens, sinks = ctx.saved_tensors
    dq, dk, dv, dsinks = _backward(dout, dlse, q, k, v, out, lse, cu_seqlens, None, sinks, *ctx.options)
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
        out, lse = _forward(q, k, v, cu_seqlens, None, sinks, *options)
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
        out, lse = _forward(q, k, v, cu_seqlens, None, sinks, *options)
        _save(ctx, (q, k, v, out, lse, cu_seqlens, sinks), options)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        return _input_grads(ctx, dout, dlse)
