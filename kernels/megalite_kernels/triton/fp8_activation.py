"""Activations that also write their output in FP8, on Triton: a program owns whole rows, whose scale it then knows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megalite_kernels.triton.activation import value_and_slope
from megalite_kernels.triton.fp8_scale import E4M3_EXPONENT, magnitude_bits, power_of_two
from megalite_kernels.triton.launch import Launch, Table, launch
from megalite_kernels.triton.norm_forward import forward_sizes

# As the norms, whose rows are a third as long: 16 elements a thread up to 16,384 features of bf16 (14,336 are padded
# to them). Gate, up and y of 32,768 would need more than the 64 registers that a thread of 1,024 has: beyond LIMIT a
# row takes turns of 8,192, and y comes back from the second-level cache to be quantised.
ROWS = Table(
    "fp8_activation",
    {"default": Launch({"TILE": 4096, "WARP": 512, "LIMIT": 32768, "CHUNK": 8192}, num_warps=32)},
)


@triton.jit
def activated(x_ptr, offsets, mask, FEATURES: tl.constexpr, GATED: tl.constexpr, KIND: tl.constexpr):
    """Elements of y in fp32, from x, or from the gate at `offsets` and up FEATURES behind it."""
    value, _ = value_and_slope(tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32), KIND)
    if GATED:
        value *= tl.load(x_ptr + FEATURES + offsets, mask=mask, other=0.0).to(tl.float32)
    return value


@triton.jit
def activation_rows_kernel(
    x_ptr, y_ptr, data_ptr, scale_ptr, rows, FEATURES: tl.constexpr, GATED: tl.constexpr, KIND: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Grid [cdiv(rows, BLOCK_T)]; a program owns whole rows, in registers where BLOCK_H holds one (else BLOCK_T is 1
    and y is read back from the second-level cache).

    Bytes per element of y, e being x's size: x (gated: gate and up) read, y written, e each; 1 for its FP8; and 4 a
    row. What is quantised is y as it is written, rounded to its type. fp32.
    """
    first = tl.program_id(0).to(tl.int64) * BLOCK_T
    row, col = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_H)
    row_mask = row < rows - first
    stride: tl.constexpr = 2 * FEATURES if GATED else FEATURES
    x_ptr += first * stride
    y_ptr += first * FEATURES
    data_ptr += first * FEATURES
    offsets = row[:, None] * FEATURES + col[None, :]
    x_offsets = row[:, None] * stride + col[None, :]
    mask = row_mask[:, None] & (col < FEATURES)[None, :]
    y = activated(x_ptr, x_offsets, mask, FEATURES, GATED, KIND).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + offsets, y, mask=mask)
    bits = tl.max(magnitude_bits(tl.where(mask, y.to(tl.float32), 0.0)), 1)
    for start in tl.range(BLOCK_H, FEATURES, BLOCK_H):
        more_mask = row_mask[:, None] & (start + col < FEATURES)[None, :]
        more = activated(x_ptr + start, x_offsets, more_mask, FEATURES, GATED, KIND).to(
            y_ptr.dtype.element_ty
        )
        tl.store(y_ptr + start + offsets, more, mask=more_mask)
        bits = tl.maximum(bits, tl.max(magnitude_bits(tl.where(more_mask, more.to(tl.float32), 0.0)), 1))
    scale, inverse = power_of_two(bits, E4M3_EXPONENT)
    tl.store(scale_ptr + first + row, scale, mask=row_mask)
    data = (y.to(tl.float32) * inverse[:, None]).to(data_ptr.dtype.element_ty)
    tl.store(data_ptr + offsets, data, mask=mask)
    if BLOCK_H < FEATURES:
        tl.debug_barrier()  # y is read back
        for start in tl.range(BLOCK_H, FEATURES, BLOCK_H):
            more_mask = row_mask[:, None] & (start + col < FEATURES)[None, :]
            more = tl.load(y_ptr + start + offsets, mask=more_mask, other=0.0).to(tl.float32)
            data = (more * inverse[:, None]).to(data_ptr.dtype.element_ty)
            tl.store(data_ptr + start + offsets, data, mask=more_mask)


def forward(x: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Backend "triton" of `fp8_activation_fwd`."""
    return _forward(x, kind, gated=False)


def packed_forward(packed: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Backend "triton" of `fp8_glu_fwd`."""
    return _forward(packed, kind, gated=True)


def _forward(x: Tensor, kind: str, *, gated: bool) -> tuple[Tensor, Tensor, Tensor]:
    x = x.contiguous()
    features = x.shape[-1] // 2 if gated else x.shape[-1]
    rows = x.shape[:-1].numel()
    y = x.new_empty((*x.shape[:-1], features))
    data = x.new_empty((rows, features), dtype=torch.float8_e4m3fn)
    scale = x.new_empty(rows, dtype=torch.float32)
    if features == 0:
        return y, data, scale.fill_(1.0)
    config = forward_sizes(features, x.element_size(), ROWS.pick())
    grid = (triton.cdiv(rows, config.blocks["BLOCK_T"]),)
    launch(
        activation_rows_kernel,
        grid,
        config,
        x,
        y,
        data,
        scale,
        rows,
        FEATURES=features,
        GATED=gated,
        KIND=kind,
    )
    return y, data, scale
