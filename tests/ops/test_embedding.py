"""embedding: its gradient, summed in token order, alone and into an fp32 buffer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import megalite_kernels as mk
from tests.ops.catalogue import BACKENDS, DEVICE, DTYPES, check, generator, random

SHAPES = [(1, 1, 1), (2, 7, 13), (64, 5, 64), (509, 300, 96)]


def tokens(count: int, rows: int) -> torch.Tensor:
    """Ids with many repetitions and, where there is room, rows that no token has."""
    uniform = torch.rand(count, generator=generator(), device="cpu").to(DEVICE)
    return (uniform.square() * rows).long()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "rows", "cols"), SHAPES)
def test_accuracy(count: int, rows: int, cols: int, dtype: torch.dtype, backend: str) -> None:
    ids = tokens(count, rows)
    check(
        lambda w: mk.embedding(ids, w),
        lambda w: F.embedding(ids, w),
        [random(rows, cols)],
        dtype=dtype,
        backend=backend,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_tokens_of_one_row_keep_fp32_accuracy(backend: str) -> None:
    """4,096 equal terms: in bf16 the sum would stop at 256."""
    weight = torch.zeros(3, 8, dtype=torch.bfloat16, requires_grad=True)
    with mk.use_backend(backend):
        mk.embedding(torch.ones(4096, dtype=torch.int64), weight).sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad[1], torch.full((8,), 4096.0, dtype=torch.bfloat16))
    assert torch.equal(weight.grad[::2], torch.zeros(2, 8, dtype=torch.bfloat16))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_added_into_the_accumulator(dtype: torch.dtype, backend: str) -> None:
    ids, weight = tokens(60, 9).view(3, 20), random(9, 24).to(dtype).requires_grad_()
    dy, main_grad = random(3, 20, 24, seed=1).to(dtype), torch.full((9, 24), 2.0)
    with mk.use_backend(backend):
        for _ in range(2):
            mk.embedding(ids, weight, main_grad=main_grad).backward(dy)
    assert weight.grad is None
    expected = torch.zeros(9, 24, dtype=torch.float64).index_add_(0, ids.flatten(), dy.double().flatten(0, 1))
    torch.testing.assert_close(main_grad, (2 + 2 * expected).float())


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous_and_empty(backend: str) -> None:
    ids, weight = tokens(24, 7).view(4, 6), random(7, 10).requires_grad_()
    with mk.use_backend(backend):
        y = mk.embedding(ids.t(), weight)
        (got,) = torch.autograd.grad(y, weight, random(10, 4, 6).permute(2, 1, 0))
        empty = mk.embedding(ids[:0], weight)
        (none,) = torch.autograd.grad(empty.sum(), weight)
    expected = torch.autograd.grad(F.embedding(ids.t(), weight), weight, random(10, 4, 6).permute(2, 1, 0))
    torch.testing.assert_close(got, expected[0])
    assert empty.shape == (0, 6, 10)
    assert torch.equal(none, torch.zeros(7, 10))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_row_and_column(backend: str) -> None:
    dy = random(6, 5)
    dy[2, 3] = torch.nan
    weight = random(4, 5).requires_grad_()
    with mk.use_backend(backend):
        (grad,) = torch.autograd.grad(mk.embedding(torch.tensor([0, 1, 2, 2, 0, 1]), weight), weight, dy)
    assert torch.isnan(grad).nonzero().tolist() == [[2, 3]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_are_not_written(backend: str) -> None:
    ids, weight = tokens(9, 5), random(5, 8).requires_grad_()
    with mk.use_backend(backend):
        mk.embedding(ids, weight).sum().backward()
    assert ids._version == weight._version == 0


def test_errors_name_value_and_limit() -> None:
    ids, weight = torch.zeros(3, dtype=torch.int64), random(5, 8)
    with pytest.raises(ValueError, match=r"ids has dtype torch.int32: pass int64"):
        mk.embedding(ids.int(), weight)
    with pytest.raises(ValueError, match=r"weight has shape \[8\]: pass \[V, H\]"):
        mk.embedding(ids, weight[0])
    with pytest.raises(ValueError, match=r"main_grad has shape \[8, 5\], but weight needs \[5, 8\]"):
        mk.embedding(ids, weight, main_grad=torch.zeros(8, 5))
    if DEVICE == "cpu":  # a GPU's own check stops the process
        with pytest.raises(IndexError):
            mk.embedding(ids + 5, weight)
