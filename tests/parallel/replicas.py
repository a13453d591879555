"""A layout run through `Replica`, as the trainer runs it: outcome and parameters after SGD steps, on each rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megalite.config import ModelConfig, ParallelConfig
from megalite.data.loader import MicroBatch
from megalite.parallel.collectives import all_reduce_sum
from megalite.parallel.mesh import Mesh, mesh_of_group
from megalite.parallel.random import initialize
from megalite.train.replica import Replica, build_replica
from tests.parallel.layouts import Outcome, assert_equal


@dataclass
class Part:
    """One block of a tensor, as plain values that travel between processes."""

    name: str
    shape: tuple[int, ...]
    index: tuple[slice, ...]
    value: Tensor


@dataclass
class RankOutcome:
    """What one rank has to show after a step."""

    loss: float
    norm: float
    gradients: list[Part]
    weights: list[Part]


def parts_of(replica: Replica, kind: Any) -> list[Part]:
    """The blocks this rank updates, copied."""
    return [
        Part(box.piece.name, box.piece.global_shape, box.index, box.tensor.detach().clone())
        for box in replica.state.boxes(kind)
    ]


def make_replica(layout: ParallelConfig, config: ModelConfig, dtype: torch.dtype, tokens: int) -> Replica:
    """The replica of this process in the default group, with the same initial weights as `layouts.build`.

    In a process that is in no group, a replica of one process.
    """
    cpu = torch.device("cpu")
    mesh = mesh_of_group(layout, cpu) if dist.is_initialized() else Mesh(cpu)
    return build_replica(
        config,
        layout,
        mesh,
        dtype=dtype,
        micro_batch_tokens=tokens,
        fill=lambda model: initialize(model, seed=3),
    )


def run_layout(
    layout: ParallelConfig,
    config: ModelConfig,
    dtype: torch.dtype,
    batches: list[MicroBatch],
    *,
    steps: int = 1,
    learning_rate: float = 0.1,
) -> RankOutcome:
    """Steps of plain SGD over all batches (divided over dp in turn); loss, norm and gradients are the first step's."""
    replica = make_replica(layout, config, dtype, batches[0].tokens.numel())
    mesh = replica.mesh
    one = torch.ones((), dtype=torch.promote_types(dtype, torch.float32))
    first: RankOutcome | None = None
    for _ in range(steps):
        own = batches[mesh.dp.rank :: mesh.dp.size]
        total = replica.gradients(own, one)
        replica.state.finish_gradients()
        if mesh.tp.rank:
            total.zero_()  # tensor-parallel ranks score the same labels
        all_reduce_sum(total, mesh.world)
        norm, _ = replica.grad_norm()
        if first is None:
            first = RankOutcome(float(total), float(norm), parts_of(replica, "main_grad"), [])
        with torch.no_grad():
            for shard in replica.state.optimizer_shards():
                shard.master.sub_(shard.main_grad, alpha=learning_rate)
        replica.state.copy_master_to_weights()
    assert first is not None
    first.weights = parts_of(replica, "master")
    replica.state.release()
    return first


def assert_equals(answers: list[RankOutcome], truth: Outcome, tolerance: float) -> None:
    """All ranks agree with each other, and put together with one process."""
    outcomes = {(answer.loss, answer.norm) for answer in answers}
    assert len(outcomes) == 1, f"ranks differ in the loss or the norm: {outcomes}"
    gradients = put_parts_together([part for answer in answers for part in answer.gradients])
    assert_equal(Outcome(answers[0].loss, answers[0].norm, gradients), truth, tolerance)


def put_parts_together(parts: list[Part]) -> dict[str, Tensor]:
    """Whole tensors; blocks that several ranks hold must be the same on all of them, and none may be missing."""
    wholes: dict[str, Tensor] = {}
    for part in parts:
        if part.name not in wholes:
            wholes[part.name] = torch.full(part.shape, torch.nan, dtype=part.value.dtype)
        seen = wholes[part.name][part.index]
        same = torch.isnan(seen) | (seen == part.value)
        assert same.all(), f"ranks differ in {part.name}"
        wholes[part.name][part.index] = part.value
    for name, whole in wholes.items():
        assert not torch.isnan(whole).any(), f"no rank holds all of {name}"
    return wholes
