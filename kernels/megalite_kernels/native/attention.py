"""Attention on the native library."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

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
    qkv = qkv.contiguous()
    layout = _Layout.packed(qkv, heads, kv_heads)
    out = qkv.new_empty((*qkv.shape[:-1], heads, layout.dim))
    lse = _empty_lse(out)
    with _rotation(cos, sin) as rotation:
        _run_forward(_packed(qkv, layout), (out, lse), layout, Bounds(cu_seqlens), sinks, rotation, options)
    return out, lse


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
    dqkv, layout = qkv.new_empty(qkv.shape), _Layout.packed(qkv, heads, kv_heads)
    places = (_packed(qkv, layout), _packed(dqkv, layout))
    with _rotation(cos, sin) as rotation:
        results = (out, lse)
        dsinks = _run_backward(
            dout, None, results, *places, layout, Bounds(cu_seqlens), sinks, rotation, options
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
    out, lse = q.new_empty(q.shape), _empty_lse(q)
    places = (_strided(q), _strided(k), _strided(v))
    _run_forward(places, (out, lse), _Layout.separate(q, k), bounds, sinks, rotation, options)
    return out, lse


def _run_forward(
    places: tuple[Place, ...],
    results: tuple[Tensor, Tensor],
    layout: _Layout,
    bounds: Bounds,
    sinks: Tensor | None,
    rotation: tuple[int, int, int, int],
    options: tuple[Any, ...],
) -> None:
    """Writes out and lse, `results`, for q, k and v at `places`."""
    out, lse = results
    wide_sinks = None if sinks is None else float_weights(sinks)
    table, shape = _shape(layout, bounds, options, wide_sinks, rotation)
    _C.attention_forward(DTYPES[out.dtype], *places, address(out), address(lse), shape, threads())
    del table, wide_sinks  # shape holds their addresses


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
    q, k, v = (by_token(x) for x in inputs)
    places = (tuple(_strided(x) for x in (q, k, v)), tuple(_strided(x) for x in outputs))
    return _run_backward(
        dout, dlse, results, *places, _Layout.separate(q, k), bounds, sinks, rotation, options
    )


def _run_backward(
    dout: Tensor,
    dlse: Tensor | None,
    results: tuple[Tensor, Tensor],
    inputs: tuple[Place, ...],
    outputs: tuple[Place, ...],
    layout: _Layout,
    bounds: Bounds,
    sinks: Tensor | None,
    rotation: tuple[int, int, int, int],
    options: tuple[Any, ...],
) -> Tensor:
    """As `_backward`, with the places of q, k, v and of dq, dk, dv."""
    dout, out = by_token(dout), by_token(results[0])
    lse, dlse = results[1].contiguous(), None if dlse is None else float_weights(dlse)
    wide_sinks = None if sinks is None else float_weights(sinks)
    table, shape = _shape(layout, bounds, options, wide_sinks, rotation)
    tensors = (*inputs, _strided(out), address(lse), *outputs)
    documents = len(table) // _SEGMENT
    dsinks = None if sinks is None else dout.new_empty((documents, layout.heads), dtype=torch.float32)
    _C.attention_backward(
        DTYPES[dout.dtype], _strided(dout), address(dlse), *tensors, address(dsinks), shape, threads()
    )
    del table, wide_sinks
    return dout.new_empty((0,)) if sinks is None or dsinks is None else dsinks.sum(0).to(sinks.dtype)


def _empty_lse(q: Tensor) -> Tensor:
    shape = (q.shape[0], q.shape[2], q.shape[1]) if q.dim() == 4 else (q.shape[1], q.shape[0])
    return q.new_empty(shape, dtype=torch.float32)


Place = tuple[int, int, int]
"""`Strided` of csrc/api.h."""


def _strided(x: Tensor) -> Place:
    return address(x), x.stride(-3), x.stride(-2)


class _Layout(NamedTuple):
    """Tokens [B, S] or, packed, [T] of queries and keys, and their heads."""

    tokens: tuple[int, ...]
    key_tokens: tuple[int, ...]
    heads: int
    kv_heads: int
    dim: int

    @classmethod
    def separate(cls, q: Tensor, k: Tensor) -> _Layout:
        return cls(q.shape[:-2], k.shape[:-2], q.shape[-2], k.shape[-2], q.shape[-1])

    @classmethod
    def packed(cls, qkv: Tensor, heads: int, kv_heads: int) -> _Layout:
        tokens = qkv.shape[:-1]
        return cls(tokens, tokens, heads, kv_heads, qkv.shape[-1] // (heads + 2 * kv_heads))


def _packed(qkv: Tensor, layout: _Layout) -> tuple[Place, ...]:
    """q, k and v in contiguous qkv [.., (N + 2K) D]: no views of it, 20 to 30 us each after another kernel."""
    head = layout.dim * qkv.element_size()
    start, token = address(qkv), qkv.shape[-1]
    return tuple(
        (start + first * head, token, layout.dim)
        for first in (0, layout.heads, layout.heads + layout.kv_heads)
    )


_SEGMENT = 5
"""Numbers in a `Segment` of csrc/api.h."""


def _shape(
    layout: _Layout,
    bounds: Bounds,
    options: tuple[Any, ...],
    sinks: Tensor | None,
    rotation: tuple[int, int, int, int],
) -> tuple[array[int], tuple[Any, ...]]:
    """The table of documents (`Segment` of csrc/api.h) and the `AttentionShape` that points to it.

    options are causal, window, offset, max_seqlen (of no use here), softcap and scale.
    """
    (first, *_), heads = layout.tokens, layout.heads
    table = array("q")
    if bounds.queries is None:
        rows, columns = layout.tokens[1], layout.key_tokens[1]
        for b in range(first):
            table.extend((b * rows, rows, b * columns, columns, b * heads * rows))
        stride = rows
    else:
        for part, other in documents(bounds, first, layout.key_tokens[0]):
            start, length = part.start, part.stop - part.start
            table.extend((start, length, other.start, other.stop - other.start, start))
        stride = first
    *masks, _, softcap, scale = options
    start, lines = table.buffer_info()[0], len(table) // _SEGMENT
    numbers = (start, lines, heads, layout.kv_heads, layout.dim, stride, *masks, softcap, scale)
    return table, (*numbers, address(sinks), rotation)
