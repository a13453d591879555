"""The embedding's gradient, interpreted: pieces of four tokens, rows of several blocks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

import megalite_kernels as mk
from megalite_kernels.triton.launch import Launch, override
from tests.ops import test_embedding as ops
from tests.ops.catalogue import check, random

LONG = [3] * 4 + [1] * 13 + [0] + [5] * 3 + [2] * 5 + [4]
"""Counts by id, sorted: id 0 once, 1 over five pieces, 2 and 3 over the edge of one, 4 once, 5 within a piece."""


@pytest.fixture(autouse=True)
def small_blocks() -> Iterator[None]:
    with override("embedding_bwd", Launch({"PIECE": 4, "BLOCK_H": 8})):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("count", "rows", "cols"), [(1, 1, 1), (2, 7, 13), (64, 30, 11)])
def test_accuracy(count: int, rows: int, cols: int, dtype: torch.dtype) -> None:
    ops.test_accuracy(count, rows, cols, dtype, "triton")


@pytest.mark.parametrize("shift", range(5))
def test_segments_at_every_place_of_their_pieces(shift: int) -> None:
    """Ids before move all others by `shift` positions, so that each segment begins and ends everywhere."""
    order = torch.randperm(len(LONG), generator=torch.Generator().manual_seed(shift))
    ids = torch.cat([torch.zeros(shift, dtype=torch.int64), torch.tensor(LONG)[order] + 1])
    check(
        lambda w: mk.embedding(ids, w),
        lambda w: F.embedding(ids, w),
        [random(8, 11)],
        dtype=torch.float32,
        backend="triton",
    )


@pytest.mark.parametrize("count", [1, 3, 4, 5, 8, 9])
def test_all_tokens_alike(count: int) -> None:
    dy, ids = random(count, 9), torch.full((count,), 2)
    with mk.use_backend("triton"):
        got = torch.ops.megalite.embedding_bwd(dy, ids, 4)
    torch.testing.assert_close(got[2], dy.sum(0))
    assert not got[[0, 1, 3]].any()


def test_many_tokens_of_one_row_keep_fp32_accuracy() -> None:
    """400 equal terms: in bf16 the sum would stop at 256."""
    dy, ids = torch.ones(400, 3, dtype=torch.bfloat16), torch.ones(400, dtype=torch.int64)
    with mk.use_backend("triton"):
        got = torch.ops.megalite.embedding_bwd(dy, ids, 2)
    assert torch.equal(got, torch.tensor([[0.0] * 3, [400.0] * 3]).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accumulation(dtype: torch.dtype) -> None:
    ops.test_gradients_are_added_into_the_accumulator(dtype, "triton")
    dy, ids = random(9, 10), torch.tensor([3, 3, 0, 3, 3, 3, 1, 3, 3])
    expected = torch.ones(5, 10).index_add_(0, ids, dy)
    for main_grad in (torch.ones(5, 20)[:, 5:15], torch.ones(10, 5).t()):
        with mk.use_backend("triton"):
            torch.ops.megalite.embedding_bwd_(dy, ids, main_grad)
        torch.testing.assert_close(main_grad, expected)


def test_layouts_empty_nan_and_inputs() -> None:
    ops.test_non_contiguous_and_empty("triton")
    ops.test_nan_stays_in_its_row_and_column("triton")
    ops.test_inputs_are_not_written("triton")


def test_ids_out_of_range_write_nothing() -> None:
    """As sorted, they stand at both ends; torch's own lookup in the forward is what reports them."""
    dy, ids = random(6, 9), torch.tensor([-1, -1, 7, 1, 0, 4])
    with mk.use_backend("triton"):
        got = torch.ops.megalite.embedding_bwd(dy, ids, 4)
    assert torch.equal(got, torch.stack([dy[4], dy[3], torch.zeros(9), torch.zeros(9)]))


def test_the_order_of_the_tokens_is_the_order_of_the_sum() -> None:
    dy = torch.tensor([[1e8], [1.0], [-1e8]])
    with mk.use_backend("triton"):
        got = torch.ops.megalite.embedding_bwd(dy, torch.zeros(3, dtype=torch.int64), 1)
        other = torch.ops.megalite.embedding_bwd(dy[[0, 2, 1]], torch.zeros(3, dtype=torch.int64), 1)
    assert (float(got), float(other)) == (0.0, 1.0)
