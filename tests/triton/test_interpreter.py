"""The corrected interpreter itself: bfloat16 conversions, arithmetic and products are as on a GPU."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def arithmetic_kernel(x_ptr, y_ptr, sum_ptr, less_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    x, y = tl.load(x_ptr + at), tl.load(y_ptr + at)
    tl.store(sum_ptr + at, x * y + x)
    tl.store(less_ptr + at, (x < y).to(tl.int32))


@triton.jit
def dot_kernel(x_ptr, y_ptr, out_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    product = tl.dot(tl.load(x_ptr + at), tl.load(y_ptr + at))
    tl.store(out_ptr + at, product)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_arithmetic_rounds_each_result(dtype: torch.dtype) -> None:
    x, y = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    total, less = torch.empty_like(x), torch.empty(64, dtype=torch.int32)
    arithmetic_kernel[(1,)](x, y, total, less, SIZE=64)
    assert torch.equal(total, x * y + x)
    assert torch.equal(less.bool(), x < y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dot_accumulates_in_float32(dtype: torch.dtype) -> None:
    x, y = torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    out = torch.empty(32, 32)
    dot_kernel[(1,)](x, y, out, SIZE=32)
    torch.testing.assert_close(out, x.float() @ y.float(), rtol=1e-6, atol=1e-5)


def test_stores_round_to_nearest_even_and_keep_nan() -> None:
    from tests.helpers.triton_interpreter import narrowed, widened

    x = torch.randn(10000, generator=torch.Generator().manual_seed(0)) * 10
    x[0], x[1], x[2] = torch.nan, torch.inf, -torch.inf
    ours = torch.from_numpy(widened(narrowed(x.numpy())))
    torch.testing.assert_close(ours, x.bfloat16().float(), rtol=0, atol=0, equal_nan=True)
