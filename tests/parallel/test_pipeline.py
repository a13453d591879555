"""Forward passes through a pipeline: what validation and sampling use. Training steps are in test_matrix.py."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from megalite.config import ParallelConfig
from megalite.parallel import engine_stage
from megalite.parallel.engine_stage import LeanBuffers
from megalite.parallel.tensor import TensorSplit
from megalite.train.generate import generate
from tests.parallel.layouts import MODELS, build, packed_batch
from tests.parallel.replicas import make_replica

DEEP = dataclasses.replace(MODELS["gpt2"], num_layers=8)


def test_losses_and_logits_pass_through_the_stages(rank_pool: Any) -> None:
    """In a loop and in a V; the bits are those of one process."""
    for schedule in ("1f1b", "interleaved", "dualpipev"):
        layout = ParallelConfig(pp=2, pp_schedule=schedule)
        for same in rank_pool(2).run(forward_job, layout, DEEP, packed_batch()):
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


class Seen(LeanBuffers):
    """Notes the most receive buffers that a rank's stages hold at one time."""

    most = 0

    def _allocate(self, infos: Any) -> None:
        super()._allocate(infos)
        held = [*self.args_recv_info.values(), *self.grad_recv_info.values()]
        alive = sum(i.buffer is not None and not i.buffer.is_meta for infos in held for i in infos)
        Seen.most = max(Seen.most, alive)


def buffers_job(schedule: Any, batches: list[Any]) -> tuple[int, int]:
    """(most buffers at one time, buffers left after the step) of this rank."""
    engine_stage.LeanBuffers, Seen.most = Seen, 0  # type: ignore[misc]
    try:
        replica = make_replica(ParallelConfig(pp=2, pp_schedule=schedule), DEEP, torch.float32, 32)
        replica.gradients(batches, torch.ones(()))
    finally:
        engine_stage.LeanBuffers = LeanBuffers  # type: ignore[misc]
    assert replica.pipeline is not None
    (engine,) = replica.pipeline._engines.values()
    infos = [
        info
        for stage in engine.megalite_stages
        for held in (stage.args_recv_info, stage.grad_recv_info)
        for group in held.values()
        for info in group
    ]
    return Seen.most, sum(info.buffer is not None and not info.buffer.is_meta for info in infos)


def test_received_tensors_are_kept_no_longer_than_needed(rank_pool: Any) -> None:
    """The engine alone keeps one for each of the 16 micro-batches."""
    batches = [packed_batch(seed=seed) for seed in range(16)]
    for schedule in ("1f1b", "interleaved", "zbv"):
        for most, left in rank_pool(2).run(buffers_job, schedule, batches):
            assert most <= 4
            assert left == 0
