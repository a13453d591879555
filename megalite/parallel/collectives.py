"""The only file that calls collectives. Each takes an `Axis`; on an axis of one process it does nothing.

Plain ones act on tensors without a graph. Those that autograd knows do the conjugate to gradients: a sum hands its
gradient to every rank, a reduce-scatter gathers it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megalite.parallel.mesh import Axis

Work = dist.Work | None
"""What to wait for; None if there is nothing."""

# torch 2.13 renames these two and warns about the old names; 2.11 has only those.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_reduce_sum(tensor: Tensor, axis: Axis) -> Tensor:
    """Sum `tensor` over the axis, in place; returns it."""
    if axis.group is not None:
        axis.note("all_reduce")
        dist.all_reduce(tensor, group=axis.group)
    return tensor


def all_reduce_max(tensor: Tensor, axis: Axis) -> Tensor:
    """Maximum of `tensor` over the axis, in place; returns it."""
    if axis.group is not None:
        axis.note("all_reduce")
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=axis.group)
    return tensor


def start_all_reduce(tensor: Tensor, axis: Axis) -> Work:
    """As `all_reduce_sum`, not waited for."""
    if axis.group is None:
        return None
    axis.note("all_reduce")
    return dist.all_reduce(tensor, group=axis.group, async_op=True)


def start_all_gather(shard: Tensor, axis: Axis) -> tuple[Tensor, Work]:
    """Shards [T / n, ...] of all ranks as [T, ...], not waited for. A single rank gets its own tensor back."""
    if axis.group is None:
        return shard, None
    shard = shard.contiguous()
    whole = shard.new_empty((axis.size * shard.shape[0], *shard.shape[1:]))
    axis.note("all_gather")
    return whole, _all_gather(whole, shard, group=axis.group, async_op=True)


def start_reduce_scatter(whole: Tensor, axis: Axis, out: Tensor | None = None) -> tuple[Tensor, Work]:
    """This rank's rows [T / n, ...] of the sum of all ranks' [T, ...], into `out` if given, not waited for."""
    if axis.group is None:
        return whole, None
    assert whole.shape[0] % axis.size == 0, f"{whole.shape[0]} rows over {axis.size} ranks"
    shard = whole.new_empty((whole.shape[0] // axis.size, *whole.shape[1:])) if out is None else out
    axis.note("reduce_scatter")
    return shard, _reduce_scatter(shard, whole.contiguous(), group=axis.group, async_op=True)


def start_all_gather_into(whole: Tensor, shard: Tensor, axis: Axis) -> Work:
    """Fill `whole` [n · s] with the shards [s] of all ranks, not waited for; `shard` may be this rank's part of it."""
    if axis.group is None:
        return None
    axis.note("all_gather")
    return _all_gather(whole, shard, group=axis.group, async_op=True)


def start_reduce_scatter_into(shard: Tensor, whole: Tensor, axis: Axis) -> Work:
    """Fill `shard` [s] with this rank's part of the sum of all ranks' `whole` [n · s], not waited for.

    `shard` may be that part of `whole` itself. On an axis of one process it must be: nothing is copied.
    """
    if axis.group is None:
        return None
    axis.note("reduce_scatter")
    return _reduce_scatter(shard, whole, group=axis.group, async_op=True)


def wait(work: Work) -> None:
    """Until a started collective is done."""
    if work is not None:
        work.wait()


def all_gather(shard: Tensor, axis: Axis) -> Tensor:
    """Shards [T / n, ...] of all ranks, in rank order, as [T, ...]."""
    whole, work = start_all_gather(shard, axis)
    wait(work)
    return whole


def reduce_scatter(whole: Tensor, axis: Axis) -> Tensor:
    """This rank's rows [T / n, ...] of the sum of all ranks' [T, ...]."""
    shard, work = start_reduce_scatter(whole, axis)
    wait(work)
    return shard


def start_ring_shift(tensor: Tensor, axis: Axis) -> tuple[Tensor, list[dist.Work]]:
    """Send to the next rank and receive from the one before, not waited for: (received, what to wait for)."""
    received = torch.empty_like(tensor)
    axis.note("ring_shift")
    after, before = (axis.rank + 1) % axis.size, (axis.rank - 1) % axis.size
    return received, dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, tensor, group=axis.group, group_peer=after),
            dist.P2POp(dist.irecv, received, group=axis.group, group_peer=before),
        ]
    )


def all_to_all(x: Tensor, axis: Axis) -> Tensor:
    """Rank i's block j goes to rank j as its block i; x [n, ...] is contiguous, one block for each rank."""
    if axis.group is None:
        return x
    received = torch.empty_like(x)
    axis.note("all_to_all")
    dist.all_to_all_single(received, x, group=axis.group)
    return received


def send(tensor: Tensor, axis: Axis, rank: int) -> None:
    """Give a contiguous tensor to one rank of the axis, which calls `receive`."""
    axis.note("send")
    dist.send(tensor, group=axis.group, group_dst=rank)


def receive(buffer: Tensor, axis: Axis, rank: int) -> Tensor:
    """Overwrite `buffer` with what one rank of the axis sends; returns it."""
    axis.note("receive")
    dist.recv(buffer, group=axis.group, group_src=rank)
    return buffer


def start_all_to_all(x: Tensor, axis: Axis) -> tuple[Tensor, Work]:
    """As `all_to_all` with x [n · s] in n equal blocks, not waited for: (received, what to wait for)."""
    if axis.group is None:
        return x, None
    received = torch.empty_like(x)
    axis.note("all_to_all")
    return received, dist.all_to_all_single(received, x, group=axis.group, async_op=True)


def broadcast(tensor: Tensor, axis: Axis, source: int = 0) -> Tensor:
    """Overwrite `tensor` with that of rank `source` of the axis; returns it."""
    if axis.group is not None:
        axis.note("broadcast")
        dist.broadcast(tensor, group_src=source, group=axis.group)
    return tensor


def broadcast_object(value: Any, axis: Axis, source: int = 0) -> Any:
    """The object of rank `source` of the axis (small host-side values only: it waits for the device)."""
    if axis.group is None:
        return value
    box = [value]
    axis.note("broadcast")
    dist.broadcast_object_list(box, group_src=source, group=axis.group)
    return box[0]


def gather_objects(value: Any, axis: Axis) -> list[Any]:
    """The objects of all ranks of the axis, in rank order, on every rank."""
    if axis.group is None:
        return [value]
    values: list[Any] = [None] * axis.size
    axis.note("all_gather")
    dist.all_gather_object(values, value, group=axis.group)
    return values


def barrier(axis: Axis) -> None:
    """Wait for all ranks of the axis."""
    if axis.group is not None:
        axis.note("barrier")
        dist.barrier(group=axis.group)


def reduce_from(x: Tensor, axis: Axis) -> Tensor:
    """The sum of x over the ranks, on all of them; each rank gets the whole gradient."""
    return x if axis.group is None else _ReduceFrom.apply(x, axis)


def reduce_scatter_to(x: Tensor, axis: Axis) -> Tensor:
    """This rank's rows [T / n, ...] of the sum of x [T, ...] over the ranks."""
    return x if axis.group is None else _ReduceScatterTo.apply(x, axis)


class _ReduceFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        return all_reduce_sum(x.clone(memory_format=torch.contiguous_format), axis)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        return dx, None


class _ReduceScatterTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return reduce_scatter(x, axis)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        return all_gather(dx, ctx.axis), None
