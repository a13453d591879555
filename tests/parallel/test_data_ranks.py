"""Flat buffers on several ranks, plain and ZeRO-1, against one process: loss, every gradient, the norm, weights."""

from __future__ import annotations

import pytest
import torch

from megalite.config import ParallelConfig
from megalite.parallel.data import FlatBuffers
from megalite.parallel.mesh import ALONE
from megalite_kernels.reference.adamw import split
from tests.parallel.states import (
    FOUR_IN_MATRIX,
    IN_TURN,
    STATE_MODELS,
    TOLERANCE,
    assert_same,
    check,
    compare,
    make_batches,
    one_process,
    put_together,
    steps_on_rank,
)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", STATE_MODELS)
@pytest.mark.parametrize("zero", [0, 1])
@pytest.mark.parametrize("ranks", FOUR_IN_MATRIX)
def test_data_parallel(rank_pool, ranks, zero, name, dtype):
    check(rank_pool, ranks, name, dtype, zero=zero, bucket_size=500 * ranks)


@pytest.mark.parametrize(("layout", "name"), IN_TURN)
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
        assert torch.equal(got.weights[name][place], split(part)[0]), name


def leave_out_one_reduction(state: FlatBuffers) -> None:
    reducer = state.reducer
    launch, axes = reducer._launch, (reducer.shard, reducer.replicate)

    def launch_all_but_one() -> None:
        reducer.shard, reducer.replicate = (ALONE, ALONE) if len(reducer._running) == 2 else axes
        launch()

    reducer._launch = launch_all_but_one  # type: ignore[method-assign]


def leave_out_one_gather(state: FlatBuffers) -> None:
    state.gatherer.buckets = state.gatherer.buckets[:-1]


def reduce_too_early(state: FlatBuffers) -> None:
    """As if the second step had half as many micro-batches."""
    start_step, counts = state.reducer.start_step, iter((2, 1))
    state.reducer.start_step = lambda _: start_step(next(counts))  # type: ignore[method-assign]


def count_every_element_twice(state: FlatBuffers) -> None:
    state.box_copies = lambda: [1] * len(state.boxes("master"))  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("change", "layout", "complaint"),
    [
        (leave_out_one_reduction, {}, "ranks differ|gradient of"),
        (leave_out_one_reduction, {"zero": 0}, "ranks differ"),
        (leave_out_one_gather, {}, "ranks differ|assert all"),
        (reduce_too_early, {}, "arrived after those of all 1 micro-batches that start_step was told of"),
        (count_every_element_twice, {"zero": 0}, "elements counted|norms|assert abs"),
    ],
)
def test_a_broken_state_is_caught(rank_pool, change, layout, complaint):
    batches, parallel = make_batches(4), ParallelConfig(bucket_size=800, **layout)

    def run_and_compare() -> None:
        job = (parallel, "llama", torch.float64, batches, 3, None, change)
        got = put_together(rank_pool(2).run(steps_on_rank, *job))
        assert_same(got, one_process("llama", torch.float64, batches), 1e-10)

    with pytest.raises(AssertionError, match=complaint):
        run_and_compare()
