"""Every layout gives the model that one process gives: initial bits, losses, gradients, norms and updated weights."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from megalite.config import ParallelConfig
from tests.parallel.layouts import packed_batch
from tests.parallel.matrix import (
    CASES,
    MODELS,
    PIPELINE,
    SCHEDULES,
    STEPS,
    Case,
    batches,
    fast,
    full,
    spread,
    truth,
)
from tests.parallel.training import (
    Training,
    assert_same_training,
    train_alone,
    train_layout,
    whole_training,
)

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
"""Of the largest gradient: rounding alone, in either type."""
FAST = list(fast())
SLOW = [pair for pair in full() if pair not in FAST]
SAME_ORDER = [
    pytest.param(case, marks=pytest.mark.slow if case.ranks > 2 else [])
    for case in PIPELINE
    if case.parallel.pp_schedule != "looped_bfs"
]


def train(rank_pool: Any, case: Case, name: str, dtype: torch.dtype) -> Training:
    config = replace(MODELS[name], num_layers=case.num_layers)
    arguments = (case.parallel, config, dtype, batches(case.num_batches), STEPS)
    if case.ranks == 1:
        return whole_training([train_layout(*arguments)])
    return whole_training(rank_pool(case.ranks).run(train_layout, *arguments))


def check(rank_pool: Any, case: Case, name: str) -> None:
    for dtype, tolerance in TOLERANCE.items():
        expected = truth(name, case.num_layers, case.num_batches, dtype)
        assert_same_training(train(rank_pool, case, name, dtype), expected, tolerance)


@pytest.mark.parametrize(("case", "name"), FAST, ids=str)
def test_layout(rank_pool: Any, case: Case, name: str) -> None:
    check(rank_pool, case, name)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "name"), SLOW, ids=str)
def test_layout_with_the_other_models(rank_pool: Any, case: Case, name: str) -> None:
    check(rank_pool, case, name)


def test_what_always_runs_covers_every_axis_with_two_models() -> None:
    models: dict[tuple[str, Any], set[str]] = defaultdict(set)
    for case, name in FAST:
        parallel = case.parallel
        for axis, value in {"tp": parallel.tp, "pp": parallel.pp, "cp": parallel.cp, "dp": case.dp}.items():
            models[axis, value].add(name)
        models["zero", parallel.zero].add(name)
        models["sp", parallel.tp > 1 and parallel.sequence_parallel].add(name)
        if parallel.pp > 1:
            models["schedule", parallel.pp_schedule].add(name)
        if parallel.cp > 1:
            models["cp_method", parallel.cp_method].add(name)
    wanted = [(axis, degree) for axis in ("tp", "pp", "cp", "dp") for degree in (1, 2, 4)]
    wanted += [("zero", level) for level in (0, 1, 3)] + [("sp", False), ("sp", True)]
    wanted += [("schedule", name) for name in SCHEDULES]
    wanted += [("cp_method", "ring"), ("cp_method", "ulysses")]
    assert [what for what in wanted if len(models[what]) < 2] == []
    assert {name for _, name in FAST} == set(MODELS)
    assert {case for case, _ in FAST} == set(CASES)


@pytest.mark.parametrize("case", SAME_ORDER, ids=str)
def test_a_pipeline_gives_the_bits_of_one_process(rank_pool: Any, case: Case) -> None:
    """In float64, since the order of the arithmetic is the same whatever the schedule.

    Not by looped_bfs, which goes backward through the micro-batches from the last to the first; not with tied
    weights, whose two uses add up in another order on two stages; and not in fp32, where the kernel of a norm adds
    the residual, which before a stage's first layer is added outside of it, rounding once more.
    """
    expected = alone("one-kv-head", case.num_layers, case.num_batches)
    got = train(rank_pool, case, "one-kv-head", torch.float64)
    assert got.losses == expected.losses
    assert got.scores is not None
    assert expected.scores is not None
    assert torch.equal(got.scores, expected.scores)
    assert different_bits(got, expected) == []


@cache
def alone(name: str, num_layers: int, num_batches: int) -> Training:
    """One process, with the same way of accumulating gradients."""
    config = replace(MODELS[name], num_layers=num_layers)
    job = (ParallelConfig(), config, torch.float64, batches(num_batches), STEPS)
    return whole_training([train_layout(*job)])


def test_who_holds_the_state_changes_no_bit(rank_pool: Any) -> None:
    """A sum of two ranks has one order, however it is divided. (ZeRO-3 sums over ranks in every micro-batch.)"""
    divided, whole = (train(rank_pool, spread(2, zero=zero), "gpt2", torch.float32) for zero in (1, 0))
    assert different_bits(whole, divided) == []


def different_bits(got: Training, expected: Training) -> list[str]:
    pairs = ((got.gradients, expected.gradients), (got.weights, expected.weights))
    return [name for a, b in pairs for name in b if not torch.equal(a[name], b[name])]


def test_the_comparison_notices_a_wrong_batch() -> None:
    """A micro-batch that is left out, or trained on twice, is far beyond any rounding."""
    config, own = MODELS["llama"], [packed_batch(seed=seed) for seed in range(2)]
    expected = train_alone(config, torch.float64, own, steps=STEPS)
    assert_same_training(expected, expected, 0.0)
    for wrong in (own[:1], [own[0], own[0]]):
        got = whole_training([train_layout(ParallelConfig(), config, torch.float64, wrong, STEPS)])
        with pytest.raises(AssertionError):
            assert_same_training(got, expected, TOLERANCE[torch.float32])
