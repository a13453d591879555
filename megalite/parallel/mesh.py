"""Who is who: one explicit object carries this process's place on every parallel axis.

There is no module-level group anywhere: whoever needs a rank or a group is handed a `Mesh`, or the one `Axis`
that concerns it. Ranks are laid out with tp innermost, then cp, dp and pp, so that the ranks that talk most
(tp, at every layer) are neighbours on one machine and those that talk least (pp) may be far apart.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megalite.config import ParallelConfig
from megalite.errors import UserError
from megalite.parallel.calls import CallRecord
from megalite.parallel.failure import Watch
from megalite.parallel.rendezvous import agree_on_name, open_store

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
"""Outermost first: rank = ((pp * dp_size + dp) * cp_size + cp) * tp_size + tp, where dp counts shards of a replica
before replicas."""


HOST_TIMEOUT = datetime.timedelta(hours=1)
"""A slow disk is no failure, and a rank that died is noticed by the training thread's own collectives."""


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of the mesh as this process sees it."""

    size: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = None
    """None where the axis has a single process: collectives over it are no-ops."""
    name: str = field(default="a group", compare=False)
    calls: CallRecord | None = field(default=None, compare=False, repr=False)

    def note(self, kind: str) -> None:
        """Record that a collective over this axis is about to start, for the message if it never ends."""
        if self.calls is not None:
            self.calls.enter(kind, self.name)

    def shard(self, total: int) -> slice:
        """This rank's part of `total` rows, which the axis divides evenly."""
        assert total % self.size == 0, f"{total} rows over {self.size} ranks"
        size = total // self.size
        return slice(self.rank * size, (self.rank + 1) * size)


ALONE = Axis()
"""An axis of one process."""


@dataclass(frozen=True, slots=True)
class Mesh:
    """This process, its device and its place on each axis."""

    device: torch.device
    tp: Axis = ALONE
    """Ranks that hold shards of the same layers and see the same tokens."""
    cp: Axis = ALONE
    """Ranks that hold parts of the same sequences."""
    dp: Axis = ALONE
    """Ranks that see different samples."""
    pp: Axis = ALONE
    """Ranks that hold different layers."""
    data: Axis = ALONE
    """dp and cp together: ranks with the same weights and different tokens; gradients are summed over them."""
    shard: Axis = ALONE
    """The part of `data` that divides optimizer state between its ranks (all of it by default)."""
    replicate: Axis = ALONE
    """The rest of `data`: ranks that hold the same part of the state."""
    model: Axis = ALONE
    """pp and tp together: ranks that between them hold each weight."""
    tied: Axis = ALONE
    """First and last stage of a pipeline, which both hold a tied embedding; one process elsewhere."""
    world: Axis = ALONE
    """All ranks."""
    local_rank: int = 0
    local_size: int = 1
    calls: CallRecord = field(default_factory=CallRecord, compare=False, repr=False)
    """The last collective over any of the axes."""
    watch: Watch | None = field(default=None, compare=False, repr=False)
    """Notices when another rank is gone; there in runs of several launched processes."""

    @property
    def rank(self) -> int:
        """Global rank."""
        return self.world.rank

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.world.size

    @property
    def is_first(self) -> bool:
        """True on the process that prints and writes files."""
        return self.rank == 0


def launched_world_size() -> int:
    """Processes that torchrun (or a Slurm script that sets the same variables) started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def make_mesh(config: ParallelConfig, device: str = "auto") -> Mesh:
    """Join the processes that were launched together and return this one's place among them.

    Reads torchrun's RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT; without them the
    mesh has one process and ``torch.distributed`` is not touched. With them the mesh has a `Watch`, which ends this
    process when another is lost: put `megalite.parallel.failure.ends_together` around what follows, and leave by
    `close_mesh`.

    Args:
        config: degrees of the axes, back-end and timeout of the collectives.
        device: ``auto``, ``cpu`` or ``cuda``.

    Raises:
        UserError: ``cuda`` was asked for and this process has no GPU, nccl without GPUs, or the number of
            processes does not fit the degrees; a launcher's variable is missing, or ranks do not come within
            `timeout_s`.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    world_size = launched_world_size()
    config.dp_size(world_size)  # a wrong number of processes is said before anybody waits for another
    chosen = _choose_device(device, local_rank)
    if world_size == 1:
        return Mesh(device=chosen, local_rank=local_rank, local_size=local_size)
    backend = config.backend
    if backend == "auto":
        backend = "nccl" if chosen.type == "cuda" else "gloo"
    if backend == "nccl" and chosen.type != "cuda":
        raise UserError("parallel.backend='nccl' needs GPUs: use 'gloo' or train.device='cuda'")
    rank, store = int(os.environ.get("RANK", "0")), open_store(config.timeout_s)
    name = agree_on_name(store, rank, world_size, config.timeout_s)
    dist.init_process_group(
        backend,
        store=PrefixStore(f"{name}/group", store),
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=config.timeout_s),
    )
    mesh = mesh_of_group(config, chosen, local_rank=local_rank, local_size=local_size)
    signs = PrefixStore(f"{name}/watch", open_store(config.timeout_s))
    watch = Watch(signs, rank, world_size, mesh.calls, config.timeout_s)
    return dataclasses.replace(mesh, watch=watch)


def mesh_of_group(
    config: ParallelConfig, device: torch.device, *, local_rank: int = 0, local_size: int = 1
) -> Mesh:
    """The mesh over the processes of the default group, which is there already; all of them must call this."""
    world_size = dist.get_world_size()
    dp = config.dp_size(world_size)
    shard = config.dp_shard or dp
    sizes = {
        "pp": config.pp,
        "dp_replicate": dp // shard,
        "dp_shard": shard,
        "cp": config.cp,
        "tp": config.tp,
    }
    devices = init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=AXES)

    def axis(*names: str) -> Axis:
        return _joined(devices, sizes, names)

    mesh = Mesh(
        device=device,
        tp=axis("tp"),
        cp=axis("cp"),
        dp=axis("dp_replicate", "dp_shard"),
        pp=axis("pp"),
        data=axis("dp_replicate", "dp_shard", "cp"),
        shard=axis("dp_shard", "cp"),
        replicate=axis("dp_replicate"),
        model=axis("pp", "tp"),
        tied=_ends_of(devices, config.pp),
        world=Axis(world_size, dist.get_rank(), dist.group.WORLD if world_size > 1 else None),
        local_rank=local_rank,
        local_size=local_size,
    )
    return _recorded(mesh)


def _recorded(mesh: Mesh) -> Mesh:
    """The mesh with every axis named and writing to the mesh's record of collectives."""
    axes: dict[str, Any] = {
        f.name: dataclasses.replace(axis, name=f.name, calls=mesh.calls)
        for f in dataclasses.fields(mesh)
        if isinstance(axis := getattr(mesh, f.name), Axis) and axis.group is not None
    }
    return dataclasses.replace(mesh, **axes)


def _joined(devices: DeviceMesh, sizes: dict[str, int], names: tuple[str, ...]) -> Axis:
    """Several axes as one, the last the innermost; those of one process are left out."""
    long = [name for name in names if sizes[name] > 1]
    if not long:
        return ALONE
    if len(long) == 1:
        axis = devices[long[0]]
        return Axis(axis.size(), axis.get_local_rank(), axis.get_group())
    dims = [AXES.index(name) for name in long]
    ranks = devices.mesh.movedim(dims, list(range(-len(dims), 0))).flatten(-len(dims))
    return _own_group(ranks.flatten(0, -2).tolist(), devices.get_rank())


def _ends_of(devices: DeviceMesh, pp: int) -> Axis:
    """The first and the last rank of the pipeline that this process is in."""
    if pp == 1:
        return ALONE
    pipelines = devices.mesh.flatten(1).t()
    return _own_group([[line[0], line[-1]] for line in pipelines.tolist()], devices.get_rank())


def _own_group(groups: list[list[int]], rank: int) -> Axis:
    """The one of several groups that a rank is in. Every process makes every group, in the same order."""
    found = ALONE
    for members in groups:
        group = dist.new_group(members)
        if rank in members:
            found = Axis(len(members), members.index(rank), group)
    return found


def host_axis(mesh: Mesh) -> Axis:
    """All ranks once more, on gloo: a group for host data that no other thread uses. All processes must call it.

    The thread that writes checkpoints talks over it while the training thread uses the mesh's own groups.
    """
    if mesh.world.group is None:
        return ALONE
    group = dist.new_group(backend="gloo", timeout=HOST_TIMEOUT)
    return Axis(mesh.world.size, mesh.world.rank, group, name="host")


def close_mesh(mesh: Mesh) -> None:
    """Leave the process group; all processes must call it."""
    if mesh.watch is not None:
        mesh.watch.stop()  # before the barrier: after it, others may be gone for good reason
    if mesh.world.group is not None:
        # Without the barrier, processes on gloo abort at exit now and then.
        dist.barrier(group=mesh.world.group)
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
