"""Stages of a pipeline: as even as any cut can be, deterministic, on the right ranks."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalite.config import ModelConfig, ParallelConfig
from megalite.errors import UserError
from megalite.models.presets import preset
from megalite.parallel.stages import StageCosts, StagePlan, balance, plan_stages, stage_costs
from megalite.train.flops import flops_per_token

LLAMA_70B = preset("llama3-70b")
SMALL = ModelConfig(vocab_size=301, num_layers=7, hidden_size=32, ffn_hidden_size=48)


def pipeline(pp: int, schedule: str = "1f1b", stages: int = 0) -> ParallelConfig:
    return ParallelConfig(pp=pp, pp_schedule=schedule, pp_stages=stages)  # type: ignore[arg-type]


def best_by_trying_all(costs: StageCosts, stages: int) -> tuple[range, ...]:
    """What `balance` promises, by comparing every cut."""
    count = len(costs.layers)

    def worth(cut: tuple[int, ...]) -> tuple[int, int, list[int]]:
        ranges = [range(a, b) for a, b in itertools.pairwise(cut)]
        loads = [costs.of(r, first=r.start == 0, last=r.stop == count) for r in ranges]
        return max(loads), sum(load * load for load in loads), [len(r) for r in ranges]

    cuts = [(0, *inner, count) for inner in itertools.combinations(range(1, count), stages - 1)]
    return tuple(range(a, b) for a, b in itertools.pairwise(min(cuts, key=worth)))


@settings(deadline=None)  # a shared machine is slow now and then
@given(
    layers=st.lists(st.integers(1, 9), min_size=1, max_size=9),
    stages=st.integers(1, 9),
    embedding=st.integers(0, 30),
    head=st.integers(0, 30),
)
def test_no_other_cut_is_better(layers: list[int], stages: int, embedding: int, head: int) -> None:
    costs = StageCosts(tuple(layers), embedding, head)
    if stages > len(layers):
        with pytest.raises(ValueError, match=f"{len(layers)} layers cannot be cut into {stages} stages"):
            balance(costs, stages)
    else:
        assert balance(costs, stages) == best_by_trying_all(costs, stages)


def test_costs_are_the_flops_of_the_model() -> None:
    for model in (SMALL, LLAMA_70B, preset("gpt2-1.5b")):
        costs = stage_costs(model, 2048)
        assert sum(costs.layers) + costs.head == flops_per_token(model, 2048).causal
    windowed = dataclasses.replace(SMALL, sliding_window=16, sliding_window_start_layer=3)
    assert sum(stage_costs(windowed, 64).layers) + stage_costs(windowed, 64).head == (
        flops_per_token(windowed, 64).causal
    )


def test_a_large_vocabulary_takes_layers_off_the_last_stage() -> None:
    """Llama 3 70B's head costs 1.2 layers, the 8B's 2.2: it weighs as much as those it displaces."""
    for name, pp, fewest, most in (("llama3-70b", 8, 1.0, 1.5), ("llama3-8b", 4, 2.0, 2.5)):
        model = preset(name)
        costs = stage_costs(model, 8192)
        assert fewest < costs.head / costs.layers[0] < most
        assert costs.embedding < 0.05 * costs.layers[0]
        plan = plan_stages(model, pipeline(pp), 8192)
        lengths = [len(part) for part in plan.layers]
        assert lengths[-1] == min(lengths) < model.num_layers / pp
        even = model.num_layers // pp * costs.layers[0] + costs.head
        assert max(plan.costs(costs)) <= even


def test_uneven_layers_are_welcome_and_early_stages_the_shorter_ones() -> None:
    plan = plan_stages(dataclasses.replace(SMALL, vocab_size=1), pipeline(4), 64)
    assert [len(part) for part in plan.layers] == [1, 2, 2, 2]
    assert [i for part in plan.layers for i in part] == list(range(7))


def test_one_stage_holds_everything() -> None:
    assert plan_stages(SMALL, ParallelConfig(), 64) == StagePlan((range(7),), 1, v_shaped=False)
    one_rank = ParallelConfig(pp=1, pp_schedule="zbv")
    assert plan_stages(SMALL, one_rank, 64) == StagePlan((range(7),), 1, v_shaped=False)


def test_places_of_the_stages() -> None:
    loop = plan_stages(SMALL, pipeline(2, "interleaved", 3), 64)
    assert (loop.num_stages, loop.stages_of(0), loop.stages_of(1)) == (6, (0, 2, 4), (1, 3, 5))
    v = plan_stages(SMALL, pipeline(3, "zbv"), 64)
    assert [v.stages_of(rank) for rank in range(3)] == [(0, 5), (1, 4), (2, 3)]
    for plan in (loop, v):
        assert all(stage in plan.stages_of(plan.rank_of(stage)) for stage in range(plan.num_stages))
        with pytest.raises(ValueError, match="none of the 6 stages"):
            plan.rank_of(6)
        with pytest.raises(ValueError, match="none of the"):
            plan.stages_of(plan.pp)


def test_what_cannot_be_cut_is_said() -> None:
    with pytest.raises(UserError, match=r"4 · 2 stages each = 8 must be at most model\.num_layers=7"):
        plan_stages(SMALL, pipeline(4, "interleaved"), 64)
    with pytest.raises(UserError, match=r"vocab_size=0 must be known"):
        plan_stages(dataclasses.replace(SMALL, vocab_size=0), pipeline(2), 64)
