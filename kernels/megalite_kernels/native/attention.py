"""Attention on the native library."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from megalite_kernels import _C
from megalite_kernels.native.common import DTYPES, address, by_token, float_weights, threads
from megalite_kernels.reference.attention import Bounds, documents
from megalite_kernels.reference.packed_attention import heads_of


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    sinks: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    """Backend "cpu" of `attention_fwd`."""
    return _forward(q, k, v, Bounds(cu_seqlens, cu_seqlens_k), sinks, _STILL, options)


def backward(
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
    """Backend "cpu" of `attention_bwd`."""
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
    bounds = Bounds(cu_seqlens, cu_seqlens_k)
    dsinks = _backward(dout, dlse, (q, k, v), (out, lse), (dq, dk, dv), bounds, sinks, _STILL, options)
    return dq, dk, dv, dsinks


def packed_forward(
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    cu_seqlens: Tensor | None,
    sinks: Tensor | None,
    heads: int,
    kv_heads: int,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    """Backend "cpu" of `packed_attention_fwd`."""
    q, k, v = heads_of(qkv.contiguous(), heads, kv_heads)
    with _rotation(cos, sin) as rotation:
        return _forward(q, k, v, Bounds(cu_seqlens), sinks, rotation, options)


def packed_backward(
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
    """Backend "cpu" of `packed_attention_bwd`: the kernel writes dq, dk and dv into one tensor."""
    qkv = qkv.contiguous()
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype)
    inputs, outputs = (heads_of(x, heads, kv_heads) for x in (qkv, dqkv))
    with _rotation(cos, sin) as rotation:
        dsinks = _backward(
            dout, None, inputs, (out, lse), outputs, Bounds(cu_seqlens), sinks, rotation, options
        )
    return dqkv, dsinks


_STILL = (0, 0, 0, 0)
"""The rotation that turns nothing."""


@contextmanager
def _rotation(cos: Tensor | None, sin: Tensor | None) -> Iterator[tuple[int, int, int, int]]:
    """`Rotation` of csrc/api.h, valid in the `with` block."""
    if cos is None or sin is None or not cos.numel():
        yield _STILL
        return
    cos, sin = float_weights(cos), float_weights(sin)
    yield address(cos), address(sin), cos.shape[-1], cos.numel() // cos.shape[-1]


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Bounds,
    sinks: Tensor | None,
    rotation: tuple[int, int, int, int],
    options: tuple[Any, ...],
) -> tuple[Tensor, Tensor]:
    q, k, v = by_token(q), by_token(k), by_token(v)
    out, lse = torch.empty(q.shape, dtype=q.dtype), _empty_lse(q)
    wide_sinks = None if sinks is None else float_weights(sinks)
    table, shape = _shape(q, k, bounds, options, wide_sinks, rotation)
    pointers = (_strided(q), _strided(k), _strided(v), address(out), address(lse))
    _C.attention_forward(DTYPES[q.dtype], *pointers, shape, threads())
    del table, wide_sinks  # shape holds their addresses
    return out, lse


def _backward(
    dout: Tensor,
    dlse: Tensor | None,
    inputs: tuple[Tensor, ...],
    results: tuple[Tensor, Tensor],
    outputs: tuple[Tensor, ...],
    bounds: Bounds,
    sinks: Tensor | None,
    rotation: tuple[int, int, int, int],
    options: tuple[Any, ...],
) -> Tensor:
    """Writes dq, dk and dv into the outputs, for q, k and v and the results out and lse; returns dsinks."""
    dout, q, k, v, out = (by_token(x) for x in (dout, *inputs, results[0]))
    lse, dlse = results[1].contiguous(), None if dlse is None else dlse.to(torch.float32).contiguous()
    wide_sinks = None if sinks is None else float_weights(sinks)
    table, shape = _shape(q, k, bounds, options, wide_sinks, rotation)
    tensors = (*(_strided(x) for x in (q, k, v, out)), address(lse), *(_strided(x) for x in outputs))
    dsinks = torch.empty((table.shape[0], q.shape[-2]), dtype=torch.float32)
    _C.attention_backward(
        DTYPES[q.dtype], _strided(dout), address(dlse), *tensors, address(dsinks), shape, threads()
    )
    del table, wide_sinks
    return q.new_zeros(0) if sinks is None else dsinks.sum(0).to(sinks.dtype)


def _empty_lse(q: Tensor) -> Tensor:
    shape = (q.shape[0], q.shape[2], q.shape[1]) if q.dim() == 4 else (q.shape[1], q.shape[0])
    return torch.empty(shape, dtype=torch.float32)


def _strided(x: Tensor) -> tuple[int, int, int]:
    return address(x), x.stride(-3), x.stride(-2)


def _shape(
    q: Tensor,
    k: Tensor,
    bounds: Bounds,
    options: tuple[Any, ...],
    sinks: Tensor | None,
    rotation: tuple[int, int, int, int],
) -> tuple[Tensor, tuple[Any, ...]]:
    """The table of documents (`Segment` of csrc/api.h) and the `AttentionShape` that points to it.

    options are causal, window, offset, max_seqlen (of no use here), softcap and scale.
    """
    heads, kv_heads, dim = q.shape[-2], k.shape[-2], q.shape[-1]
    if bounds.queries is None:
        rows, columns = q.shape[1], k.shape[1]
        lines = [(b * rows, rows, b * columns, columns, b * heads * rows) for b in range(q.shape[0])]
        stride = rows
    else:
        pairs = documents(bounds, q.shape[0], k.shape[0])
        lines = [(p.start, p.stop - p.start, r.start, r.stop - r.start, p.start) for p, r in pairs]
        stride = q.shape[0]
    table = torch.tensor(lines, dtype=torch.int64).view(-1, 5)
    *masks, _, softcap, scale = options
    numbers = (address(table), len(lines), heads, kv_heads, dim, stride, *masks, softcap, scale)
    return table, (*numbers, address(sinks), rotation)
