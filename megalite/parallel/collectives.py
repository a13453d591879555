"""The only file that calls collectives. Each takes an `Axis`; on an axis of one process it does nothing."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megalite.parallel.mesh import Axis


def all_reduce_sum(tensor: Tensor, axis: Axis) -> Tensor:
    """Sum `tensor` over the axis, in place; returns it."""
    if axis.group is not None:
        dist.all_reduce(tensor, group=axis.group)
    return tensor


def broadcast(tensor: Tensor, axis: Axis, source: int = 0) -> Tensor:
    """Overwrite `tensor` with that of rank `source` of the axis; returns it."""
    if axis.group is not None:
        dist.broadcast(tensor, group_src=source, group=axis.group)
    return tensor


def broadcast_object(value: Any, axis: Axis, source: int = 0) -> Any:
    """The object of rank `source` of the axis (small host-side values only: it waits for the device)."""
    if axis.group is None:
        return value
    box = [value]
    dist.broadcast_object_list(box, group_src=source, group=axis.group)
    return box[0]


def gather_objects(value: Any, axis: Axis) -> list[Any]:
    """The objects of all ranks of the axis, in rank order, on every rank."""
    if axis.group is None:
        return [value]
    values: list[Any] = [None] * axis.size
    dist.all_gather_object(values, value, group=axis.group)
    return values


def barrier(axis: Axis) -> None:
    """Wait for all ranks of the axis."""
    if axis.group is not None:
        dist.barrier(group=axis.group)


def any_failed(failed: bool, axis: Axis, device: torch.device) -> bool:
    """Whether any rank of the axis reports a failure, so that all of them can stop together."""
    flag = torch.tensor(int(failed), device=device)
    return bool(all_reduce_sum(flag, axis).item())
