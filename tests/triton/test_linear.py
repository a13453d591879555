"""The weight-gradient kernel, interpreted, over several tiles with ragged ends."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import megalite_kernels as mk
from megalite_kernels.testing import assert_as_accurate
from megalite_kernels.triton import linear as kernels
from megalite_kernels.triton.launch import Launch, override
from tests.ops.catalogue import random


@pytest.fixture(autouse=True)
def small_tiles() -> Iterator[None]:
    small = Launch({"BLOCK_O": 16, "BLOCK_I": 32, "BLOCK_T": 16, "GROUP": 2})
    with override("linear_weight_grad_", small), override("linear_weight_grad_fp32", small):
        yield


def accumulate(dy: Tensor, x: Tensor, main_grad: Tensor) -> Tensor:
    with mk.use_backend("triton"):
        torch.ops.megalite.linear_weight_grad_(dy, x, main_grad)
    return main_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "outputs", "inputs"), [(1, 1, 1), (37, 70, 50), (16, 16, 64)])
def test_accuracy(tokens: int, outputs: int, inputs: int, dtype: torch.dtype) -> None:
    dy, x = random(tokens, outputs).to(dtype), random(tokens, inputs, seed=1).to(dtype)
    before = random(outputs, inputs, seed=2)
    got = accumulate(dy, x, before.clone())
    assert_as_accurate(
        got, before + dy.float().t() @ x.float(), before.double() + dy.double().t() @ x.double()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_views(dtype: torch.dtype) -> None:
    """Slices of wider tensors, transposed ones, and an accumulator that is a slice or transposed."""
    wide, x = random(20, 40).to(dtype), random(20, 35, seed=1).to(dtype)
    for dy in (wide[:, 3:21], wide[:, ::2], wide.t().contiguous().t()[:, :18]):
        expected = 1 + dy.float().t() @ x.float()
        for main_grad in (torch.ones(dy.shape[1], 50)[:, 10:45], torch.ones(35, dy.shape[1]).t()):
            torch.testing.assert_close(accumulate(dy, x, main_grad), expected, rtol=1e-5, atol=1e-5)


def test_no_tokens_and_nothing_to_write() -> None:
    main_grad = random(5, 7)
    assert torch.equal(accumulate(torch.empty(0, 5), torch.empty(0, 7), main_grad.clone()), main_grad)
    assert accumulate(torch.empty(3, 0), torch.empty(3, 7), torch.empty(0, 7)).shape == (0, 7)


def test_a_nan_stays_in_its_row_and_inputs_are_not_written() -> None:
    dy, x = random(40, 18), random(40, 33)
    dy[39, 17] = torch.nan
    got = accumulate(dy, x, torch.zeros(18, 33))
    assert torch.isnan(got).nonzero()[:, 0].unique().tolist() == [17]
    assert x._version == 0


def test_through_the_public_function() -> None:
    x, weight, main_grad = random(2, 20, 24).requires_grad_(), random(18, 24), torch.zeros(18, 24)
    with mk.use_backend("triton", "reference"):  # the products that are not added to anything are torch's
        mk.linear(x, weight.requires_grad_(), main_grad=main_grad).sum().backward()
    torch.testing.assert_close(main_grad, x.detach().flatten(0, 1).sum(0).expand(18, 24))


def test_torchs_own_product_is_taken_where_it_accumulates(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not kernels.library_accumulates("cpu", torch.bfloat16)
    monkeypatch.setattr(torch.version, "hip", None)
    for tuning in (False, True):
        monkeypatch.setattr(torch.cuda.tunable, "is_enabled", lambda tuning=tuning: tuning)
        assert kernels.library_accumulates("cuda", torch.float32)
        assert kernels.library_accumulates("cuda", torch.bfloat16) is not tuning
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert not kernels.library_accumulates("cuda", torch.float32)


def test_torchs_own_product_gets_the_accumulator_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU torch lacks the 16-bit form, so that the call is looked at and not made."""
    calls = []
    monkeypatch.setattr(kernels, "library_accumulates", lambda *args: True)
    monkeypatch.setattr(torch, "addmm", lambda *args, **options: calls.append((args, options)))
    dy, x, main_grad = random(9, 5).bfloat16(), random(9, 6).bfloat16(), torch.zeros(5, 6)
    kernels.accumulate_(dy, x, main_grad)
    (((added, left, right), options),) = calls
    assert added is options["out"] is main_grad
    assert options["out_dtype"] == torch.float32
    assert torch.equal(left, dy.t())
    assert right is x
    kernels.accumulate_(dy.float(), x.float(), main_grad)
    torch.testing.assert_close(main_grad, dy.float().t() @ x.float())
    kernels.accumulate_(dy.float(), x.float(), main_grad.fill_(torch.nan), False)
    torch.testing.assert_close(main_grad, dy.float().t() @ x.float())


def test_torchs_own_product_overwrites_the_accumulator(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(kernels, "library_accumulates", lambda *args: True)
    monkeypatch.setattr(torch, "mm", lambda *args, **options: calls.append((args, options)))
    dy, x, main_grad = random(9, 5).bfloat16(), random(9, 6).bfloat16(), torch.zeros(5, 6)
    kernels.accumulate_(dy, x, main_grad, False)
    (((left, right), options),) = calls
    assert options == {"out": main_grad, "out_dtype": torch.float32}
    assert torch.equal(left, dy.t())
    assert right is x


def test_the_kernel_overwrites_what_is_not_added_to() -> None:
    dy, x, main_grad = random(9, 5), random(9, 6), torch.full((5, 6), torch.nan)
    kernels.accumulate_(dy, x, main_grad, False)
    torch.testing.assert_close(main_grad, dy.t() @ x)
