"""Flat buffers on several ranks, plain and ZeRO-1, against one process: loss, every gradient, the norm, weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megalite.config import ParallelConfig
from tests.parallel.states import assert_same, compare, make_batches, one_process, put_together, steps_on_rank

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def check(rank_pool: Any, ranks: int, name: str, dtype: torch.dtype, **layout: Any) -> None:
    parallel = ParallelConfig(**layout)
    batches = make_batches(2 * parallel.dp_size(ranks))
    got = put_together(rank_pool(ranks).run(steps_on_rank, parallel, name, dtype, batches))
    assert_same(got, one_process(name, dtype, batches), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", ["llama", "qwen3-tied", "gpt2"])
@pytest.mark.parametrize("zero", [0, 1])
@pytest.mark.parametrize("ranks", [2, 4])
def test_data_parallel(rank_pool, ranks, zero, name, dtype):
    check(rank_pool, ranks, name, dtype, zero=zero, bucket_size=500 * ranks)


@pytest.mark.parametrize("name", ["llama", "qwen3-tied", "gpt2"])
@pytest.mark.parametrize(
    "layout",
    [
        {"dp_shard": 2},
        {"dp_shard": 1},
        {"tp": 2},
        {"tp": 2, "sequence_parallel": False},
        {"cp": 2},
        {"cp": 4},
    ],
    ids=str,
)
def test_with_other_axes(rank_pool, layout, name):
    """Four ranks; dp takes what is left."""
    check(rank_pool, 4, name, torch.float64, bucket_size=800, **layout)


def test_fewer_key_heads_than_ranks(rank_pool):
    """tp=4 and two slices of the state: each has some of the rows of the key head that all ranks share."""
    check(rank_pool, 8, "one-kv-head", torch.float64, tp=4, bucket_size=800)


def test_dividing_the_state_changes_no_bit(rank_pool):
    """Two ranks add two numbers: one order, so ZeRO-1 and plain data parallelism agree to the last bit.

    Not in the norm, whose squares are added box by box.
    """
    batches = make_batches(4)
    jobs = [ParallelConfig(zero=zero, bucket_size=800) for zero in (0, 1)]
    plain, divided = (
        put_together(rank_pool(2).run(steps_on_rank, job, "qwen3-tied", torch.float32, batches))
        for job in jobs
    )
    assert divided.losses == plain.losses
    for got, expected in zip(divided.gradients, plain.gradients, strict=True):
        compare(got, expected, 0.0, "gradient of")
    compare(divided.weights, plain.weights, 0.0, "weight")


def test_bf16_weights_are_the_rounded_masters_on_all_ranks(rank_pool):
    batches = make_batches(4)
    parallel = ParallelConfig(bucket_size=800)
    ranks = rank_pool(2).run(steps_on_rank, parallel, "llama", torch.float32, batches, 3, torch.bfloat16)
    got = put_together(ranks)
    masters = {}
    for rank in ranks:
        for piece, offset, part in rank.masters:
            masters[piece.name, offset] = part
    for (name, offset), part in masters.items():
        place = tuple(slice(o, o + n) for o, n in zip(offset, part.shape, strict=True))
        assert torch.equal(got.weights[name][place], part.bfloat16()), name
