"""Which layouts are compared, how they are called, and how the run's own is brought down to a few processes."""

from __future__ import annotations

from typing import get_args

import pytest

from megalite.config import ParallelConfig, RecomputeConfig, RunConfig
from megalite.config_parallel import Schedule
from megalite.errors import UserError
from megalite.models.presets import PRESETS
from megalite.train.verify_layouts import all_layouts, choose, name_of, own_layout, reason_against


@pytest.mark.parametrize("processes", [2, 3, 4, 8])
def test_layouts_are_unique_and_fit(processes: int) -> None:
    layouts = all_layouts(processes)
    assert len({layout.name for layout in layouts}) == len(layouts)
    for layout in layouts:
        assert 2 <= layout.world <= processes
        assert layout.dp * layout.parallel.tp * layout.parallel.cp * layout.parallel.pp == layout.world
        layout.parallel.validate_microbatches(layout.micro_batches // layout.dp)
        assert layout.micro_batches // layout.dp >= 2


def test_every_axis_in_every_way() -> None:
    names = {layout.name for layout in all_layouts(8)}
    for tp in (2, 4, 8):
        assert {f"tp{tp}", f"tp{tp}-sp", f"tp{tp}-sp-chunks2", f"cp{tp}-ring", f"cp{tp}-ulysses"} <= names
        assert {f"dp{tp}-zero{zero}" for zero in (0, 1, 3)} <= names
    assert {f"pp{pp}-{schedule}" for pp in (2, 4) for schedule in get_args(Schedule)} <= names
    assert {"dp4-zero1-shard2", "dp4-zero3-shard2", "dp2-zero1-bf16sum"} <= names
    assert {f"tp2-sp-recompute-{kind}" for kind in ("selective", "full", "budget")} <= names
    mixed = [layout for layout in all_layouts(8) if layout.group == "mixed"]
    assert sum(layout.world == 4 for layout in mixed) >= 6
    assert sum(layout.world == 8 for layout in mixed) >= 6


def test_names_say_what_differs_from_one_process() -> None:
    assert name_of(ParallelConfig(tp=2, pp=2, pp_schedule="zbv"), 8) == "tp2-sp-pp2-zbv-dp2-zero1"
    assert name_of(ParallelConfig(), 1) == "one"
    recompute = RecomputeConfig(kind="full")
    assert name_of(ParallelConfig(cp=2, zero=3), 2, recompute) == "cp2-ring-zero3-recompute-full"


@pytest.mark.parametrize(
    ("parallel", "processes", "name"),
    [
        (ParallelConfig(tp=8, pp=8, pp_schedule="interleaved"), 4, "tp2-sp-pp2-interleaved"),
        (ParallelConfig(tp=8, pp=2), 8, "tp4-sp-pp2-1f1b"),
        (ParallelConfig(tp=2), 4, "tp2-sp-dp2-zero1"),
        (ParallelConfig(tp=3, zero=0), 4, "tp3-sp"),
        (ParallelConfig(tp=7, cp=2), 4, "cp2-ring-dp2-zero1"),
        (ParallelConfig(zero=3, dp_shard=8), 4, "dp4-zero3-shard2"),
    ],
)
def test_the_runs_own_layout_is_lowered(parallel: ParallelConfig, processes: int, name: str) -> None:
    own = own_layout(RunConfig(parallel=parallel), processes)
    assert own is not None
    assert own.name == f"own: {name}"
    assert own.group == "own"
    assert own.world <= processes


def test_the_runs_own_recompute_is_kept() -> None:
    config = RunConfig(
        recompute=RecomputeConfig(kind="budget", budget_gb=40.0), parallel=ParallelConfig(tp=2)
    )
    own = own_layout(config, 2)
    assert own is not None
    assert own.recompute.kind == "budget"
    assert own.recompute.budget_gb < 0.01  # of a model so small that 40 GB would recompute nothing
    assert own_layout(RunConfig(), 1) is None


def test_choosing() -> None:
    layouts = all_layouts(4)
    assert choose(layouts, "") == layouts
    assert {layout.group for layout in choose(layouts, "tp, cp")} == {"tp", "cp"}
    assert [layout.name for layout in choose(layouts, "pp4-zbv,dp2-zero1")] == ["pp4-zbv", "dp2-zero1"]
    assert {layout.name for layout in choose(layouts, "tp4*")} == {"tp4", "tp4-sp", "tp4-sp-chunks2"}
    with pytest.raises(UserError, match=r"--layouts 'tp9' matches none of the .* layouts: give kinds"):
        choose(layouts, "tp2,tp9")


def test_what_a_model_cannot_take_has_the_configurations_reason() -> None:
    by_name = {layout.name: layout for layout in all_layouts(8)}
    model = PRESETS["qwen2.5-0.5b"]
    assert not reason_against(by_name["tp2"], model)
    assert "parallel.tp=4 must divide model.num_attention_heads=14" in reason_against(by_name["tp4"], model)
    assert "parallel.cp=4 must divide the key/value heads" in reason_against(by_name["cp4-ulysses"], model)
    assert "a stage needs a layer" in reason_against(by_name["pp4-zbv"], PRESETS["tiny"])
