"""What goes into the device's part of a step, and what comes out: tensors that no Python value takes part in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from megalite.data.loader import MicroBatch
from megalite.train.guard import Verdict


@dataclass(frozen=True, slots=True)
class StepInputs:
    """Everything that differs from step to step, on the device."""

    batches: Sequence[MicroBatch]
    rate: Tensor
    """Learning rate: fp32 scalar."""
    stop: Tensor
    """1 if this process wants to stop, else 0: float64 scalar."""

    def clone(self) -> StepInputs:
        """The same in memory of its own."""
        batches = [batch.map(lambda x: x.clone()) for batch in self.batches]
        return replace(self, batches=batches, rate=self.rate.clone(), stop=self.stop.clone())

    def copy_(self, other: StepInputs) -> None:
        """Take over the values of other inputs with tensors of equal shapes."""
        for mine, theirs in zip(self.batches, other.batches, strict=True):
            mine.copy_(theirs)
        self.rate.copy_(other.rate, non_blocking=True)
        self.stop.copy_(other.stop, non_blocking=True)


@dataclass(frozen=True, slots=True)
class StepOutputs:
    """What a step leaves behind besides the new weights: device scalars."""

    loss: Tensor
    """Mean over the valid tokens of the whole step."""
    grad_norm: Tensor
    valid_tokens: Tensor
    bad_ranks: Tensor
    """[world] float64: not 0 where a process's own loss or gradients were not finite."""
    stopping: Tensor
    """How many processes want to stop."""
    verdict: Verdict
