"""Forward of RMSNorm and LayerNorm, which is RMSNorm of the centred row: kernels, sizes, launcher."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megalite_kernels.triton.fp8_scale import E4M3_EXPONENT, magnitude_bits, power_of_two
from megalite_kernels.triton.launch import Launch, Table, launch

_NVIDIA = {"TILE": 4096, "WARP": 512, "LIMIT": 65536, "CHUNK": 8192}
FORWARD = Table(
    "norm_forward",
    {
        # 16 elements a thread (WARP 512), two 16-byte loads of bf16; rows up to 4,096 columns take 8 warps of 40
        # registers, so 6 programs share a multiprocessor and one's loads cover another's reduction. 32 warps have 64
        # registers each: enough for 32,768 columns of bf16, not of fp32 (LIMIT is in bytes). Beyond, 32 warps read
        # 8,192 columns per turn, 16 bytes a thread: one or two programs a multiprocessor, whose rows of 65,536 bf16
        # (17 MB for one on each of 132) are in the second-level cache for their second read.
        "default": Launch(_NVIDIA, num_warps=32),
        "sm_80": Launch(_NVIDIA, num_warps=32),  # 108 multiprocessors and 40 MB: the same
        "sm_90": Launch(_NVIDIA, num_warps=32),  # 132 and 50 MB
        "sm_100": Launch(
            _NVIDIA, num_warps=32
        ),  # 148 and 126 MB; the 6 programs' 48 KB in flight cover 8 TB/s
        # a wave has 64 lanes and a program at most 16 of them: the same elements a lane
        "gfx942": Launch(_NVIDIA | {"WARP": 1024}, num_warps=16),
    },
)
"""TILE: elements of a program of several short rows; WARP: elements of a warp; LIMIT: bytes of the longest row, rounded
up to a power of two, that stays in registers; CHUNK: columns per turn beyond; num_warps: at most."""


def forward_sizes(hidden: int, itemsize: int, table: Launch) -> Launch:
    """Rows and columns of a program (BLOCK_T, BLOCK_H) and its warps.

    They do not depend on the number of rows, so a row has the same bits in every batch.

    Args:
        hidden: columns.
        itemsize: bytes of an element.
        table: of this architecture.
    """
    blocks, padded = table.blocks, triton.next_power_of_2(hidden)
    if padded * itemsize > blocks["LIMIT"]:
        return Launch({"BLOCK_T": 1, "BLOCK_H": blocks["CHUNK"]}, table.num_warps, table.num_stages)
    block_t = max(1, blocks["TILE"] // padded)
    warps = max(1, min(table.num_warps, block_t * padded // blocks["WARP"]))
    return Launch({"BLOCK_T": block_t, "BLOCK_H": padded}, warps, table.num_stages)


@triton.jit
def row_forward_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, total_ptr, mean_ptr,
    rstd_ptr, data_ptr, scale_ptr, rows, HIDDEN: tl.constexpr, EPS: tl.constexpr, ZERO_CENTERED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Norm of rows that fit in registers (HIDDEN <= BLOCK_H).

    Grid [cdiv(rows, BLOCK_T)]; a program owns BLOCK_T whole rows. Bytes per element, e being its size: x read,
    y written, 2e; with a residual it is read and the sum written, 4e; and 4 (LayerNorm 8) per row. With `data_ptr` y
    is also written in FP8, 1, and 4 a row for its scale. The weight comes from the second-level cache. The variance is
    taken around the mean, in registers, so a large mean costs no digits. fp32 throughout.
    """
    first = tl.program_id(0).to(tl.int64) * BLOCK_T
    local_row = tl.arange(0, BLOCK_T)
    cols = tl.arange(0, BLOCK_H)
    in_row = cols < HIDDEN
    row_mask = local_row < rows - first
    offsets = local_row[:, None] * HIDDEN + cols[None, :]
    mask = row_mask[:, None] & in_row[None, :]
    base = first * HIDDEN
    x = tl.load(x_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
    gain = tl.load(weight_ptr + cols[None, :], mask=in_row[None, :], other=0.0).to(tl.float32)
    if ZERO_CENTERED:
        gain += 1.0
    if residual_ptr is not None:
        x += tl.load(residual_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
        total = x.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + base + offsets, total, mask=mask)
        x = total.to(tl.float32)
    if mean_ptr is not None:
        mean = tl.sum(x, 1) / HIDDEN
        tl.store(mean_ptr + first + local_row, mean, mask=row_mask)
        x -= mean[:, None]
        x = tl.where(in_row[None, :], x, 0.0)
    rstd = tl.rsqrt(tl.sum(x * x, 1) / HIDDEN + EPS)
    tl.store(rstd_ptr + first + local_row, rstd, mask=row_mask)
    y = x * rstd[:, None] * gain
    if bias_ptr is not None:
        y += tl.load(bias_ptr + cols[None, :], mask=in_row[None, :], other=0.0).to(tl.float32)
    if data_ptr is not None:
        y = y.to(y_ptr.dtype.element_ty).to(tl.float32)  # what is quantised is what is written
        scale, inverse = power_of_two(tl.max(magnitude_bits(tl.where(mask, y, 0.0)), 1), E4M3_EXPONENT)
        tl.store(scale_ptr + first + local_row, scale, mask=row_mask)
        data = (y * inverse[:, None]).to(data_ptr.dtype.element_ty)
        tl.store(data_ptr + base + offsets, data, mask=mask)
    tl.store(y_ptr + base + offsets, y, mask=mask)


@triton.jit
def loop_forward_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, total_ptr, mean_ptr,
    rstd_ptr, data_ptr, scale_ptr, rows, HIDDEN: tl.constexpr, EPS: tl.constexpr, ZERO_CENTERED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Norm of rows longer than registers hold, BLOCK_H columns per turn.

    Grid [rows] (BLOCK_T is 1); a program owns a row. From memory the same bytes as `row_forward_kernel`: the second
    read, for y, and that of y, for FP8, come from the second-level cache. Every lane keeps Welford's running mean and
    sum of squares of its own columns, merged at the end: one turn, no reduction inside, and no cancellation with a
    large mean. fp32.
    """
    tl.static_assert(BLOCK_T == 1)
    row = tl.program_id(0).to(tl.int64)
    base = row * HIDDEN
    lane = tl.arange(0, BLOCK_H)
    lane_mean = tl.zeros((BLOCK_H,), tl.float32)
    lane_square = tl.zeros((BLOCK_H,), tl.float32)
    turns = 0.0
    for start in tl.range(0, HIDDEN, BLOCK_H):
        cols = start + lane
        mask = cols < HIDDEN
        x = tl.load(x_ptr + base + cols, mask=mask, other=0.0).to(tl.float32)
        if residual_ptr is not None:
            x += tl.load(residual_ptr + base + cols, mask=mask, other=0.0).to(tl.float32)
            total = x.to(total_ptr.dtype.element_ty)
            tl.store(total_ptr + base + cols, total, mask=mask)
            x = total.to(tl.float32)
        if mean_ptr is not None:
            turns += 1.0
            delta = tl.where(mask, x - lane_mean, 0.0)
            lane_mean += delta / turns
            lane_square += delta * (x - lane_mean)
        else:
            lane_square += x * x
    if mean_ptr is not None:
        count = ((HIDDEN - lane + BLOCK_H - 1) // BLOCK_H).to(tl.float32)
        mean = tl.sum(lane_mean * count, 0) / HIDDEN
        tl.store(mean_ptr + row, mean)
        lane_square += count * (lane_mean - mean) * (lane_mean - mean)
    rstd = tl.rsqrt(tl.sum(lane_square, 0) / HIDDEN + EPS)
    tl.store(rstd_ptr + row, rstd)
    source_ptr = x_ptr if residual_ptr is None else total_ptr
    bits = tl.zeros((BLOCK_H,), tl.int32)
    for start in tl.range(0, HIDDEN, BLOCK_H):
        cols = start + lane
        mask = cols < HIDDEN
        x = tl.load(source_ptr + base + cols, mask=mask, other=0.0, eviction_policy="evict_first")
        gain = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        if ZERO_CENTERED:
            gain += 1.0
        x = x.to(tl.float32)
        if mean_ptr is not None:
            x -= mean
        y = x * rstd * gain
        if bias_ptr is not None:
            y += tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        if data_ptr is not None:
            y = y.to(y_ptr.dtype.element_ty).to(tl.float32)
            bits = tl.maximum(bits, magnitude_bits(tl.where(mask, y, 0.0)))
        tl.store(y_ptr + base + cols, y, mask=mask)
    if data_ptr is not None:
        tl.debug_barrier()  # y is read back
        scale, inverse = power_of_two(tl.max(bits, 0), E4M3_EXPONENT)
        tl.store(scale_ptr + row, scale)
        for start in tl.range(0, HIDDEN, BLOCK_H):
            cols = start + lane
            y = tl.load(y_ptr + base + cols, mask=cols < HIDDEN, other=0.0).to(tl.float32)
            tl.store(data_ptr + base + cols, (y * inverse).to(data_ptr.dtype.element_ty), mask=cols < HIDDEN)


def norm_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    zero_centered: bool,
    centered: bool,
    quantized: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """Both norms, with and without the residual addition.

    Args:
        x: [..., H].
        residual: like x, or None.
        weight: [H].
        bias: [H], or None.
        eps: added to the mean square.
        zero_centered: the gain is `1 + weight`.
        centered: subtract the mean (LayerNorm).
        quantized: e4m3 [rows, H] and scale [rows], which take y rounded to FP8; or None.

    Returns:
        y like x; x + residual or None; mean [rows] fp32, None unless centered; rstd [rows] fp32.
    """
    x, residual = x.contiguous(), None if residual is None else residual.contiguous()
    rows, hidden = x.shape[:-1].numel(), x.shape[-1]
    y, total = torch.empty_like(x), None if residual is None else torch.empty_like(x)
    rstd = x.new_empty(rows, dtype=torch.float32)
    mean = torch.empty_like(rstd) if centered else None
    if hidden == 0:  # the mean of no numbers
        if quantized is not None:
            quantized[1].fill_(1.0)
        return y, total, None if mean is None else mean.fill_(torch.nan), rstd.fill_(torch.nan)
    data, scale = quantized or (None, None)
    config = forward_sizes(hidden, x.element_size(), FORWARD.pick())
    in_registers = config.blocks["BLOCK_H"] >= hidden
    launch(
        row_forward_kernel if in_registers else loop_forward_kernel,
        (triton.cdiv(rows, config.blocks["BLOCK_T"]),),
        config,
        x, residual, weight.contiguous(), None if bias is None else bias.contiguous(), y, total, mean, rstd,
        data, scale, rows,
        HIDDEN=hidden,
        EPS=eps,
        ZERO_CENTERED=zero_centered,
    )  # fmt: skip
    return y, total, mean, rstd
