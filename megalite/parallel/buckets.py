"""Flat buffers: where every parameter stands, and the buckets that are reduced, updated and gathered as one.

Layout (Megatron's): for each weight-decay rule one buffer of weights and one of main gradients, or one for each bucket
where gradients lend their memory (`megalite.parallel.data`). Parameters stand in reverse registration order, because
the backward pass finishes them in that order; each start is aligned to 64 elements (256 bytes of fp32). A bucket is a
run of whole parameters, closed when it holds about as many elements as asked for; its end is padded to a multiple of
lcm(data-parallel ranks, 128), so that it divides into equal aligned slices. Rank r of those that divide the optimizer
state owns slice r of every bucket, cutting through parameters. Padding stays zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megalite.parallel.mesh import Axis
from megalite.parallel.pieces import Box, Piece, boxes_of_range, iter_pieces, write_values
from megalite.parallel.state import Kind, OptimizerShard
from megalite_kernels.memory import zeros_in_huge_pages

ALIGNMENT = 64
PADDING = 128


@dataclass(frozen=True, slots=True)
class Slot:
    """Where one parameter stands in its bucket."""

    name: str
    parameter: nn.Parameter
    pieces: tuple[Piece, ...]
    start: int
    number: int
    """Its place in the order of registration."""

    @property
    def stop(self) -> int:
        """End of the parameter; the next one starts at or after it."""
        return self.start + self.parameter.numel()

    def view(self, flat: Tensor) -> Tensor:
        """This parameter's part of its bucket's weights or main gradients, in the parameter's shape."""
        return flat[self.start : self.stop].view(self.parameter.shape)

    def local_shape(self, piece: Piece) -> tuple[int, ...]:
        """Shape of the part of a piece that the parameter holds."""
        return (piece.rows[1] - piece.rows[0], *self.parameter.shape[1:])


@dataclass(frozen=True, slots=True)
class Bucket:
    """A run of neighbouring parameters, and what this process keeps for the slice of it that it owns."""

    decay: bool
    tied: bool
    """It holds a matrix that another pipeline stage has too, and nothing else."""
    slots: tuple[Slot, ...]
    own: slice
    """What this process updates: all of the bucket unless the optimizer's state is divided."""
    weights: Tensor
    """[n] compute-type parameters; the model's parameters are views of it."""
    main_grad: Tensor
    """[n] gradients summed over micro-batches; after the reduction the owned slice holds the sum over all ranks. While
    its memory is lent, whoever reads it ends the process."""
    master: Tensor | None
    """[owned] wide weights; a view of `weights` where the types agree; None with remainders."""
    exp_avg: Tensor
    exp_avg_sq: Tensor
    remainder: Tensor | None
    """[owned] int16 that complete the owned bf16 weights to their masters."""

    def lend_gradients(self) -> None:
        """Give up the memory of main gradients, values included; they cannot be read until they are taken back."""
        self.main_grad.untyped_storage().resize_(0)

    def take_gradients(self) -> None:
        """Have memory for main gradients again if it was lent: any values, and zeros between the parameters."""
        if self.has_gradients:
            return
        self.main_grad.untyped_storage().resize_(self.main_grad.numel() * self.main_grad.itemsize)
        starts = [*(slot.start for slot in self.slots[1:]), self.main_grad.numel()]
        for slot, start in zip(self.slots, starts, strict=True):
            self.main_grad[slot.stop : start].zero_()

    @property
    def has_gradients(self) -> bool:
        """Main gradients have memory."""
        return self.main_grad.untyped_storage().size() > 0

    def shard(self) -> OptimizerShard:
        """What one optimizer call updates."""
        own = self.own
        state = (self.master, self.main_grad[own], self.exp_avg, self.exp_avg_sq)
        return OptimizerShard(self.weights[own], *state, self.decay, self.remainder)

    def boxes(self, slot: Slot, kind: Kind) -> Iterator[Box]:
        """The owned parts of a parameter's pieces."""
        low = self.remainder if kind == "master" else None
        if kind == "main_grad":
            owned = self.main_grad[self.own]
        else:
            owned = self.weights[self.own] if low is not None else getattr(self, kind)
        for piece in slot.pieces:
            shape = slot.local_shape(piece)
            width = math.prod(shape[1:])
            first = slot.start + piece.rows[0] * width
            start = max(first, self.own.start)
            stop = min(first + math.prod(shape), self.own.stop)
            if start < stop:
                run = slice(start - self.own.start, stop - self.own.start)
                rest = None if low is None else low[run]
                yield from boxes_of_range(piece, shape, owned[run], start - first, rest)


@dataclass(frozen=True, slots=True)
class FlatGroup:
    """Parameters with one weight-decay rule: flat buffers of weights, gradients and state, cut into buckets."""

    decay: bool
    weights: Tensor
    main_grad: Tensor | None
    """None where each bucket has memory of its own to lend."""
    moments: Tensor
    """[2, owned]"""
    master: Tensor | None
    """[owned], or None where `weights` or these and `remainder` are the masters."""
    remainder: Tensor | None
    buckets: tuple[Bucket, ...]

    def shards(self) -> list[OptimizerShard]:
        """All buckets as one shard, where this process owns all of every bucket: one launch updates it. Else each."""
        divided = self.moments.shape[1] < self.weights.numel()
        if divided or self.main_grad is None:
            return [bucket.shard() for bucket in self.buckets]
        master = self.weights if self.master is None and self.remainder is None else self.master
        first, second = self.moments
        return [
            OptimizerShard(self.weights, master, self.main_grad, first, second, self.decay, self.remainder)
        ]


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type of masters, gradients and moments: fp32, or float64 for a float64 model."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def plan_slots(
    model: nn.Module, decay: bool, bucket_size: int, *, large_alone: bool = False
) -> list[list[Slot]]:
    """The buckets of one group: slots in reverse registration order.

    Args:
        model: declares pieces for all its parameters.
        decay: which group.
        bucket_size: elements at which a bucket is closed. A tied matrix has a bucket of its own: two pipeline stages
            hold it among other neighbours, and must cut it equally.
        large_alone: so has a parameter of `bucket_size` elements or more.
    """
    pieces: dict[str, tuple[nn.Parameter, list[Piece]]] = {}
    for parameter, name, piece in iter_pieces(model):
        pieces.setdefault(name, (parameter, []))[1].append(piece)
    buckets: list[list[Slot]] = [[]]
    for number, (name, _) in reversed(list(enumerate(model.named_parameters()))):
        parameter, own = pieces[name]
        assert len({(piece.decay, piece.tied) for piece in own}) == 1, (
            f"pieces of {name} differ in decay or tied"
        )
        if own[0].decay is not decay:
            continue
        alone = own[0].tied or (large_alone and parameter.numel() >= bucket_size)
        if buckets[-1] and (alone or buckets[-1][-1].stop >= bucket_size or _tied(buckets[-1])):
            buckets.append([])
        end = buckets[-1][-1].stop if buckets[-1] else 0
        start = -(-end // ALIGNMENT) * ALIGNMENT
        buckets[-1].append(Slot(name, parameter, tuple(own), start, number))
    return [bucket for bucket in buckets if bucket]


def _tied(slots: list[Slot]) -> bool:
    return slots[-1].pieces[0].tied


def make_group(
    planned: list[list[Slot]],
    dtype: torch.dtype,
    shard: Axis,
    data_size: int,
    *,
    remainders: bool,
    lends: bool,
) -> FlatGroup:
    """Allocate a group's buffers, move the parameters' values into them, and make the parameters views of them.

    The model's own parameters are freed before gradients and moments are made, so that the two never meet.

    Args:
        planned: from `plan_slots`.
        dtype: compute type of the weights; masters keep the values they have now.
        shard: ranks that divide the optimizer's state.
        data_size: ranks over which gradients are summed; decides the padding.
        remainders: bf16 weights and 16 bits more are the masters.
        lends: main gradients of each bucket lie in memory of their own.
    """
    first = planned[0][0]
    unit, wide = math.lcm(data_size, PADDING), wide_dtype(dtype)
    sizes = [-(-slots[-1].stop // unit) * unit for slots in planned]
    counts = [size // shard.size for size in sizes]
    device, decay = first.parameter.device, first.pieces[0].decay
    weights = zeros_in_huge_pages(sum(sizes), dtype, device)
    # In the compute type's own precision there is no second copy: the master is the owned part of the weights.
    halved = remainders and dtype == torch.bfloat16
    master = zeros_in_huge_pages(sum(counts), wide, device) if dtype != wide and not halved else None
    remainder = zeros_in_huge_pages(sum(counts), torch.int16, device) if halved else None
    parts = weights.split(sizes)
    owns = [slice(shard.rank * count, (shard.rank + 1) * count) for count in counts]
    masters, rests = (
        [None] * len(counts) if x is None else list(x.split(counts)) for x in (master, remainder)
    )
    for slots, part, own, *kept in zip(planned, parts, owns, masters, rests, strict=True):
        for slot in slots:
            _move(slot, part, own, *kept)
    if lends:
        main_grad, main_grads = None, [torch.zeros(size, dtype=wide, device=device) for size in sizes]
    else:
        main_grad = zeros_in_huge_pages(sum(sizes), wide, device)
        main_grads = list(main_grad.split(sizes))
    moments = zeros_in_huge_pages(2 * sum(counts), wide, device).view(2, sum(counts))
    if master is None and remainder is None:
        masters = [part[own] for part, own in zip(parts, owns, strict=True)]
    buckets = [
        Bucket(decay, _tied(slots), tuple(slots), *rest)
        for slots, *rest in zip(
            planned, owns, parts, main_grads, masters, *(x.split(counts) for x in moments), rests, strict=True
        )
    ]
    return FlatGroup(decay, weights, main_grad, moments, master, remainder, tuple(buckets))


def _move(slot: Slot, part: Tensor, own: slice, master: Tensor | None, remainder: Tensor | None) -> None:
    """Make a parameter a view of its bucket's weights, which get its values; the owned part of its masters too."""
    values = slot.parameter.detach()
    view = slot.view(part)
    rest = None if remainder is None else torch.empty_like(values, dtype=torch.int16)
    write_values(view, rest, values)
    kept, whole = (master, values) if remainder is None else (remainder, rest)
    begin, end = max(slot.start, own.start), min(slot.stop, own.stop)
    if kept is not None and whole is not None and begin < end:
        owned = whole.reshape(-1)[begin - slot.start : end - slot.start]
        kept[begin - own.start : end - own.start].copy_(owned)
    slot.parameter.data = view
