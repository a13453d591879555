"""Attention on the CUDA kernels: which instance, which grid, and the wgmma kernels where they take the call.

Blackwell's tensor cores have instructions of their own (tcgen05), which nothing here uses. mma.sync runs there too, but
Triton's kernels use them, and come first in `backend.PREFERENCE`.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from megalite_kernels.native.cuda.attention_shape import (
    ELEMENTS,
    Logits,
    Mask,
    Shape,
    bounds_of,
    logits_of,
    mask_of,
    rows_of,
    shape_of,
    strides_of,
)
from megalite_kernels.native.cuda.kernel import Kernel
from megalite_kernels.native.cuda.kernels import attention as kernels
from megalite_kernels.native.cuda.runtime import arch, launch

HOPPER = "megalite_kernels.native.cuda.attention_hopper"


@functools.cache
def _hopper() -> ModuleType | None:
    """The kernels for sm_90a: forward, backward, and forward_supports, backward_supports of the same arguments."""
    return importlib.import_module(HOPPER) if importlib.util.find_spec(HOPPER) is not None else None


def _by_wgmma(direction: str, device: torch.device, args: tuple[Any, ...]) -> Any:
    """The function for sm_90a if this is one and it takes the call, else None."""
    hopper = _hopper() if arch(device) == 90 else None
    if hopper is None or getattr(hopper, f"{direction}_supports")(*args) is not None:
        return None
    return getattr(hopper, direction)


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
    """Backend "cuda" of `attention_fwd`."""
    args = (q, k, v, cu_seqlens, cu_seqlens_k, sinks, causal, window, offset, max_seqlen, softcap, scale)
    wgmma = _by_wgmma("forward", q.device, args)
    result: tuple[Tensor, Tensor] = (forward_mma if wgmma is None else wgmma)(*args)
    return result


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
    """Backend "cuda" of `attention_bwd`."""
    inputs = (dout, dlse, q, k, v, out, lse, cu_seqlens, cu_seqlens_k, sinks)
    args = (*inputs, causal, window, offset, max_seqlen, softcap, scale)
    wgmma = _by_wgmma("backward", q.device, args)
    result: tuple[Tensor, Tensor, Tensor, Tensor] = (backward_mma if wgmma is None else wgmma)(*args)
    return result


def forward_mma(
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
    """`forward` on mma.sync, for any GPU from sm_80 on."""
    shape = shape_of(q, k, cu_seqlens, max_seqlen)
    q, k, v = rows_of(q), rows_of(k), rows_of(v)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse_shape = shape.statistics if q.dim() == 4 else shape.statistics[1:]
    lse = torch.empty(lse_shape, dtype=torch.float32, device=q.device)
    kernel = kernels.forward(ELEMENTS[q.dtype], kernels.width_of(shape.dim), arch(q.device))
    blocks = _blocks(shape.longest_query, _tile(kernel, "BLOCK_M"))
    section = shape.groups * shape.section(shape.longest_key, 2 * shape.dim * q.element_size())
    options = (mask_of(causal, window, offset), logits_of(softcap, scale))
    args = (
        *(q, k, v, out, lse, None if sinks is None else sinks.to(torch.float32).contiguous()),
        *bounds_of(cu_seqlens, cu_seqlens_k),
        *(*strides_of(q), *strides_of(k), *strides_of(v)),
        *_sizes(shape, shape.heads, blocks, section, options),
    )
    launch(kernel, (blocks * shape.heads * shape.sequences, 1, 1), args, q.device)
    return out, lse


def backward_mma(
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
    """`backward` on mma.sync, for any GPU from sm_80 on."""
    shape = shape_of(q, k, cu_seqlens, max_seqlen)
    q, k, v, dout = rows_of(q), rows_of(k), rows_of(v), rows_of(dout)
    statistics, dsinks = statistics_of(dout, rows_of(out), lse, dlse, sinks, shape)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    options = (mask_of(causal, window, offset), logits_of(softcap, scale))
    element, width = ELEMENTS[q.dtype], kernels.width_of(shape.dim)
    inputs, bounds = (q, k, v, dout, statistics), bounds_of(cu_seqlens, cu_seqlens_k)
    strides = (*strides_of(q), *strides_of(k), *strides_of(v), *strides_of(dout))
    row_bytes = 2 * shape.dim * q.element_size()

    kernel = kernels.dk_dv(element, width)
    blocks = _blocks(shape.longest_key, _tile(kernel, "BLOCK_N"))
    section = shape.section(shape.longest_query, shape.groups * row_bytes)
    sizes = _sizes(shape, shape.kv_heads, blocks, section, options)
    grid = (blocks * shape.kv_heads * shape.sequences, 1, 1)
    launch(kernel, grid, (*inputs, dk, dv, *bounds, *strides, *sizes, scale), q.device)

    kernel = kernels.dq(element, width)
    blocks = _blocks(shape.longest_query, _tile(kernel, "BLOCK_M"))
    section = shape.groups * shape.section(shape.longest_key, row_bytes)
    sizes = _sizes(shape, shape.heads, blocks, section, options)
    grid = (blocks * shape.heads * shape.sequences, 1, 1)
    launch(kernel, grid, (*inputs, dq, *bounds, *strides, *sizes, scale), q.device)
    return dq, dk, dv, dsinks


def statistics_of(
    dout: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None, sinks: Tensor | None, shape: Shape
) -> tuple[Tensor, Tensor]:
    """([.., 2] of base-2 lse and rowsum(dout * out) - dlse, gradient of the sinks or an empty tensor)."""
    lse = lse.contiguous()
    dlse = None if dlse is None else dlse.to(torch.float32).contiguous()
    kernel = kernels.statistics(ELEMENTS[dout.dtype])
    blocks = _blocks(shape.queries, _tile(kernel, "BLOCK_T"))
    statistics = lse.new_empty(*shape.statistics, 2)
    partial = None if sinks is None else lse.new_empty(shape.batch, blocks, shape.heads)
    wide_sinks = None if sinks is None else sinks.to(torch.float32).contiguous()
    args = (dout, out, lse, dlse, wide_sinks, statistics, partial, *strides_of(dout), *strides_of(out))
    sizes = (shape.queries, shape.heads, blocks, shape.dim)
    launch(kernel, (shape.batch * blocks * shape.heads, 1, 1), (*args, *sizes), dout.device)
    if sinks is None or partial is None:
        return statistics, dout.new_empty(0)
    return statistics, partial.sum((0, 1)).to(sinks.dtype)


def _sizes(
    shape: Shape, heads: int, blocks: int, section: int, options: tuple[Mask, Logits]
) -> tuple[int | float, ...]:
    """The scalars of the three large kernels, in the order of their parameters."""
    mask, logits = options
    grouping = (heads, shape.groups, blocks, shape.sequences, min(section, max(1, heads * shape.sequences)))
    return (shape.queries, shape.keys, *mask, *grouping, shape.dim, *logits)


def _tile(kernel: Kernel, name: str) -> int:
    return int(dict(kernel.defines)[name])


def _blocks(rows: int, tile: int) -> int:
    return -(-rows // tile)
