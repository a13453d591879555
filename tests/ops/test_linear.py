"""linear with an fp32 accumulator for the weight's gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import megalite_kernels as mk
from tests.ops.catalogue import DTYPES, random


def test_without_accumulator_it_is_torchs() -> None:
    x, weight, bias = random(2, 5, 8), random(3, 8, seed=1), random(3, seed=2)
    assert torch.equal(mk.linear(x, weight, bias=bias), F.linear(x, weight, bias))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_added_into_the_accumulator(dtype: torch.dtype) -> None:
    x, weight, bias = (random(*s, seed=i).to(dtype) for i, s in enumerate([(2, 5, 8), (3, 8), (3,)]))
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    expected = torch.autograd.grad(F.linear(*leaves).square().sum(), leaves)
    main_grad = torch.full((3, 8), 2.0)
    for _ in range(2):
        mk.linear(x, weight, bias=bias, main_grad=main_grad).square().sum().backward()
    assert weight.grad is None
    assert x.grad is not None
    torch.testing.assert_close(x.grad, 2 * expected[0])
    torch.testing.assert_close(main_grad, 2 + 2 * expected[1].float())


def test_a_frozen_weight_is_left_alone() -> None:
    x, main_grad = random(5, 8).requires_grad_(), torch.zeros(3, 8)
    mk.linear(x, random(3, 8), main_grad=main_grad).sum().backward()
    assert x.grad is not None
    assert torch.equal(main_grad, torch.zeros(3, 8))


def test_errors_name_value_and_limit() -> None:
    x, weight = random(5, 8), random(3, 8)
    with pytest.raises(ValueError, match=r"main_grad has shape \[8, 3\], but weight needs \[3, 8\]"):
        mk.linear(x, weight, main_grad=torch.zeros(8, 3))
    with pytest.raises(ValueError, match=r"main_grad has dtype torch.float16: pass an fp32 accumulator"):
        mk.linear(x, weight, main_grad=torch.zeros(3, 8).half())
    with pytest.raises(ValueError, match=r"weight has shape \[3, 7\], but x with 8 features needs \[3, 8\]"):
        mk.linear(x, weight[:, :7])
    with pytest.raises(ValueError, match=r"weight is torch.bfloat16 but x is torch.float32"):
        mk.linear(x, weight.bfloat16())
