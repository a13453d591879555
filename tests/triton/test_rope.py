"""The rotary kernels, interpreted: tiles smaller than the heads, so that loops turn and end ragged."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import megalite_kernels as mk
from megalite_kernels.triton import rope as kernels
from megalite_kernels.triton.launch import Launch, override
from tests.ops import test_rope as ops
from tests.ops.catalogue import random

SHAPES = [
    (2, 1, False, torch.float32),
    (26, 13, True, torch.bfloat16),
    (32, 16, False, torch.bfloat16),
    (40, 10, True, torch.float32),
    (40, 10, False, torch.float16),
]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two heads a tile; five programs in the backward, whose partial sums are added two at a time."""
    monkeypatch.setattr(kernels, "PROGRAMS_PER_PROCESSOR", 1)
    monkeypatch.setattr(kernels, "num_processors", lambda x: 5)
    with (
        override("rope_fwd", Launch({"BLOCK_N": 2})),
        override("rope_norm_bwd", Launch({"BLOCK_N": 2})),
        override("rope_norm_weights", Launch({"BLOCK_P": 2, "BLOCK_C": 16})),
    ):
        yield


@pytest.mark.parametrize(("dim", "half", "interleaved", "dtype"), SHAPES)
def test_accuracy(dim: int, half: int, interleaved: bool, dtype: torch.dtype) -> None:
    ops.test_accuracy(dim, half, interleaved, dtype, "triton")


@pytest.mark.parametrize(("dim", "half", "interleaved", "dtype"), SHAPES)
def test_norm_accuracy(dim: int, half: int, interleaved: bool, dtype: torch.dtype) -> None:
    ops.test_norm_accuracy(dim, half, interleaved, dtype, "triton")


def test_views_and_tables() -> None:
    ops.test_views_of_a_fused_projection_give_the_same_bits("triton")
    ops.test_transposed_heads_and_batched_tables("triton")
    ops.test_norm_of_views_and_of_weights_in_another_dtype("triton")


def test_extremes_nan_and_empty() -> None:
    ops.test_norm_extremes_and_nan("triton")
    ops.test_empty("triton")
    q, table, weight = torch.empty(0, 4, 8), torch.empty(0, 4), torch.ones(8)
    with mk.use_backend("triton"):
        grads = torch.ops.megalite.rope_norm_bwd(
            q, q, q, q, weight, weight, q.new_empty(0), q.new_empty(0), table, table, False
        )
    assert [g.shape for g in grads] == [q.shape, q.shape, weight.shape, weight.shape]
    assert not grads[2].any()


@pytest.mark.parametrize(("interleaved", "dtype"), [(False, torch.bfloat16), (True, torch.float32)])
def test_in_place(dtype: torch.dtype, interleaved: bool) -> None:
    ops.test_in_place_gives_the_bits_of_out_of_place(dtype, interleaved, "triton")


def test_in_place_gradients() -> None:
    ops.test_in_place_gradients("triton")


def test_a_nan_stays_in_its_head() -> None:
    q, k, angle = random(3, 3, 8), random(3, 3, 8, seed=1), ops.angles(3, 3)
    q[1, 2, 0] = torch.nan
    weight = torch.ones(8)
    with mk.use_backend("triton"):
        plain = mk.rope(q, k, angle.cos(), angle.sin())
        normed = mk.rope(q, k, angle.cos(), angle.sin(), q_norm=weight, k_norm=weight)
    where = torch.isnan(plain[0]).nonzero()
    assert where.tolist() == [[1, 2, 0], [1, 2, 3]]
    assert torch.isnan(normed[0]).any(-1).nonzero().tolist() == [[1, 2]]
    assert not any(torch.isnan(k).any() for k in (plain[1], normed[1]))


def test_residuals_are_the_references() -> None:
    q, k, angle = random(5, 3, 8).bfloat16(), random(5, 1, 8, seed=1).bfloat16(), ops.angles(5, 3)
    weight = random(8, seed=2)
    call = torch.ops.megalite.rope_norm_fwd
    with mk.use_backend("triton"):
        ours = call(q, k, weight, weight, angle.cos(), angle.sin(), 1e-5, True)
    with mk.use_backend("reference"):
        theirs = call(q, k, weight, weight, angle.cos(), angle.sin(), 1e-5, True)
    for a, b in zip(ours, theirs, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
    torch.testing.assert_close(ours[2:], theirs[2:])


def test_the_sums_do_not_depend_on_the_run() -> None:
    def grads() -> tuple[Tensor, ...]:
        x, weight, angle = (
            random(9, 3, 8).requires_grad_(),
            random(8, seed=1).requires_grad_(),
            ops.angles(9, 4),
        )
        out = mk.rope(x, x * 2, angle.cos(), angle.sin(), q_norm=weight, k_norm=weight * 2)
        return torch.autograd.grad(out, [x, weight], [random(9, 3, 8, seed=2)] * 2)

    with mk.use_backend("triton"):
        assert all(torch.equal(a, b) for a, b in zip(grads(), grads(), strict=True))
