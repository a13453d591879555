"""Who is who: one explicit object carries this process's place on every parallel axis.

There is no module-level group anywhere: whoever needs a rank or a group is handed a `Mesh`. Today only the
data-parallel axis is longer than one; the others join as further `Axis` fields.
"""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megalite.config import ParallelConfig
from megalite.errors import UserError


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of the mesh as this process sees it."""

    size: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = None
    """None where the axis has a single process: collectives over it are no-ops."""


@dataclass(frozen=True, slots=True)
class Mesh:
    """This process, its device and its place on each axis."""

    device: torch.device
    dp: Axis = Axis()
    local_rank: int = 0
    local_size: int = 1

    @property
    def rank(self) -> int:
        """Global rank."""
        return self.dp.rank

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.dp.size

    @property
    def is_first(self) -> bool:
        """True on the process that prints and writes files."""
        return self.rank == 0


def launched_world_size() -> int:
    """Processes that torchrun (or a Slurm script that sets the same variables) started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def make_mesh(config: ParallelConfig, device: str = "auto") -> Mesh:
    """Join the processes that were launched together and return this one's place among them.

    Reads torchrun's RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE; without them the mesh has one process
    and ``torch.distributed`` is not touched.

    Args:
        config: back-end and timeout of the collectives.
        device: ``auto``, ``cpu`` or ``cuda``.

    Raises:
        UserError: ``cuda`` was asked for and this process has no GPU, or nccl without GPUs.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    chosen = _choose_device(device, local_rank)
    world_size = launched_world_size()
    if world_size == 1:
        return Mesh(device=chosen, local_rank=local_rank, local_size=local_size)
    backend = config.backend
    if backend == "auto":
        backend = "nccl" if chosen.type == "cuda" else "gloo"
    if backend == "nccl" and chosen.type != "cuda":
        raise UserError("parallel.backend='nccl' needs GPUs: use 'gloo' or train.device='cuda'")
    timeout = datetime.timedelta(seconds=config.timeout_s)
    dist.init_process_group(backend, timeout=timeout)
    group = dist.group.WORLD
    return Mesh(
        device=chosen,
        dp=Axis(size=world_size, rank=dist.get_rank(), group=group),
        local_rank=local_rank,
        local_size=local_size,
    )


def close_mesh(mesh: Mesh) -> None:
    """Leave the process group; all processes must call it."""
    if mesh.dp.group is not None:
        # Without the barrier, processes on gloo abort at exit now and then.
        dist.barrier(group=mesh.dp.group)
        dist.destroy_process_group()


def _choose_device(device: str, local_rank: int) -> torch.device:
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise UserError(
            f"train.device={device!r}: local rank {local_rank} has no GPU (this machine shows {count}); "
            "start at most one process per GPU or set train.device='cpu'"
        )
    chosen = torch.device("cuda", local_rank)
    torch.cuda.set_device(chosen)
    return chosen
