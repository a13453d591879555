"""Which `ModelState` a configuration asks for."""

from __future__ import annotations

import torch
from torch import nn

from megalite.config import ParallelConfig
from megalite.parallel.data import FlatBuffers
from megalite.parallel.fsdp import ShardedModules
from megalite.parallel.mesh import Mesh
from megalite.parallel.state import ModelState


def make_state(
    model: nn.Module, mesh: Mesh, dtype: torch.dtype, parallel: ParallelConfig, *, remainders: bool = True
) -> ModelState:
    """Take over a model's parameters.

    Args:
        model: parameters on `mesh.device`, filled, in fp32 or wider.
        mesh: the processes.
        dtype: compute type of the weights.
        parallel: `zero` decides: 0 and 1 flat buffers; 3 FSDP2, unless there is no rank to divide with.
        remainders: of flat buffers in bf16; FSDP2 divides fp32 weights, which are the masters.
    """
    if parallel.zero == 3 and mesh.shard.size > 1:
        return ShardedModules(model, mesh, dtype, parallel)
    return FlatBuffers(model, mesh, dtype, parallel, remainders=remainders)
