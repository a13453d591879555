"""What a step launches on a GPU, counted at full size without memory or a GPU: on the meta device, where the code takes
the same way and any look at a value raises."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from megalite.config import ParallelConfig, RunConfig
from megalite.data.loader import MicroBatch
from megalite.models.presets import PRESETS
from megalite.optim.adamw import AdamW
from megalite.parallel.mesh import Mesh
from megalite.train.guard import StepGuard
from megalite.train.replica import build_replica
from megalite.train.step import StepInputs
from megalite.train.trainer import Trainer
from tests.helpers.graphs import Op, Recorder

TOKENS = 1024
META = torch.device("meta")


def meta_trainer() -> Trainer:
    config = RunConfig(model=dataclasses.replace(PRESETS["gpt2-124m"], vocab_size=50257))
    replica = build_replica(
        config.model,
        ParallelConfig(),
        Mesh(META),
        dtype=torch.bfloat16,
        micro_batch_tokens=TOKENS,
        fill=lambda model: None,
    )
    optimizer = AdamW(replica.state, config.optimizer)
    guard = StepGuard(META, sigma=6.0, skip_spikes=False)
    nothing: Any = dict.fromkeys(
        (
            "loader",
            "validation",
            "tokenizer",
            "metrics",
            "log",
            "tensorboard",
            "progress",
            "timer",
            "copies",
            "save",
        )
    )
    return Trainer(config=config, replica=replica, optimizer=optimizer, guard=guard, **nothing)


def meta_inputs(micro_batches: int) -> StepInputs:
    tokens = torch.empty(TOKENS, dtype=torch.int64, device=META)
    bounds = torch.empty(9, dtype=torch.int32, device=META)
    batch = MicroBatch(tokens, tokens, tokens, bounds, TOKENS, ())
    scalar = torch.empty((), device=META)
    return StepInputs([batch] * micro_batches, scalar, scalar.double())


@pytest.fixture(scope="module")
def phases() -> dict[str, list[Op]]:
    """The ops of a step of two micro-batches by phase; names that come back add up."""
    trainer = meta_trainer()
    trainer.compute(meta_inputs(2))
    found: dict[str, list[Op]] = {}
    with Recorder() as recorder:

        def mark(phase: str) -> None:
            found.setdefault(phase, []).extend(recorder.ops)
            recorder.ops.clear()

        trainer.compute(meta_inputs(2), mark)
    return found


def large(ops: list[Op]) -> list[str]:
    """Launches over a million elements or more."""
    return [op.name for op in ops if op.launches and any(_numel(x) > 1e6 for x in op.inputs)]


def _numel(value: Any) -> int:
    return value.numel() if isinstance(value, Tensor) else 0


def test_no_step_waits_for_the_device(phases: dict[str, list[Op]]) -> None:
    """On meta a value cannot be read, so that the step ran is half of it; nothing is copied from the host either."""
    every = [op for ops in phases.values() for op in ops]
    assert len(every) > 1000
    assert not [str(op) for op in every if op.synchronises]


def test_few_launches_touch_the_whole_state(phases: dict[str, list[Op]]) -> None:
    """196 tensors: one norm, an update for each rule of decay, and nothing else reads or clears all gradients."""
    assert large(phases["optimizer"]) == ["megalite::grad_norms", "megalite::adamw_remainder_"]
    updates = [op.args[0].numel() for op in phases["optimizer"] if op.name == "megalite::adamw_remainder_"]
    assert len(updates) == 2
    assert sum(updates) >= 124e6
    assert large(phases["communication"]) == []
    both = [op for op in phases["forward"] + phases["backward"] if op.launches]
    flat = [
        op
        for op in both
        if any(isinstance(x, Tensor) and x.dim() == 1 and x.numel() > 1e6 for x in op.inputs)
    ]
    assert not [op.name for op in flat]


def test_the_rest_of_the_optimizer_phase_is_scalars(phases: dict[str, list[Op]]) -> None:
    """Counting labels, report, norm of norms, judgement, clipping: small kernels, which a CUDA graph takes together."""
    big = ("megalite::adamw_remainder_", "megalite::grad_norms")
    both = phases["communication"] + phases["optimizer"]
    small = [op for op in both if op.launches and op.name not in big]
    assert len(small) <= 92, [op.name for op in small]
    assert max(_numel(x) for op in small for x in op.inputs) <= TOKENS
