"""Attention on Hopper's wgmma and TMA: what it takes, tensor maps, grids.

`attention.py` gives these functions the calls on an sm_90 for which `forward_supports` and `backward_supports` have
no reason against it; the kernels for mma.sync take the others.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from megalite_kernels.native.cuda.attention import statistics_of
from megalite_kernels.native.cuda.attention_shape import (
    ELEMENTS,
    FAR,
    Shape,
    bounds_of,
    logits_of,
    mask_of,
    rows_of,
    shape_of,
)
from megalite_kernels.native.cuda.kernel import Kernel, TensorMap
from megalite_kernels.native.cuda.kernels import attention_hopper as kernels
from megalite_kernels.native.cuda.runtime import launch


def forward_supports(
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
) -> str | None:
    """Why these kernels don't take a call, or None. Strides are no reason: what TMA can't read is copied."""
    if q.dtype not in ELEMENTS:
        return f"takes bfloat16 and float16, not {q.dtype}"
    if q.shape[-1] not in kernels.DIMS:
        return f"takes head dims {' and '.join(map(str, kernels.DIMS))}, not {q.shape[-1]}"
    if q.numel() == 0 or k.numel() == 0:
        return "takes no empty tensors: there is no tensor map of them"
    if softcap > 0:
        return f"takes no soft-cap, not {softcap}"
    if sinks is not None:
        return "takes no sinks"
    if not scale > 0:
        return f"takes a positive scale, not {scale}"
    if max(q.shape[-3], k.shape[-3], abs(offset)) >= FAR:
        return f"takes fewer tokens and a smaller offset than {FAR}, not {q.shape[-3]}, {k.shape[-3]} and {offset}"
    return None


def backward_supports(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any
) -> str | None:
    """As `forward_supports`, for the arguments of `backward`."""
    return forward_supports(q, k, v, *rest)


class _Options(NamedTuple):
    """What all three kernels take beside tensors."""

    shape: Shape
    bounds: tuple[Tensor | None, Tensor | None]
    behind: int
    ahead: int
    offset: int
    factor: float

    def grid(self, longest: int, kernel: Kernel, heads: int) -> tuple[int, int, int]:
        """A block for each tile of owned rows of every head and sequence."""
        return (_blocks(longest, kernel) * heads * self.shape.sequences, 1, 1)

    def arguments(
        self, longest: int, kernel: Kernel, heads: int, section: int
    ) -> tuple[Tensor | int | None, ...]:
        """From the documents' bounds to the section."""
        shape, blocks = self.shape, _blocks(longest, kernel)
        lengths = (shape.queries, shape.keys, self.behind, self.ahead, self.offset)
        pairs = min(section, heads * shape.sequences)
        return (*self.bounds, *lengths, heads, shape.groups, blocks, shape.sequences, pairs)


def _options(
    q: Tensor,
    k: Tensor,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    causal: bool,
    window: int,
    offset: int,
    max_seqlen: int,
    scale: float,
) -> _Options:
    bounds, mask = bounds_of(cu_seqlens, cu_seqlens_k), mask_of(causal, window, offset)
    return _Options(shape_of(q, k, cu_seqlens, max_seqlen), bounds, *mask, logits_of(0.0, scale).factor)


def _blocks(longest: int, kernel: Kernel) -> int:
    return -(-longest // kernels.owned_rows(kernel))


def _readable(x: Tensor) -> Tensor:
    """x, or a contiguous copy where TMA can't read it: strides and address are multiples of 16 bytes."""
    expanded = any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape, strict=True))
    return x.contiguous() if expanded else rows_of(x)


def _map(x: Tensor, rows: int) -> TensorMap:
    """Tiles [rows, 64] of one head of [batch, tokens, heads, dim] (packed: [tokens, heads, dim])."""
    x = x if x.dim() == 4 else x.unsqueeze(0)
    shape = tuple(reversed(x.shape))
    # A dim of one element is never stepped over, and its stride may be anything.
    steps = zip(shape[1:], reversed(x.stride()[:-1]), strict=True)
    strides = tuple((stride if size > 1 else shape[0]) * x.element_size() for size, stride in steps)
    return TensorMap(x, shape, strides, (64, 1, rows, 1), 128)


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
    """`attention_fwd`, for calls that `forward_supports` lets pass."""
    options = _options(q, k, cu_seqlens, cu_seqlens_k, causal, window, offset, max_seqlen, scale)
    shape = options.shape
    kernel = kernels.forward(ELEMENTS[q.dtype], shape.dim)
    own, ring = kernels.owned_rows(kernel), kernels.ring_rows(kernel)
    q, k, v = (_readable(x) for x in (q, k, v))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse_shape = shape.statistics if q.dim() == 4 else shape.statistics[1:]
    lse = torch.empty(lse_shape, dtype=torch.float32, device=q.device)
    section = shape.groups * shape.section(shape.longest_key, 4 * shape.dim)
    rest = options.arguments(shape.longest_query, kernel, shape.heads, section)
    launch(
        kernel,
        options.grid(shape.longest_query, kernel, shape.heads),
        (_map(q, own), _map(k, ring), _map(v, ring), out, lse, *rest, options.factor),
        q.device,
    )
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
    """`attention_bwd`, for calls that `backward_supports` lets pass."""
    options = _options(q, k, cu_seqlens, cu_seqlens_k, causal, window, offset, max_seqlen, scale)
    shape, element = options.shape, ELEMENTS[q.dtype]
    q, k, v, dout = (_readable(x) for x in (q, k, v, dout))
    statistics, dsinks = statistics_of(dout, rows_of(out), lse, dlse, None, shape)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))

    kernel = kernels.dk_dv(element, shape.dim)
    own, ring = kernels.owned_rows(kernel), kernels.ring_rows(kernel)
    section = shape.section(shape.longest_query, shape.groups * 4 * shape.dim)
    rest = options.arguments(shape.longest_key, kernel, shape.kv_heads, section)
    maps = (_map(q, ring), _map(k, own), _map(v, own), _map(dout, ring))
    grid = options.grid(shape.longest_key, kernel, shape.kv_heads)
    launch(kernel, grid, (*maps, statistics, dk, dv, *rest, options.factor, scale), q.device)

    kernel = kernels.dq(element, shape.dim)
    own, ring = kernels.owned_rows(kernel), kernels.ring_rows(kernel)
    section = shape.groups * shape.section(shape.longest_key, 4 * shape.dim)
    rest = options.arguments(shape.longest_query, kernel, shape.heads, section)
    maps = (_map(q, own), _map(k, ring), _map(v, ring), _map(dout, own))
    grid = options.grid(shape.longest_query, kernel, shape.heads)
    launch(kernel, grid, (*maps, statistics, dq, *rest, options.factor, scale), q.device)
    return dq, dk, dv, dsinks
