"""The engine runs the passes of every schedule in the order of the table that the simulator reads."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch.distributed.pipelining import PipelineStage

from megalite.config import ParallelConfig
from megalite.parallel.action_table import ENGINE_NAMES, schedule_table
from tests.parallel.layouts import MODELS, packed_batch
from tests.parallel.replicas import make_replica

DEEP = dataclasses.replace(MODELS["llama"], num_layers=8)
KINDS = {"forward_one_chunk": "F", "backward_weight_one_chunk": "W"}


def order_job(schedule: Any, pp: int, micro_batches: int) -> list[str]:
    """What this rank's engine ran: ["0F0", ...]."""
    ran: list[str] = []

    def noting(name: str) -> Any:
        original = getattr(PipelineStage, name)

        def run(stage: Any, number: int, *args: Any, **kwargs: Any) -> Any:
            kind = KINDS.get(name, "B" if kwargs.get("full_backward", True) else "I")
            ran.append(f"{stage.stage_index}{kind}{number}")
            return original(stage, number, *args, **kwargs)

        return run

    batch = packed_batch()
    replica = make_replica(
        ParallelConfig(pp=pp, pp_schedule=schedule), DEEP, torch.float32, batch.tokens.numel()
    )
    with pytest.MonkeyPatch.context() as patch:
        for name in (*KINDS, "backward_one_chunk"):
            patch.setattr(PipelineStage, name, noting(name))
        replica.gradients([batch] * micro_batches, torch.ones(()))
    replica.state.release()
    return ran


@pytest.mark.parametrize("schedule", sorted(ENGINE_NAMES))
@pytest.mark.parametrize("pp", [2, 4])
def test_the_engine_follows_the_table(rank_pool: Any, schedule: Any, pp: int) -> None:
    answers = rank_pool(pp).run(order_job, schedule, pp, 2 * pp)
    table = schedule_table(schedule, pp, 1 if schedule in ("gpipe", "1f1b") else 2, 2 * pp)
    assert answers == [[str(op) for step in row for op in step] for row in table]
