"""FP8 quantisation on Triton: amax, scale and cast, by rows in one pass, else in two over the tensor."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megalite_kernels.reference.fp8 import EXPONENT
from megalite_kernels.triton.fp8_scale import magnitude_bits, power_of_two
from megalite_kernels.triton.launch import Launch, Table, launch
from megalite_kernels.triton.norm_forward import FORWARD, forward_sizes

# 8,192 bf16 in flight a program, 32 elements a thread: one atomic for each of 64 columns, or one for the tile.
AMAX = Table("fp8_amax", {"default": Launch({"BLOCK_R": 128, "BLOCK_C": 64}, num_warps=8)})
# 64 x 64 bytes: whole sectors of 64 bytes in both directions when transposed; the turn goes through shared memory.
CAST = Table("fp8_cast", {"default": Launch({"BLOCK_R": 64, "BLOCK_C": 64}, num_warps=4)})
SCALE = Table("fp8_scale", {"default": Launch({"BLOCK": 1024}, num_warps=4)})


@triton.jit
def rows_kernel(
    x_ptr, data_ptr, scale_ptr, rows, COLUMNS: tl.constexpr, EXPONENT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Grid [cdiv(rows, BLOCK_T)]; a program owns whole rows, in registers where BLOCK_H holds one (else BLOCK_T is 1
    and the second read comes from the second-level cache). Bytes per element: x read, 1 written; and 4 a row."""
    first = tl.program_id(0).to(tl.int64) * BLOCK_T
    row, col = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_H)
    row_mask = row < rows - first
    base = first * COLUMNS
    offsets = row[:, None] * COLUMNS + col[None, :]
    x = tl.load(x_ptr + base + offsets, mask=row_mask[:, None] & (col < COLUMNS)[None, :], other=0.0)
    bits = tl.max(magnitude_bits(x.to(tl.float32)), 1)
    for start in tl.range(BLOCK_H, COLUMNS, BLOCK_H):
        mask = row_mask[:, None] & (start + col < COLUMNS)[None, :]
        more = tl.load(x_ptr + base + start + offsets, mask=mask, other=0.0).to(tl.float32)
        bits = tl.maximum(bits, tl.max(magnitude_bits(more), 1))
    scale, inverse = power_of_two(bits, EXPONENT)
    tl.store(scale_ptr + first + row, scale, mask=row_mask)
    data = (x.to(tl.float32) * inverse[:, None]).to(data_ptr.dtype.element_ty)
    tl.store(data_ptr + base + offsets, data, mask=row_mask[:, None] & (col < COLUMNS)[None, :])
    for start in tl.range(BLOCK_H, COLUMNS, BLOCK_H):
        mask = row_mask[:, None] & (start + col < COLUMNS)[None, :]
        more = tl.load(x_ptr + base + start + offsets, mask=mask, other=0.0).to(tl.float32)
        data = (more * inverse[:, None]).to(data_ptr.dtype.element_ty)
        tl.store(data_ptr + base + start + offsets, data, mask=mask)


@triton.jit
def tile(rows, columns, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """A program's tile: its first row, its rows and columns [BLOCK_R], [BLOCK_C] and the mask of both."""
    across = tl.cdiv(columns, BLOCK_C)
    first = (tl.program_id(0) // across).to(tl.int64) * BLOCK_R
    row, col = tl.arange(0, BLOCK_R), (tl.program_id(0) % across) * BLOCK_C + tl.arange(0, BLOCK_C)
    return first, row, col, (row < rows - first)[:, None] & (col < columns)[None, :]


@triton.jit
def amax_kernel(
    x_ptr, bits_ptr, rows, columns, PER_COLUMN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Grid of tiles; each adds its largest magnitudes to `bits` (zeros before), of each column or of all. Reads x."""
    first, row, col, mask = tile(rows, columns, BLOCK_R, BLOCK_C)
    x = tl.load(x_ptr + first * columns + row[:, None] * columns + col[None, :], mask=mask, other=0.0)
    bits = tl.max(magnitude_bits(x.to(tl.float32)), 0)
    if PER_COLUMN:
        tl.atomic_max(bits_ptr + col, bits, mask=col < columns, sem="relaxed")
    else:
        tl.atomic_max(bits_ptr, tl.max(bits, 0), sem="relaxed")


@triton.jit
def scale_kernel(bits_ptr, scale_ptr, size, EXPONENT: tl.constexpr, BLOCK: tl.constexpr):
    """Grid [cdiv(size, BLOCK)]: scales of magnitudes. 8 bytes an element."""
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    scale, _ = power_of_two(tl.load(bits_ptr + lane, mask=lane < size, other=0), EXPONENT)
    tl.store(scale_ptr + lane, scale, mask=lane < size)


@triton.jit
def cast_kernel(
    x_ptr, scale_ptr, data_ptr, rows, columns, PER_COLUMN: tl.constexpr, TRANSPOSED: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid of tiles; a program owns one of x, and of data or its transpose. Bytes per element: x read, 1 written."""
    first, row, col, mask = tile(rows, columns, BLOCK_R, BLOCK_C)
    x = tl.load(x_ptr + first * columns + row[:, None] * columns + col[None, :], mask=mask, other=0.0)
    if PER_COLUMN:
        scale = tl.load(scale_ptr + col, mask=col < columns, other=1.0)[None, :]
    else:
        scale = tl.load(scale_ptr)
    bits = 0x7F000000 - scale.to(tl.int32, bitcast=True)  # of 1 / scale: 254 less its exponent
    inverse = tl.where(scale == scale, bits.to(tl.float32, bitcast=True), scale)
    data = (x.to(tl.float32) * inverse).to(data_ptr.dtype.element_ty)
    if TRANSPOSED:
        at = data_ptr + first + col[:, None].to(tl.int64) * rows + row[None, :]
        tl.store(at, tl.trans(data), mask=tl.trans(mask))
    else:
        tl.store(data_ptr + first * columns + row[:, None] * columns + col[None, :], data, mask=mask)


def quantize_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Backend "triton" of `fp8_quantize_rows`: one launch."""
    x, (rows, columns) = x.contiguous(), x.shape
    data, scale = torch.empty_like(x, dtype=dtype), x.new_empty(rows, dtype=torch.float32)
    config = forward_sizes(max(columns, 1), x.element_size(), FORWARD.pick())
    grid = (triton.cdiv(rows, config.blocks["BLOCK_T"]),)
    launch(rows_kernel, grid, config, x, data, scale, rows, COLUMNS=columns, EXPONENT=EXPONENT[dtype])
    return data, scale


def quantize_columns(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Backend "triton" of `fp8_quantize_columns`: three launches, x is read twice."""
    scale = _scales(x, dtype, per_column=True)
    return _cast(x, scale, dtype, per_column=True, transposed=True), scale


def tensor_scale(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Backend "triton" of `fp8_tensor_scale`: two launches."""
    return _scales(x, dtype, per_column=False).view(())


def cast(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Backend "triton" of `fp8_cast`."""
    return _cast(x, scale, dtype, per_column=False, transposed=False)


def cast_transposed(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Backend "triton" of `fp8_cast_transposed`."""
    return _cast(x, scale, dtype, per_column=False, transposed=True)


def _scales(x: Tensor, dtype: torch.dtype, *, per_column: bool) -> Tensor:
    x, (rows, columns) = x.contiguous(), x.shape
    bits = torch.zeros(columns if per_column else 1, dtype=torch.int32, device=x.device)
    scale = torch.empty_like(bits, dtype=torch.float32)
    config = AMAX.pick()
    launch(amax_kernel, _tiles(config, rows, columns), config, x, bits, rows, columns, PER_COLUMN=per_column)
    config = SCALE.pick()
    size = bits.numel()
    grid = (triton.cdiv(size, config.blocks["BLOCK"]),)
    launch(scale_kernel, grid, config, bits, scale, size, EXPONENT=EXPONENT[dtype])
    return scale


def _cast(x: Tensor, scale: Tensor, dtype: torch.dtype, *, per_column: bool, transposed: bool) -> Tensor:
    x, (rows, columns) = x.contiguous(), x.shape
    data = x.new_empty((columns, rows) if transposed else (rows, columns), dtype=dtype)
    config = CAST.pick()
    launch(
        cast_kernel,
        _tiles(config, rows, columns),
        config,
        x, scale, data, rows, columns,
        PER_COLUMN=per_column,
        TRANSPOSED=transposed,
    )  # fmt: skip
    return data


def _tiles(config: Launch, rows: int, columns: int) -> tuple[int]:
    return (triton.cdiv(rows, config.blocks["BLOCK_R"]) * triton.cdiv(columns, config.blocks["BLOCK_C"]),)
