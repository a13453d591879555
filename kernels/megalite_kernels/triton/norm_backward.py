"""Backward of RMSNorm and LayerNorm: the launcher, and the sizes it launches with."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from megalite_kernels.triton.launch import Launch, Table, launch, num_processors
from megalite_kernels.triton.norm_backward_kernels import (
    loop_backward_kernel,
    row_backward_kernel,
    sum_partials_kernel,
)

_NVIDIA = {"TILE": 4096, "WARP": 512, "LIMIT": 8192, "CHUNK": 4096, "GROUP": 32768}
BACKWARD = Table(
    "norm_backward",
    {
        # 16 elements a thread (WARP 512): the gradient's sums, the row and dy in fp32 take 5 x 16 registers, and
        # 16 warps have 128 each, so 8,192 columns are the longest row (LIMIT). num_warps 16 fill a multiprocessor:
        # rows up to 4,096 columns have two programs there. A turn's copy is issued when the last but one ends, so 3
        # stages keep one turn in flight, 32 KB a multiprocessor; 25 bytes/ns x 0.8 us of an H100 need 20.
        "default": Launch(_NVIDIA | {"SHARED": 96 << 10}, 16, 3),
        "sm_80": Launch(
            _NVIDIA | {"SHARED": 160 << 10}, 16, 3
        ),  # 163 KB are all there is, less the reductions'
        "sm_90": Launch(_NVIDIA | {"SHARED": 224 << 10}, 16, 3),  # 227 KB
        # two turns in flight: 54 bytes/ns x 0.8 us need 43 KB
        "sm_100": Launch(_NVIDIA | {"SHARED": 224 << 10}, 16, 4),
        # 64 lanes a wave, so half the waves for the same elements a lane; the next turn waits in registers
        "gfx942": Launch(_NVIDIA | {"WARP": 1024, "SHARED": 32 << 10}, 8, 2),
    },
)
"""TILE: elements of a turn of several short rows; WARP: elements of a warp; LIMIT: the longest row, rounded up to a
power of two, whose sums stay in registers; CHUNK: elements of a turn beyond; GROUP: elements of the rows whose second
read is to come from the cache; SHARED: bytes of shared memory for the turns ahead, by the programs of a multiprocessor
together; num_warps: what they have together."""

SUM = Table(
    "norm_backward_sum",
    # 32 columns are 128 bytes, the least a memory access moves; 128 partial rows take two or three turns
    {"default": Launch({"BLOCK_P": 128, "BLOCK_H": 32}, num_warps=8)},
)


def backward_sizes(hidden: int, tensors: int, itemsize: int, table: Launch) -> Launch:
    """Rows and columns of a turn (BLOCK_T, BLOCK_H), its warps, and the STAGES that turns are loaded in.

    Args:
        hidden: columns.
        tensors: of `itemsize` that are read: dy, x and perhaps the gradient of the residual.
        itemsize: bytes of an element.
        table: of this architecture.
    """
    blocks, padded, warps = table.blocks, triton.next_power_of_2(hidden), table.num_warps
    if padded <= blocks["LIMIT"]:
        block_t, block_h = max(1, blocks["TILE"] // padded), padded
        bytes_per_column = tensors * itemsize * block_t
        warps = max(1, min(warps, block_t * block_h // blocks["WARP"]))
    else:
        block_t = max(1, blocks["GROUP"] // padded)
        block_h = blocks["CHUNK"] // block_t
        bytes_per_column = (
            tensors * itemsize * block_t + 12
        )  # the weight and both sums are loaded ahead as well
    share = blocks["SHARED"] * warps // table.num_warps
    ahead = min(table.num_stages - 1, share // (bytes_per_column * block_h))
    return Launch({"BLOCK_T": block_t, "BLOCK_H": block_h, "STAGES": 1 + ahead}, warps, table.num_stages)


def norm_backward(
    dy: Tensor,
    dresidual: Tensor | None,
    x: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    *,
    zero_centered: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Both norms, with and without the residual addition.

    Args:
        dy: like x.
        dresidual: like x, the gradient that bypasses the norm and is added into dx; or None.
        x: [..., H], what was normalised.
        weight: [H].
        mean: [rows] fp32 for LayerNorm, None for RMSNorm.
        rstd: [rows] fp32.
        zero_centered: the gain was `1 + weight`.

    Returns:
        dx like x; dweight like weight; dbias like weight, None for RMSNorm.
    """
    dy, x = dy.contiguous(), x.contiguous()
    dresidual = None if dresidual is None else dresidual.contiguous()
    rows, hidden = rstd.numel(), x.shape[-1]
    dx, dweight = torch.empty_like(x), weight.new_empty(hidden)
    dbias = None if mean is None else weight.new_empty(hidden)
    if x.numel() == 0:
        return dx, dweight.zero_(), None if dbias is None else dbias.zero_()
    table = BACKWARD.pick()
    tensors = 2 if dresidual is None else 3
    config = backward_sizes(hidden, tensors, x.element_size(), table)
    in_registers = config.blocks["BLOCK_H"] >= hidden
    turns = triton.cdiv(rows, config.blocks["BLOCK_T"])
    programs = min(turns, table.num_warps // config.num_warps * num_processors(x))
    partial = rstd.new_empty((1 if mean is None else 2, programs, hidden))
    launch(
        row_backward_kernel if in_registers else loop_backward_kernel,
        (programs,),
        config,
        dy, dresidual, x, weight.contiguous(), mean, rstd, dx, partial, rows,
        HIDDEN=hidden,
        ZERO_CENTERED=zero_centered,
    )  # fmt: skip
    config = SUM.pick()
    grid = (triton.cdiv(hidden, config.blocks["BLOCK_H"]), partial.shape[0])
    launch(sum_partials_kernel, grid, config, partial, dweight, dbias, programs, HIDDEN=hidden)
    return dx, dweight, dbias
