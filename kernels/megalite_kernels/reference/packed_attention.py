"""Attention of a packed projection, from a rotation and an attention of separate tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megalite_kernels.reference import attention, rope
from megalite_kernels.reference.attention import Bounds, Options

Op = Callable[..., Any]


def heads_of(qkv: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views q [.., N, D], k and v [.., K, D] of qkv [.., (N + 2K) D]."""
    packed = qkv.unflatten(-1, (heads + 2 * kv_heads, -1))
    q, k, v = packed.split((heads, kv_heads, kv_heads), dim=-2)
    return q, k, v


def composed(turn: Op, attend: Op, attend_backward: Op) -> tuple[Op, Op]:
    """Implementations of `packed_attention_fwd` and `packed_attention_bwd`.

    Args:
        turn: as `rope_fwd`.
        attend, attend_backward: as `attention_fwd` and `attention_bwd`.

    The backward pass turns queries and keys once more: that they are not kept is worth a pass over them.
    """

    def turned(
        qkv: Tensor, cos: Tensor | None, sin: Tensor | None, heads: int, kv_heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = heads_of(qkv, heads, kv_heads)
        return (q, k, v) if cos is None else (*turn(q, k, cos, sin, False, False), v)

    def forward(
        qkv: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        cu_seqlens: Tensor | None,
        sinks: Tensor | None,
        heads: int,
        kv_heads: int,
        *options: Any,
    ) -> tuple[Tensor, Tensor]:
        q, k, v = turned(qkv, cos, sin, heads, kv_heads)
        out, lse = attend(q, k, v, cu_seqlens, None, sinks, *options)
        return out, lse

    def backward(
        dout: Tensor,
        qkv: Tensor,
        out: Tensor,
        lse: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        cu_seqlens: Tensor | None,
        sinks: Tensor | None,
        heads: int,
        kv_heads: int,
        *options: Any,
    ) -> tuple[Tensor, Tensor]:
        q, k, v = turned(qkv, cos, sin, heads, kv_heads)
        dq, dk, dv, dsinks = attend_backward(dout, None, q, k, v, out, lse, cu_seqlens, None, sinks, *options)
        del q, k, v
        if cos is not None:
            dq, dk = turn(dq, dk, cos, sin, False, True)
        return torch.cat([x.flatten(-2) for x in (dq, dk, dv)], dim=-1), dsinks

    return forward, backward


def _attend(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, _: None, sinks: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor]:
    return attention.forward(q, k, v, Bounds(cu_seqlens), sinks, Options(*options))


def _attend_backward(
    dout: Tensor,
    dlse: None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    _: None,
    sinks: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    bounds = Bounds(cu_seqlens)
    return attention.backward(dout, dlse, q, k, v, out, lse, bounds, sinks, Options(*options))


forward, backward = composed(rope.forward, _attend, _attend_backward)
