"""Replicas with the same initial weights in any layout, and tensors put together from what each rank holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megalite.config import ModelConfig, ParallelConfig
from megalite.parallel.mesh import Mesh, mesh_of_group
from megalite.parallel.random import initialize
from megalite.train.replica import Replica, build_replica


@dataclass
class Part:
    """One block of a tensor, as plain values that travel between processes."""

    name: str
    shape: tuple[int, ...]
    index: tuple[slice, ...]
    value: Tensor


def parts_of(replica: Replica, kind: Any) -> list[Part]:
    """The blocks this rank updates, copied."""
    return [
        Part(box.piece.name, box.piece.global_shape, box.index, box.tensor.detach().clone())
        for box in replica.state.boxes(kind)
    ]


def make_replica(
    layout: ParallelConfig, config: ModelConfig, dtype: torch.dtype, tokens: int, **more: Any
) -> Replica:
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
        **more,
    )


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
