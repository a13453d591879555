"""Attention on the native library."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megalite_kernels import _C
from megalite_kernels.native.common import DTYPES, address, by_token, float_weights, threads
from megalite_kernels.reference.attention import Bounds, documents


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    sinks: Tensor | None,
    causal: bool,
    window: int,
    offset: int,
    max_seqlen: int,
    softcap: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Backend "cpu" of `attention_fwd`."""
    q, k, v = by_token(q), by_token(k), by_token(v)
    out, lse = torch.empty(q.shape, dtype=q.dtype), _empty_lse(q)
    wide_sinks = None if sinks is None else float_weights(sinks)
    options = (causal, window, offset, softcap, scale, address(wide_sinks))
    table, shape = _shape(q, k, Bounds(cu_seqlens, cu_seqlens_k), options)
    pointers = (_strided(q), _strided(k), _strided(v), address(out), address(lse))
    _C.attention_forward(DTYPES[q.dtype], *pointers, shape, threads())
    del table, wide_sinks  # shape holds their addresses
    return out, lse


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
    causal: bool,
    window: int,
    offset: int,
    max_seqlen: int,
    softcap: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Backend "cpu" of `attention_bwd`."""
    dout, q, k, v, out = (by_token(x) for x in (dout, q, k, v, out))
    lse, dlse = lse.contiguous(), None if dlse is None else dlse.to(torch.float32).contiguous()
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
    wide_sinks = None if sinks is None else float_weights(sinks)
    options = (causal, window, offset, softcap, scale, address(wide_sinks))
    table, shape = _shape(q, k, Bounds(cu_seqlens, cu_seqlens_k), options)
    inputs = (
        _strided(dout),
        address(dlse),
        _strided(q),
        _strided(k),
        _strided(v),
        _strided(out),
        address(lse),
    )
    dsinks = torch.empty((table.shape[0], q.shape[-2]), dtype=torch.float32)
    outputs = (address(dq), address(dk), address(dv), address(dsinks))
    _C.attention_backward(DTYPES[q.dtype], *inputs, *outputs, shape, threads())
    del table, wide_sinks
    return dq, dk, dv, q.new_zeros(0) if sinks is None else dsinks.sum(0).to(sinks.dtype)


def _empty_lse(q: Tensor) -> Tensor:
    shape = (q.shape[0], q.shape[2], q.shape[1]) if q.dim() == 4 else (q.shape[1], q.shape[0])
    return torch.empty(shape, dtype=torch.float32)


def _strided(x: Tensor) -> tuple[int, int, int]:
    return address(x), x.stride(-3), x.stride(-2)


def _shape(q: Tensor, k: Tensor, bounds: Bounds, options: tuple[Any, ...]) -> tuple[Tensor, tuple[Any, ...]]:
    """The table of documents (`Segment` of csrc/api.h) and the `AttentionShape` that points to it.

    options are causal, window, offset, softcap, scale and the address of the sinks.
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
    return table, (address(table), len(lines), heads, kv_heads, dim, stride, *options)
