"""Launchers of the attention kernels: which kernel, which blocks, which grid."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from megalite_kernels.triton.attention_backward import (
    attention_delta_kernel,
    attention_dk_dv_kernel,
    attention_dq_kernel,
)
from megalite_kernels.triton.attention_forward import attention_forward_kernel
from megalite_kernels.triton.attention_tma import attention_forward_tma_kernel
from megalite_kernels.triton.launch import Launch, Table, architecture, launch

SECTION_BYTES = 16 << 20
"""Of keys and values (queries and gradients) that programs running at one time may reread: a share of the L2 cache,
which holds 40 MB on an A100, 50 MB on an H100 and 126 MB on a B200."""


def _tables(kernel: str, by_size: Mapping[str, Mapping[str, tuple[int, int, int, int]]]) -> dict[str, Table]:
    """Tables by size class from (BLOCK_M, BLOCK_N, warps, stages); in the interpreter blocks are small."""
    small = Launch({"BLOCK_M": 16, "BLOCK_N": 16})
    return {
        size: Table(
            f"{kernel}_{size}",
            {name: Launch({"BLOCK_M": m, "BLOCK_N": n}, w, s) for name, (m, n, w, s) in entries.items()}
            | {"interpreter": small},
        )
        for size, entries in by_size.items()
    }


# A100 has 163 kB of shared memory for a block, consumer GPUs (sm_86, sm_89, sm_120) 99, MI300 64. Compiled ahead of
# time (tests/triton_gate), 8 warps keep 128 rows of 128 features in registers where 4 spill; a backward with twice
# the accumulators has half the rows left.
FORWARD = _tables(
    "attention_fwd",
    {
        "64": {"default": (128, 64, 4, 3), "sm_90": (128, 64, 8, 3), "gfx942": (128, 64, 4, 3)},
        "128": {"default": (128, 64, 8, 3), "gfx942": (128, 64, 4, 2)},
        "256": {
            "default": (64, 32, 8, 2),
            "sm_80": (64, 64, 8, 2),
            "sm_86": (64, 32, 8, 2),
            "sm_90": (128, 64, 8, 2),
            "sm_120": (64, 32, 8, 2),
            "gfx942": (64, 32, 4, 2),
        },
        "fp32": {"default": (32, 32, 4, 1)},
    },
)
SPECIALIZE_FROM = (3, 9)
"""First Triton version whose compiler takes `warp_specialize` on this loop (3.6 fails in it); Blackwell only."""
_POINTERS, _TILES_90 = Launch(), {"BLOCK_M": 128, "BLOCK_N": 128, "SPECIALIZED": 0}
_SPECIALIZED = int(tuple(int(part) for part in triton.__version__.split(".")[:2]) >= SPECIALIZE_FROM)
_TILES_100 = {"BLOCK_M": 128, "BLOCK_N": 128, "SPECIALIZED": _SPECIALIZED}
_NO_TMA = {"default": _POINTERS, "sm_120": _POINTERS, "interpreter": _POINTERS}
FORWARD_TMA = {
    size: Table(f"attention_fwd_tma_{size}", _NO_TMA | entries)
    for size, entries in {
        "64": {"sm_90": Launch(_TILES_90, 8, 2), "sm_100": Launch(_TILES_100, 4 if _SPECIALIZED else 8, 2)},
        "128": {"sm_90": Launch(_TILES_90, 8, 2), "sm_100": Launch(_TILES_100, 4 if _SPECIALIZED else 8, 2)},
        "256": {
            "sm_90": Launch(_TILES_90 | {"BLOCK_N": 64}, 8, 2),
            "sm_100": Launch(_TILES_100 | {"BLOCK_N": 64, "SPECIALIZED": 0}, 8, 2),
        },
    }.items()
}
"""Where the tiles come by TMA; an entry without blocks means the pointers of `FORWARD`."""
DK_DV = _tables(
    "attention_dk_dv",
    {
        "64": {"default": (64, 64, 8, 2), "sm_90": (64, 128, 8, 2), "gfx942": (64, 64, 4, 1)},
        "128": {
            "default": (64, 64, 8, 2),
            "sm_90": (32, 128, 8, 2),
            "sm_100": (64, 128, 8, 2),
            "sm_120": (64, 64, 8, 2),
            "gfx942": (32, 64, 4, 1),
        },
        "256": {
            "default": (32, 32, 8, 1),
            "sm_80": (32, 64, 8, 1),
            "sm_86": (32, 32, 8, 1),
            "sm_90": (32, 32, 8, 1),  # 64 keys spill, 32 are too few for a warpgroup's instruction
            "sm_100": (32, 64, 8, 2),
            "sm_120": (32, 32, 8, 1),
            "gfx942": (32, 32, 4, 1),
        },
        "fp32": {"default": (32, 16, 4, 1)},
    },
)
DQ = _tables(
    "attention_dq",
    {
        "64": {"default": (128, 64, 8, 2), "gfx942": (64, 64, 4, 1)},
        "128": {
            "default": (64, 64, 4, 2),
            "sm_90": (128, 64, 8, 2),
            "sm_120": (64, 64, 4, 2),
            "gfx942": (64, 64, 4, 1),
        },
        "256": {
            "default": (32, 32, 8, 1),
            "sm_80": (64, 64, 8, 1),
            "sm_86": (32, 32, 8, 1),
            "sm_90": (128, 32, 8, 2),
            "sm_100": (64, 64, 8, 1),
            "sm_120": (32, 32, 8, 1),
            "gfx942": (32, 32, 4, 1),
        },
        "fp32": {"default": (32, 16, 4, 1)},
    },
)
DELTA = Table(
    "attention_delta",
    {"default": Launch({"BLOCK_T": 32}, num_warps=4), "interpreter": Launch({"BLOCK_T": 16})},
)


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of one call; a dense batch entry and a packed document are both a sequence."""

    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    dim: int
    sequences: int
    longest_query: int
    longest_key: int

    @property
    def size(self) -> str:
        """Class of head dims that share a table."""
        return "64" if self.dim <= 64 else "128" if self.dim <= 128 else "256"

    def section(self, rows: int, row_bytes: int) -> int:
        """Pairs of key head and sequence whose `rows` of `row_bytes` fit the L2 cache together."""
        return max(1, SECTION_BYTES // max(1, rows * row_bytes))


def shape_of(q: Tensor, k: Tensor, cu_seqlens: Tensor | None, max_seqlen: int) -> Shape:
    """The sizes, without a look at the contents of cu_seqlens."""
    queries, heads, dim = q.shape[-3:]
    keys, kv_heads = k.shape[-3:-1]
    batch = q.shape[0] if q.dim() == 4 else 1
    sequences = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    bound = max_seqlen if cu_seqlens is not None and max_seqlen > 0 else max(queries, keys)
    longest = (min(queries, bound), min(keys, bound))
    return Shape(batch, queries, keys, heads, kv_heads, dim, sequences, *longest)


def _rows(x: Tensor) -> Tensor:
    """x, with features next to one another in memory."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _strides(x: Tensor) -> tuple[int, int, int]:
    """In elements, of batch entry, token and head."""
    return (x.stride(0) if x.dim() == 4 else 0, x.stride(-3), x.stride(-2))


def head_tiles(dim: int) -> tuple[int, int]:
    """Columns of the two tiles that hold a head: (64, 32) for 96; the second is 0 where the first holds it all."""
    first = max(16, 1 << (dim.bit_length() - 1))
    return first, 0 if dim <= first else max(16, 1 << (dim - first - 1).bit_length())


def _windowed(shape: Shape, causal: bool, window: int, offset: int) -> bool:
    """Whether a window hides anything: positions go from keys - queries + offset to keys - 1 + offset."""
    behind = window < shape.longest_key + offset
    ahead = not causal and window < shape.longest_query - offset
    return window > 0 and (behind or ahead)


def _constants(
    shape: Shape, causal: bool, window: int, offset: int, softcap: float, scale: float
) -> dict[str, Any]:
    """Base-2 logits are `FACTOR * capped(scores)`; a positive scale without cap is folded into FACTOR, and so into
    the multiply-add that subtracts the maximum (max(s) * f = max(s * f) holds for f > 0 only)."""
    before, cap, factor = scale * math.log2(math.e), 0.0, 1.0
    if softcap > 0:
        before, cap = scale / softcap, softcap * math.log2(math.e)
    elif scale > 0:
        before, factor = 1.0, before
    d1, d2 = head_tiles(shape.dim)
    return {
        "CAUSAL": causal,
        "WINDOWED": _windowed(shape, causal, window, offset),
        "BEFORE": before,
        "CAP": cap,
        "FACTOR": factor,
        "D": shape.dim,
        "D1": d1,
        "D2": d2,
    }


def _precision() -> str:
    """Of products of fp32: three tf32 products (errors of 2^-22 a term, on tensor cores) where there is no fp32 one."""
    return "ieee" if architecture().startswith("gfx") else "tf32x3"


def _pick(tables: Mapping[str, Table], shape: Shape, dtype: torch.dtype) -> Launch:
    return tables["fp32" if dtype == torch.float32 else shape.size].pick()


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
    """Backend "triton" of `attention_fwd`."""
    shape = shape_of(q, k, cu_seqlens, max_seqlen)
    q, k, v = _rows(q), _rows(k), _rows(v)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse_shape = (shape.batch, shape.heads, shape.queries)
    lse = torch.empty(lse_shape if q.dim() == 4 else lse_shape[1:], dtype=torch.float32, device=q.device)
    constants = _constants(shape, causal, window, offset, softcap, scale) | {"PACKED": cu_seqlens is not None}
    tma = None if q.dtype == torch.float32 else FORWARD_TMA[shape.size].pick()
    if tma is not None and tma.blocks and all(_describable(x) for x in (q, k, v)):
        config, kernel = tma, attention_forward_tma_kernel
        constants |= _tma_constants(shape, config, constants)
        tiles = (constants["D1"], constants["D2"])
        m, n = config.blocks["BLOCK_M"], config.blocks["BLOCK_N"]
        inputs = (*_descriptors(q, m, tiles), *_descriptors(k, n, tiles), *_descriptors(v, n, tiles))
        strides: tuple[int, ...] = ()
    else:
        config, kernel, inputs = _pick(FORWARD, shape, q.dtype), attention_forward_kernel, (q, k, v)
        strides = (*_strides(q), *_strides(k), *_strides(v))
        constants["PRECISION"] = _precision()
    blocks = triton.cdiv(shape.longest_query, config.blocks["BLOCK_M"])
    groups = shape.heads // shape.kv_heads
    launch(
        kernel,
        (blocks * shape.heads * shape.sequences,),
        config,
        *(*inputs, out, lse, sinks),
        *(cu_seqlens, cu_seqlens if cu_seqlens_k is None else cu_seqlens_k, *strides),
        *(shape.queries, shape.keys, window, offset, shape.heads, groups, blocks, shape.sequences),
        groups * shape.section(shape.longest_key, 2 * shape.dim * q.element_size()),
        **constants,
    )
    return out, lse


def _describable(x: Tensor) -> bool:
    """Whether x is one array [tokens, heads, features] that TMA can read: 16-byte strides, evenly spaced batch."""
    strides, size = x.stride(), x.element_size()
    even = x.dim() == 3 or x.shape[0] == 1 or strides[0] == x.shape[1] * strides[1]
    aligned = all(stride > 0 and stride * size % 16 == 0 for stride in strides[-3:-1])
    return even and aligned and x.numel() > 0 and x.data_ptr() % 16 == 0


def _descriptors(x: Tensor, rows: int, tiles: tuple[int, int]) -> list[TensorDescriptor | None]:
    """Of the two tiles of a head, [rows, 1, columns] of [tokens, heads, features]; zeros come from past the end."""
    shape = [x.shape[:-2].numel(), *x.shape[-2:]]
    strides = [x.stride(-3), x.stride(-2), 1]
    return [TensorDescriptor(x, shape, strides, [rows, 1, columns]) if columns else None for columns in tiles]


def _tma_constants(shape: Shape, config: Launch, constants: dict[str, Any]) -> dict[str, Any]:
    """Where one warpgroup rescales the output (specialised warps), it has registers for 64 columns at a time, and else
    two have for 128: a wider head is held as two halves. Rows past the keys are cleared where a sequence follows."""
    d1, d2 = constants["D1"], constants["D2"]
    if d2 == 0 and d1 > (64 if config.blocks["SPECIALIZED"] else 128):
        d1 = d2 = d1 // 2
    uneven = shape.batch > 1 and shape.keys % config.blocks["BLOCK_N"] != 0
    return {"D1": d1, "D2": d2, "CLEAR": constants["PACKED"] or uneven}


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
    """Backend "triton" of `attention_bwd`."""
    shape = shape_of(q, k, cu_seqlens, max_seqlen)
    q, k, v, dout, out = (_rows(x) for x in (q, k, v, dout, out))
    lse = lse.contiguous()
    delta, dsinks = _delta(dout, out, lse, None if dlse is None else dlse.contiguous(), sinks, shape)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    constants = _constants(shape, causal, window, offset, softcap, scale)
    constants |= {"PACKED": cu_seqlens is not None, "SCALE": scale, "PRECISION": _precision()}
    bounds = (cu_seqlens, cu_seqlens if cu_seqlens_k is None else cu_seqlens_k)
    strides = (*_strides(q), *_strides(k), *_strides(v), *_strides(dout))
    sizes = (shape.queries, shape.keys, window, offset)
    groups, row_bytes = shape.heads // shape.kv_heads, 2 * shape.dim * q.element_size()
    config = _pick(DK_DV, shape, q.dtype)
    blocks = triton.cdiv(shape.longest_key, config.blocks["BLOCK_N"])
    launch(
        attention_dk_dv_kernel,
        (blocks * shape.kv_heads * shape.sequences,),
        config,
        *(q, k, v, dout, lse, delta, dk, dv, *bounds, *strides, *sizes),
        *(shape.kv_heads, groups, blocks, shape.sequences),
        shape.section(shape.longest_query, groups * row_bytes),
        **constants,
    )
    config = _pick(DQ, shape, q.dtype)
    blocks = triton.cdiv(shape.longest_query, config.blocks["BLOCK_M"])
    launch(
        attention_dq_kernel,
        (blocks * shape.heads * shape.sequences,),
        config,
        *(q, k, v, dout, lse, delta, dq, *bounds, *strides, *sizes),
        *(shape.heads, groups, blocks, shape.sequences),
        groups * shape.section(shape.longest_key, row_bytes),
        **constants,
    )
    return dq, dk, dv, dsinks


def _delta(
    dout: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None, sinks: Tensor | None, shape: Shape
) -> tuple[Tensor, Tensor]:
    """(rowsum(dout * out) - dlse like lse, gradient of the sinks or an empty tensor)."""
    config = DELTA.pick()
    blocks = triton.cdiv(shape.queries, config.blocks["BLOCK_T"])
    delta = torch.empty_like(lse)
    partial = None if sinks is None else lse.new_empty(shape.batch, blocks, shape.heads)
    launch(
        attention_delta_kernel,
        (shape.batch * blocks * shape.heads,),
        config,
        *(dout, out, lse, dlse, sinks, delta, partial, *_strides(dout), *_strides(out)),
        *(shape.queries, shape.heads, blocks),
        D=shape.dim,
        BLOCK_D=triton.next_power_of_2(shape.dim),
    )
    if sinks is None or partial is None:
        return delta, dout.new_empty(0)
    return delta, partial.sum((0, 1)).to(sinks.dtype)
