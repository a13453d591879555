"""Forward passes through a pipeline: what validation and sampling use. Training steps are in test_matrix.py."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from megalite.config import ParallelConfig
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
