"""The kernels of the gradient norm, interpreted, over several chunks of several blocks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import megalite_kernels as mk
from megalite_kernels.triton import grad_norm as kernels
from megalite_kernels.triton.launch import Launch, override
from tests.ops import test_grad_norm as ops
from tests.ops.catalogue import random


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(kernels, "CHUNK", 64)
    with (
        override("grad_norm_partial", Launch({"BLOCK": 32})),
        override("grad_norm_total", Launch({"BLOCK": 4})),
    ):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [0, 1, 7, 64, 999])
def test_accuracy(size: int, dtype: torch.dtype) -> None:
    ops.test_accuracy(size, dtype, "triton")


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_squares_neither_overflow_nor_vanish(scale: float) -> None:
    ops.test_squares_neither_overflow_nor_vanish(scale, "triton")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_non_finite_gradients_show(value: float) -> None:
    grads = random(130)
    grads[129] = value
    with mk.use_backend("triton"):
        assert not torch.isfinite(mk.grad_norm([random(5), grads]))


def test_small_tensors_share_a_launch_and_views_are_read_whole() -> None:
    grads = [random(5), random(200, seed=1)[::2], random(3, seed=2).bfloat16(), random(7, seed=3), random(0)]
    assert [x.numel() for x in kernels._merged(grads)] == [100, 12, 3]
    truth = torch.cat([g.double() for g in grads]).norm().float()
    with mk.use_backend("triton"):
        torch.testing.assert_close(mk.grad_norm(grads), truth, rtol=1e-7, atol=0)
