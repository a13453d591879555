"""Flat buffers: parameters, main gradients, masters and moments, each one contiguous tensor per group.

Layout (Megatron's): parameters stand in reverse registration order, because the backward pass finishes them
in that order; each start is aligned to 64 elements (256 bytes of fp32); the end is padded to a multiple of
lcm(dp, 128) so that equal slices per rank stay aligned. Every parameter becomes a view of its group's
buffer. What data parallelism reduces and the optimizer updates is the buffer, in one launch; the padding
stays zero. With dp = 1 this is the whole story; sharding the same buffers over dp is ZeRO-1.

Weights exist twice when the compute type is not fp32: a low-precision copy that the model uses, and the
fp32 master that the optimizer updates. In fp32 the two are the same tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megalite.parallel.collectives import all_reduce_sum
from megalite.parallel.mesh import Axis
from megalite.parallel.pieces import Piece, iter_pieces

ALIGNMENT = 64
PADDING = 128


@dataclass(frozen=True, slots=True)
class Slot:
    """Where one parameter stands in its group's buffers."""

    name: str
    parameter: nn.Parameter
    start: int
    shape: torch.Size

    def view(self, buffer: Tensor) -> Tensor:
        """This parameter's part of a flat buffer, in the parameter's shape."""
        return buffer[self.start : self.start + math.prod(self.shape)].view(self.shape)


@dataclass(slots=True)
class FlatGroup:
    """Parameters with one weight-decay rule, and everything the optimizer keeps for them."""

    decay: bool
    slots: list[Slot]
    weights: Tensor
    """Compute-type parameters; the model's parameters are views of it."""
    master: Tensor
    """fp32 weights; the same tensor as `weights` in fp32."""
    main_grad: Tensor
    """fp32 gradients, summed over micro-batches and ranks."""
    exp_avg: Tensor
    exp_avg_sq: Tensor
    grad_views: list[Tensor]
    """One view of `main_grad` per slot, in slot order."""


class FlatBuffers:
    """All parameters of a model, moved into flat groups.

    Args:
        model: fp32 parameters on one device. They become views of the new buffers, in `dtype`.
        dp: data-parallel axis; decides the padding and sums the gradients.
        dtype: compute type of the weights; the masters keep the fp32 values.

    Saved: per parameter 12 bytes in fp32 (weight, gradient, two moments: 16) and 18 in bf16.
    """

    def __init__(self, model: nn.Module, dp: Axis, dtype: torch.dtype = torch.float32) -> None:
        self.dp = dp
        self.pieces: list[tuple[Slot, FlatGroup, Piece]] = []
        decays = _decay_by_parameter(iter_pieces(model))
        named = [(name, p) for name, p in model.named_parameters()]
        self.groups = [
            _make_group([(n, p) for n, p in named if decays[n] is decay], decay, dp.size, dtype)
            for decay in (True, False)
        ]
        self.groups = [group for group in self.groups if group.slots]
        by_name = {slot.name: (slot, group) for group in self.groups for slot in group.slots}
        for _, name, piece in iter_pieces(model):
            slot, group = by_name[name]
            self.pieces.append((slot, group, piece))
        self._grad_pieces = list(self.piece_tensors("main_grad"))
        self._hooks = [self._accumulate_into_main_grad(group) for group in self.groups]

    def _accumulate_into_main_grad(self, group: FlatGroup) -> list[object]:
        """Make backward add into the flat fp32 gradients, whatever the compute type."""
        if group.weights.dtype == torch.float32:
            for slot, grad in zip(group.slots, group.grad_views, strict=True):
                slot.parameter.grad = grad  # autograd accumulates in place into a gradient that is there
            return []

        def hook_for(grad: Tensor) -> Callable[[Tensor], None]:
            def add(parameter: Tensor) -> None:
                assert parameter.grad is not None
                grad.add_(parameter.grad)
                parameter.grad = None

            return add

        pairs = zip(group.slots, group.grad_views, strict=True)
        return [slot.parameter.register_post_accumulate_grad_hook(hook_for(grad)) for slot, grad in pairs]

    def zero_grad(self) -> None:
        """Clear the main gradients."""
        for group in self.groups:
            group.main_grad.zero_()

    def zero_state(self) -> None:
        """Clear masters and moments, the padding between and inside parameters included."""
        for group in self.groups:
            for tensor in (group.master, group.exp_avg, group.exp_avg_sq):
                tensor.zero_()

    def reduce_gradients(self) -> None:
        """Sum the main gradients over the data-parallel axis."""
        for group in self.groups:
            all_reduce_sum(group.main_grad, self.dp)

    def copy_master_to_weights(self) -> None:
        """Set the model's weights from the fp32 masters, rounding once (no-op in fp32)."""
        for group in self.groups:
            group.weights.copy_(group.master)

    def grad_views(self) -> list[Tensor]:
        """Main gradient of every parameter, in the order of `names`."""
        return [view for group in self.groups for view in group.grad_views]

    def names(self) -> list[str]:
        """Parameter names in the order of `grad_views`."""
        return [slot.name for group in self.groups for slot in group.slots]

    def grad_pieces(self) -> list[tuple[Piece, Tensor]]:
        """Main gradient of every piece; each element of every parameter is in one of them."""
        return self._grad_pieces

    def piece_tensors(self, kind: str) -> Iterator[tuple[Piece, Tensor]]:
        """Each piece with its view of one kind of state: master, exp_avg, exp_avg_sq or main_grad."""
        for slot, group, piece in self.pieces:
            yield piece, slot.view(getattr(group, kind))[piece.rows[0] : piece.rows[1]]

    def release(self) -> None:
        """Remove the gradient hooks."""
        for hooks in self._hooks:
            for hook in hooks:
                hook.remove()  # type: ignore[attr-defined]
        self._hooks = []


def _decay_by_parameter(pieces: Iterable[tuple[nn.Parameter, str, Piece]]) -> dict[str, bool]:
    decays: dict[str, bool] = {}
    for _, name, piece in pieces:
        assert decays.setdefault(name, piece.decay) is piece.decay, f"pieces of {name} differ in decay"
    return decays


def _make_group(
    named: list[tuple[str, nn.Parameter]], decay: bool, dp_size: int, dtype: torch.dtype
) -> FlatGroup:
    """Lay the parameters out, move their values into new flat buffers and make them views of the weights."""
    slots: list[Slot] = []
    end = 0
    for name, parameter in reversed(named):
        start = -(-end // ALIGNMENT) * ALIGNMENT
        slots.append(Slot(name=name, parameter=parameter, start=start, shape=parameter.shape))
        end = start + parameter.numel()
    unit = math.lcm(dp_size, PADDING)
    total = -(-end // unit) * unit
    device = named[0][1].device if named else torch.device("cpu")
    master, main_grad, exp_avg, exp_avg_sq = (
        torch.zeros(total, dtype=torch.float32, device=device) for _ in range(4)
    )
    for slot in slots:
        slot.view(master).copy_(slot.parameter.detach())
    weights = master if dtype == torch.float32 else master.to(dtype)
    for slot in slots:
        slot.parameter.data = slot.view(weights)
    grad_views = [slot.view(main_grad) for slot in slots]
    return FlatGroup(decay, slots, weights, master, main_grad, exp_avg, exp_avg_sq, grad_views)
