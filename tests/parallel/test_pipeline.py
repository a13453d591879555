"""Every pipeline schedule against one process: loss, every gradient, the norm, the weights after steps."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from megalite.config import ParallelConfig
from megalite.parallel.action_table import ENGINE_NAMES
from megalite.parallel.tensor import TensorSplit
from megalite.train.generate import generate
from tests.parallel.layouts import MODELS, build, one_process, packed_batch
from tests.parallel.replicas import assert_equals, make_replica, run_layout

DEEP = {name: dataclasses.replace(config, num_layers=8) for name, config in MODELS.items()}
BATCHES = [packed_batch(seed=seed) for seed in range(8)]


@pytest.mark.parametrize("name", ["llama", "qwen3-tied", "gpt2"])
@pytest.mark.parametrize("schedule", ENGINE_NAMES)
@pytest.mark.parametrize("pp", [2, 4])
def test_every_schedule_equals_one_process(rank_pool: Any, pp: int, schedule: Any, name: str) -> None:
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        truth = one_process(DEEP[name], dtype, BATCHES)
        layout = ParallelConfig(pp=pp, pp_schedule=schedule, bucket_size=3000)
        answers = rank_pool(pp).run(run_layout, layout, DEEP[name], dtype, BATCHES)
        assert_equals(answers, truth, tolerance)


@pytest.mark.parametrize(
    "layout",
    [
        {"pp": 2, "tp": 2},
        {"pp": 4, "tp": 2, "pp_schedule": "interleaved"},
        {"pp": 2, "cp": 2, "pp_schedule": "zbv"},
        {"pp": 2, "tp": 2, "cp": 2, "pp_schedule": "interleaved_zero_bubble", "sequence_parallel": False},
    ],
)
def test_with_other_axes(rank_pool: Any, layout: dict[str, Any]) -> None:
    truth = one_process(DEEP["qwen3-tied"], torch.float64, BATCHES)
    answers = rank_pool(8).run(
        run_layout, ParallelConfig(**layout), DEEP["qwen3-tied"], torch.float64, BATCHES
    )
    assert_equals(answers, truth, 1e-10)


def test_losses_and_logits_pass_through_the_stages(rank_pool: Any) -> None:
    """What validation and sampling use, in a loop and in a V."""
    for schedule in ("1f1b", "interleaved", "dualpipev"):
        layout = ParallelConfig(pp=2, pp_schedule=schedule)
        for same in rank_pool(2).run(forward_job, layout, DEEP["gpt2"], BATCHES[0]):
            assert same


def forward_job(layout: ParallelConfig, config: Any, batch: Any) -> bool:
    replica = make_replica(layout, config, torch.float32, batch.tokens.numel())
    whole = build(config, TensorSplit(), torch.float32)
    with torch.no_grad():
        expected = whole.token_losses(
            batch.tokens,
            batch.labels,
            positions=batch.positions,
            cu_seqlens=batch.cu_seqlens,
            max_seqlen=batch.max_seqlen,
        )
        losses = replica.token_losses(batch)
    options: dict[str, Any] = {"max_new_tokens": 6, "temperature": 0.8, "seed": 5}
    texts = [generate(model, [1, 2, 3], **options) for model in (replica, whole)]
    return torch.equal(losses, expected) and texts[0] == texts[1]
