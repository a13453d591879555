"""Who multiplies matrices on this machine, for figures that others are held against."""

from __future__ import annotations

import time
from functools import partial

import pytest
import torch

from megalite_kernels import products
from megalite_kernels.products import OURS, TORCH, fast_products, square_products


def test_all_of_them_multiply() -> None:
    makers = {TORCH: products.by_torch, OURS: products.by_us}
    left, right = torch.randn(5, 7).to(torch.float64), torch.randn(3, 7).to(torch.float64).t()
    for product in makers.values():
        torch.testing.assert_close(product(left, right)(), left @ right)


@pytest.mark.parametrize(("slow", "kept"), [("by_torch", OURS), ("by_us", TORCH)])
def test_one_that_takes_far_longer_is_left_out(monkeypatch: pytest.MonkeyPatch, slow: str, kept: str) -> None:
    monkeypatch.setattr(products, slow, lambda left, right: partial(time.sleep, 0.3))
    assert list(fast_products(torch.float32)) == [kept]


def test_one_that_takes_little_longer_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = iter([3.0, 1.0, 1.0, 3.0])
    monkeypatch.setattr(products, "_seconds", lambda call: next(taken))
    for _ in range(2):
        assert list(fast_products(torch.bfloat16)) == [TORCH, OURS]


def test_squares_are_random_and_the_same_for_all() -> None:
    seen = []
    makers = {name: lambda left, right: seen.append((left, right)) or time.time for name in "ab"}
    square_products(4, torch.bfloat16, "cpu", makers)
    (left, right), (again, _) = seen
    assert left is again
    assert left.dtype == right.dtype == torch.bfloat16
    assert left.shape == right.shape == (4, 4)
    assert len(left.unique()) > 8
