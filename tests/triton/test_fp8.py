"""The FP8 kernels, interpreted: the reference's bits, over ragged tiles and everything that is not a plain number."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from megalite_kernels.reference import fp8 as reference
from megalite_kernels.triton import fp8 as kernels
from megalite_kernels.triton.launch import Launch, override
from tests.ops.catalogue import random

FORMATS = [torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.fixture(autouse=True)
def small_tiles() -> Iterator[None]:
    tile = Launch({"BLOCK_R": 16, "BLOCK_C": 32})
    norm = Launch({"TILE": 256, "WARP": 512, "LIMIT": 512, "CHUNK": 64}, num_warps=32)
    scale = Launch({"BLOCK": 32})
    with (
        override("fp8_amax", tile),
        override("fp8_cast", tile),
        override("fp8_scale", scale),
        override("norm_forward", norm),
    ):
        yield


def wild(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Numbers of all magnitudes; in a tensor of many rows also rows of zeros, with NaN and infinity, and extremes."""
    x = random(rows, columns) * torch.exp(3 * random(rows, columns, seed=1))
    if rows > 8:
        x[0] = 0.0
        x[1, 3], x[2, 1], x[3, 0] = torch.nan, torch.inf, -torch.inf
        x[4], x[5] = 1e-39, 3e38
        x[6, 0], x[6, 1:] = 448.0, 0.0009
        x[7, 0], x[7, 1:] = 57345.0, -0.0
    return x.to(dtype)


def assert_same(got: tuple[Tensor, ...] | Tensor, expected: tuple[Tensor, ...] | Tensor) -> None:
    """Bit for bit; a NaN is a NaN."""
    for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in (got, expected)), strict=True):
        assert (a.shape, a.is_contiguous(), a.dtype) == (b.shape, True, b.dtype)
        a, b = a.float(), b.float()
        same = (a == b) & (a.signbit() == b.signbit()) | a.isnan() & b.isnan()
        assert same.all()


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("source", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (37, 70), (12, 300), (0, 5), (5, 0)])
def test_rows_and_columns(rows: int, columns: int, source: torch.dtype, dtype: torch.dtype) -> None:
    """300 columns are beyond the longest row in registers here."""
    x = wild(rows, columns, source)
    assert_same(kernels.quantize_rows(x, dtype), reference.quantize_rows(x, dtype))
    assert_same(kernels.quantize_columns(x, dtype), reference.quantize_columns(x, dtype))


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (37, 70), (0, 5)])
def test_tensors(rows: int, columns: int, dtype: torch.dtype) -> None:
    for x in (wild(rows, columns, torch.bfloat16), random(rows, columns).bfloat16()):
        scale = reference.tensor_scale(x, dtype)
        assert_same(kernels.tensor_scale(x, dtype), scale)
        assert_same(kernels.cast(x, scale, dtype), reference.cast(x, scale, dtype))
        assert_same(kernels.cast_transposed(x, scale, dtype), reference.cast_transposed(x, scale, dtype))


def test_views() -> None:
    wide = random(40, 90).bfloat16()
    for x in (wide[:, 3:60], wide.t(), wide[::2]):
        dtype = torch.float8_e4m3fn
        expected = x.contiguous()
        assert_same(kernels.quantize_rows(x, dtype), reference.quantize_rows(expected, dtype))
        assert_same(kernels.quantize_columns(x, dtype), reference.quantize_columns(expected, dtype))
