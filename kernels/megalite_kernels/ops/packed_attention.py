"""Attention of queries, keys and values that lie side by side, as one projection gives them, rotation included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megalite_kernels import sdpa
from megalite_kernels._library import define
from megalite_kernels.backend import Supports, register, register_lazy
from megalite_kernels.ops import attention as separate
from megalite_kernels.ops import checks, rope
from megalite_kernels.ops.attention_checks import check_bounds, check_options, lse_shape, raw_options
from megalite_kernels.ops.cuda_support import cuda_supports
from megalite_kernels.ops.native_support import NATIVE, native_supports
from megalite_kernels.ops.triton_support import TRITON, triton_supports
from megalite_kernels.reference import packed_attention as reference
from megalite_kernels.reference import rope as rope_reference
from megalite_kernels.reference.common import wide_dtype
from megalite_kernels.reference.packed_attention import composed, heads_of


def packed_attention(
    qkv: Tensor,
    num_heads: int,
    num_kv_heads: int,
    *,
    rotary: tuple[Tensor, Tensor] | None = None,
    causal: bool = True,
    window: int | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """`attention(*rope(q, k), v)` of one tensor that holds q, k and v, with one gradient for all three.

    On the CPU queries and keys turn on their way into the kernel, in both passes, and their gradients on the way
    out: turned ones never exist in memory, and nothing is joined. Elsewhere it is a composition of `rope` and
    `attention` that makes the turned ones again in the backward pass.

    Args:
        qkv: [B, S, (N + 2K) D], or packed documents [T, (N + 2K) D]: N query heads, K key heads, K value heads.
        num_heads, num_kv_heads: N, K; N is a multiple of K.
        rotary: (cos, sin) of `rope`, each [S, R/2], [B, S, R/2] or packed [T, R/2] fp32, for pairs (i, i + R/2);
            None turns nothing.
        causal, window, cu_seqlens, max_seqlen, softcap, sinks, scale: as in `attention`.

    Returns:
        [B, S, N, D] or [T, N, D].

    Raises:
        ValueError: qkv does not hold such heads, or as `rope` and `attention`.

    Saved: qkv, out, lse, cos, sin.
    """
    _check_packed(qkv, num_heads, num_kv_heads, cu_seqlens)
    # By numbers and not by views: on a CPU these take as long as the checks, 20 to 30 us each after another kernel.
    check_bounds(qkv, cu_seqlens, None, max_seqlen)
    check_options(qkv, num_heads, num_kv_heads, window, softcap, sinks)
    head_dim = _head_dim(qkv, num_heads, num_kv_heads)
    cos, sin = rotary if rotary is not None else (None, None)
    if cos is not None and sin is not None:
        rope.check_tables(qkv, (*qkv.shape[:-1], num_heads, head_dim), cos, sin)
    options = raw_options(head_dim, causal, window, 0, max_seqlen, softcap, scale)
    return _PackedAttention.apply(qkv, cos, sin, cu_seqlens, sinks, num_heads, num_kv_heads, *options)


def _check_packed(qkv: Tensor, heads: int, kv_heads: int, cu_seqlens: Tensor | None) -> None:
    checks.require_float(qkv=qkv)
    dims, form = (3, "[B, S, (N + 2K) D]") if cu_seqlens is None else (2, "[T, (N + 2K) D] with cu_seqlens")
    if qkv.dim() != dims:
        raise ValueError(f"qkv has shape {list(qkv.shape)}: pass {form}")
    if heads < 1 or kv_heads < 1 or qkv.shape[-1] % (heads + 2 * kv_heads):
        raise ValueError(
            f"qkv has {qkv.shape[-1]} columns: must be a multiple of num_heads + 2 num_kv_heads = "
            f"{heads} + 2 * {kv_heads}, both at least 1"
        )


def _head_dim(qkv: Tensor, heads: int, kv_heads: int) -> int:
    return qkv.shape[-1] // (heads + 2 * kv_heads)


def _fake_forward(
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    cu_seqlens: Tensor | None,
    sinks: Tensor | None,
    heads: int,
    kv_heads: int,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    out = qkv.new_empty((*qkv.shape[:-1], heads, _head_dim(qkv, heads, kv_heads)))
    return out, qkv.new_empty(lse_shape(out), dtype=wide_dtype(qkv))


def _fake_backward(dout: Tensor, qkv: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    sinks = rest[5]
    return qkv.new_empty(qkv.shape), qkv.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)


_REST = (
    "Tensor? cos, Tensor? sin, Tensor? cu_seqlens, Tensor? sinks, int heads, int kv_heads, "
    "bool causal, int window, int offset, SymInt max_seqlen, float softcap, float scale"
)
_forward = define(f"packed_attention_fwd(Tensor qkv, {_REST}) -> (Tensor, Tensor)", fake=_fake_forward)
_backward = define(
    f"packed_attention_bwd(Tensor dout, Tensor qkv, Tensor out, Tensor lse, {_REST}) -> (Tensor, Tensor)",
    fake=_fake_backward,
)


def _sdpa_supports(
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    cu_seqlens: Tensor | None,
    sinks: Tensor | None,
    heads: int,
    kv_heads: int,
    *options: Any,
) -> str | None:
    return sdpa.supports_forward(*heads_of(qkv, heads, kv_heads), cu_seqlens, None, sinks, *options)


def _sdpa_supports_backward(dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, *rest: Any) -> str | None:
    return _sdpa_supports(qkv, *rest)


_by_choice_forward, _by_choice_backward = composed(rope._forward, separate._forward, separate._backward)
"""Of whatever back-ends serve the parts."""
_by_sdpa_forward, _by_sdpa_backward = composed(rope_reference.forward, sdpa.forward, sdpa.backward)


def _register_all(op: str, name: str, plain: Callable[..., Any], supports: Supports) -> None:
    """`name` is "forward" or "backward"; `supports` is torch's own attention's."""
    register(op, "reference", plain)
    register_lazy(op, "sdpa", f"{__name__}:_by_sdpa_{name}", supports=supports)
    native = f"megalite_kernels.native.attention:packed_{name}"
    register_lazy(op, "cpu", native, requires=NATIVE, supports=native_supports)
    chosen = f"{__name__}:_by_choice_{name}"
    register_lazy(op, "triton", chosen, requires=TRITON, supports=triton_supports)
    register_lazy(op, "cuda", chosen, supports=cuda_supports)


_register_all("packed_attention_fwd", "forward", reference.forward, _sdpa_supports)
_register_all("packed_attention_bwd", "backward", reference.backward, _sdpa_supports_backward)


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        cu_seqlens: Tensor | None,
        sinks: Tensor | None,
        *options: Any,
    ) -> Tensor:
        out, lse = _forward(qkv, cos, sin, cu_seqlens, sinks, *options)
        ctx.save_for_backward(qkv, out, lse, cos, sin, cu_seqlens, sinks)
        ctx.options = options
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, sinks = ctx.saved_tensors
        dqkv, dsinks = _backward(dout, *tensors, sinks, *ctx.options)
        return dqkv, None, None, None, None if sinks is None else dsinks, *(None for _ in ctx.options)
