"""What the training step asks of weights, gradients and optimizer state, however they are divided over ranks.

`FlatBuffers` (flat buckets: plain data parallelism and ZeRO-1) and `ShardedModules` (FSDP2: ZeRO-3) both are a
`ModelState`. The step, the optimizer, the checkpoint and the norm know only this.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from megalite.parallel.pieces import Box, write_values
from megalite_kernels.reference.adamw import join

Kind = Literal["master", "exp_avg", "exp_avg_sq", "main_grad"]
"""Kinds of state: fp32 weights, the two moments, the gradients."""


@dataclass(frozen=True, slots=True)
class OptimizerShard:
    """What one fused optimizer call updates: flat tensors of equal size, of this process's part of the state."""

    weights: Tensor
    """Compute-type weights; the same tensor as `master` where the types agree."""
    master: Tensor | None
    """None where `remainder` and the weights are the masters."""
    main_grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    decay: bool
    remainder: Tensor | None = None
    """int16 that complete bf16 weights to fp32 masters."""

    @property
    def values(self) -> Tensor:
        """The masters: the live ones, or with remainders a copy."""
        if self.remainder is not None:
            return join(self.weights, self.remainder)
        assert self.master is not None
        return self.master

    def set_values(self, values: Tensor) -> None:
        """Set masters and weights; `values` may be the masters themselves, changed in place."""
        if self.remainder is not None:
            write_values(self.weights, self.remainder, values)
            return
        for tensor in (self.master, self.weights):
            if tensor is not None and tensor is not values:
                tensor.copy_(values)


class ModelState(Protocol):
    """Weights, gradients and optimizer state of this process."""

    def start_step(self, num_microbatches: int) -> None:
        """Expect as many micro-batches; reductions start as gradients become complete.

        The last step's gradients are gone: until `finish_gradients` nobody may read them, for they may have no memory.
        """
        ...

    def finish_gradients(self) -> None:
        """Wait until `boxes("main_grad")` hold the whole step's gradients, summed over data-parallel ranks, over
        tensor-parallel ranks where each has a part, and over the stages that share a tied weight."""
        ...

    def local_finite(self) -> Tensor:
        """Whether this process's own gradients, before they were summed with others', were finite: bool scalar."""
        ...

    def optimizer_shards(self) -> list[OptimizerShard]:
        """Everything this process updates."""
        ...

    def publish(self) -> None:
        """After an update: start bringing the new weights to the ranks that need them; the forward pass waits."""
        ...

    def settle(self) -> None:
        """Wait for what `publish` started, before somebody else than the forward pass reads the model's weights."""
        ...

    def boxes(self, kind: Kind) -> list[Box]:
        """The parts of all tensors that this process updates, always in the same order. Masters may be in two parts.

        Over the processes that hold different parts of the state the boxes of a tensor cover it exactly once,
        except for what tensor-parallel ranks or tied stages hold in common (`box_copies`).
        """
        ...

    def box_copies(self) -> list[int]:
        """How many processes of the world hold each box: norms count an element once by dividing by it."""
        ...

    def zero_state(self) -> None:
        """Clear masters and moments, padding included."""
        ...

    def copy_master_to_weights(self) -> None:
        """Set the model's weights on all ranks from the masters, rounding once."""
        ...

    def release(self) -> None:
        """Remove every hook."""
        ...
