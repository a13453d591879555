"""ZeRO-3: weights, gradients and optimizer state all divided over data-parallel ranks, by torch's FSDP2.

Each block of the model is a unit of `fully_shard`, and what stands outside the blocks (embedding, last norm, head) is
one more. A unit's weights are gathered in the compute type before it is used and freed after, forward and again
backward; what stands outside stays until the backward pass is over. A unit's gradients are reduced to the owners of
their rows when its backward pass is done, in every micro-batch. Rank r owns a run of rows of every parameter, in fp32
(float64 for a float64 model): the master and the weight are one tensor.

Two things differ from what FSDP2 does on its own: gradients are summed, not averaged, and the reduce-scatter is ours,
which notes whether this process's own gradients were finite and can send them in bf16 while it sums in fp32. (Between
replicas FSDP2 itself adds, in fp32.)

Source: Rajbhandari et al., "ZeRO", arXiv 1910.02054 (stage 3).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from megalite.config import ParallelConfig
from megalite.parallel.buckets import wide_dtype
from megalite.parallel.collectives import (
    all_reduce_sum,
    start_all_to_all,
    start_reduce_scatter_into,
    wait,
)
from megalite.parallel.mesh import Axis, Mesh
from megalite.parallel.partial import box_copies, sum_partial
from megalite.parallel.pieces import Box, Piece, iter_pieces
from megalite.parallel.state import Kind, OptimizerShard

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

ENTRIES = ("forward", "loss", "token_losses", "logits", "next_logits", "run", "hidden_losses")
"""Methods through which a model is used. They call one another; the outermost is what FSDP sees as the forward pass."""


@dataclass(frozen=True, slots=True)
class RowShard:
    """This process's rows of one parameter, with everything it keeps for them."""

    pieces: tuple[Piece, ...]
    start: int
    """First row."""
    master: Tensor
    """[rows, ...] wide; the model's own shard, from which FSDP gathers."""
    parameter: nn.Parameter
    gradient: DTensor
    """What FSDP adds to, if it is the parameter's gradient."""
    main_grad: Tensor
    """The local part of `gradient`."""
    exp_avg: Tensor
    exp_avg_sq: Tensor

    def collect(self) -> None:
        """Bring gradients that FSDP put elsewhere, because somebody took `gradient` away, to where they belong."""
        other = self.parameter.grad
        if other is not self.gradient:
            if other is not None:
                self.main_grad.add_(cast("DTensor", other).to_local())
            self.parameter.grad = self.gradient

    def optimizer_shard(self) -> OptimizerShard:
        """The same as flat tensors."""
        weights, grad, first, second = (
            tensor.view(-1) for tensor in (self.master, self.main_grad, self.exp_avg, self.exp_avg_sq)
        )
        return OptimizerShard(weights, weights, grad, first, second, self.pieces[0].decay)

    def boxes(self, kind: Kind) -> Iterator[Box]:
        """The owned rows of each piece."""
        for piece in self.pieces:
            first = max(piece.rows[0], self.start)
            stop = min(piece.rows[1], self.start + self.master.shape[0])
            if first < stop:
                offset = (piece.offset[0] + first - piece.rows[0], *piece.offset[1:])
                yield Box(piece, offset, getattr(self, kind)[first - self.start : stop - self.start])


class ShardedModules:
    """All parameters of a model, divided by FSDP2: a `ModelState`.

    Args:
        model: parameters on one device, in fp32 or wider. Its parameters become DTensors; call the model, or one of
            the methods in `ENTRIES`, never its parts.
        mesh: `shard` divides the rows, `replicate` repeats that.
        dtype: compute type, to which weights are rounded when they are gathered.
        parallel: grad_reduce_dtype.
    """

    def __init__(self, model: nn.Module, mesh: Mesh, dtype: torch.dtype, parallel: ParallelConfig) -> None:
        # Here and not above: importing FSDP takes most of a second and sets up filters of warnings.
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        self.mesh = mesh
        wide = wide_dtype(dtype)
        model.to(wide)
        self._finite: list[Tensor] = []
        wire = torch.bfloat16 if parallel.grad_reduce_dtype == "bf16" else wide
        policy = MixedPrecisionPolicy(
            param_dtype=None if dtype == wide else dtype, reduce_dtype=wide, cast_forward_inputs=False
        )
        devices = _device_mesh(mesh)
        self._units: list[FSDPModule] = []
        for module in (*_blocks(model), _Root(model)):
            unit = fully_shard(module, mesh=devices, mp_policy=policy)
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)
            unit.set_custom_reduce_scatter(_ReduceScatter(mesh.shard, wire, self._finite))  # type: ignore[arg-type]
            self._units.append(unit)
        self._shards = _row_shards(model, mesh.shard)
        self._optimizer_shards = [shard.optimizer_shard() for shard in self._shards if shard.master.numel()]
        self._boxes: dict[Kind, list[Box]] = {
            kind: [box for shard in self._shards for box in shard.boxes(kind)]
            for kind in ("master", "exp_avg", "exp_avg_sq", "main_grad")
        }
        self._copies = box_copies(self._boxes["main_grad"], mesh, mesh.replicate.size)

    def start_step(self, num_microbatches: int) -> None:
        """See `ModelState`."""
        for shard in self._shards:
            shard.main_grad.zero_()
            shard.parameter.grad = shard.gradient
        self._finite.clear()

    @torch.no_grad()
    def finish_gradients(self) -> None:
        """See `ModelState`; over data-parallel ranks they were summed in each backward pass."""
        for shard in self._shards:
            shard.collect()  # torch's pipeline engine clears gradients when it runs for the first time
        sum_partial(self._boxes["main_grad"], self.mesh.tp)
        for shard in self._shards:
            if shard.pieces[0].tied:
                all_reduce_sum(shard.main_grad, self.mesh.tied)

    def local_finite(self) -> Tensor:
        """See `ModelState`; of all micro-batches since `start_step`."""
        return torch.stack(self._finite).all()

    def optimizer_shards(self) -> list[OptimizerShard]:
        """See `ModelState`: one for each parameter."""
        return self._optimizer_shards

    def publish(self) -> None:
        """See `ModelState`; what the forward pass needs is gathered there. What is gathered already is stale."""
        for unit in self._units:
            unit.reshard()

    def settle(self) -> None:
        """See `ModelState`: nothing is under way."""

    def boxes(self, kind: Kind) -> list[Box]:
        """See `ModelState`."""
        return self._boxes[kind]

    def box_copies(self) -> list[int]:
        """See `ModelState`."""
        return self._copies

    @torch.no_grad()
    def zero_state(self) -> None:
        """See `ModelState`."""
        for shard in self._shards:
            for tensor in (shard.master, shard.exp_avg, shard.exp_avg_sq):
                tensor.zero_()

    def copy_master_to_weights(self) -> None:
        """See `ModelState`: they are the same tensors."""
        self.publish()

    def release(self) -> None:
        """See `ModelState`. FSDP's own hooks belong to the model and stay."""
        self.publish()


class _Root(nn.Module):
    """The unit of what stands outside the blocks: runs any of a model's methods as its forward pass.

    The model's methods are replaced by ones that come here first. FSDP's own way to make methods known to it gathers
    and frees once for each of several that call one another.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.entered = False
        for name in ENTRIES:
            if hasattr(model, name):
                setattr(model, name, self._entry(getattr(model, name)))

    def _entry(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def enter(*args: Any, **kwargs: Any) -> Any:
            if self.entered:
                return method(*args, **kwargs)
            self.entered = True
            try:
                return self(method, *args, **kwargs)
            finally:
                self.entered = False

        return enter

    def forward(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs)


class _ReduceScatter:
    """The reduce-scatter that FSDP2 calls: sums in the type of the output, sends in `wire`."""

    def __init__(self, shard: Axis, wire: torch.dtype, finite: list[Tensor]) -> None:
        self.shard, self.wire, self.finite = shard, wire, finite

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False
    ) -> None:
        assert op == dist.ReduceOp.SUM, op
        assert not async_op
        # A sum: squares of finite numbers may overflow. Afterwards it would be every rank's number.
        self.finite.append(torch.isfinite(input_tensor.sum()))
        if self.wire == input_tensor.dtype:
            wait(start_reduce_scatter_into(output_tensor, input_tensor, self.shard))
        else:
            received, work = start_all_to_all(input_tensor.to(self.wire), self.shard)
            wait(work)
            torch.sum(received.view(self.shard.size, -1), 0, dtype=output_tensor.dtype, out=output_tensor)


def _blocks(model: nn.Module) -> list[nn.Module]:
    """Members of the lists and dictionaries of modules that the model holds: its layers."""
    lists = [child for child in model.children() if isinstance(child, (nn.ModuleList, nn.ModuleDict))]
    return [block for blocks in lists for block in blocks.children()]


def _device_mesh(mesh: Mesh) -> DeviceMesh:
    """The data-parallel ranks as FSDP2 wants them: [shard] or [replicate, shard]."""
    assert mesh.shard.group is not None, "there is nothing to divide"
    if mesh.replicate.group is None:
        return DeviceMesh.from_group(mesh.shard.group, mesh.device.type)
    assert mesh.data.group is not None
    ranks = torch.tensor(dist.get_process_group_ranks(mesh.data.group))
    return DeviceMesh.from_group(
        [mesh.replicate.group, mesh.shard.group],
        mesh.device.type,
        mesh=ranks.view(mesh.replicate.size, mesh.shard.size),
        mesh_dim_names=("replicate", "shard"),
    )


def _row_shards(model: nn.Module, shard: Axis) -> list[RowShard]:
    """This process's rows of all parameters, in the order of registration, with gradients and moments of zeros."""
    pieces: dict[str, list[Piece]] = {}
    for _, name, piece in iter_pieces(model):
        pieces.setdefault(name, []).append(piece)
    shards = []
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            master = cast("DTensor", parameter).to_local()
            gradient = cast("DTensor", torch.zeros_like(parameter))
            parameter.grad = gradient  # FSDP adds to a gradient that is there, in place
            rows = parameter.shape[0]
            start = min(rows, shard.rank * -(-rows // shard.size))
            moments = torch.zeros(2, *master.shape, dtype=master.dtype, device=master.device)
            own, grad = tuple(pieces[name]), gradient.to_local()
            shards.append(RowShard(own, start, master, parameter, gradient, grad, moments[0], moments[1]))
    return shards
