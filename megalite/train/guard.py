"""Judge each step on the device: non-finite steps are never applied, spikes are reported.

The judgement is a few scalar operations on the device; the host reads it when it logs. A non-finite step is
dropped by *selecting* the old values in the optimizer, never by multiplying with zero (0 · NaN is NaN).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megalite.parallel.reduction import is_finite

WINDOW = 128
MIN_HISTORY = 32
"""Steps of history before spikes are judged: the loss of a young run falls too fast to have a spread."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Device scalars that describe one step."""

    skip: Tensor
    """bool: the update must not be applied."""
    spike: Tensor
    """bool: loss or gradient norm far above its recent mean."""
    bad_parameter: Tensor
    """int64: index of the first parameter with a non-finite gradient, -1 if there is none."""


class StepGuard:
    """Remembers the recent losses and gradient norms of applied steps, on the device.

    Args:
        device: where the losses live.
        sigma: a value above mean + sigma · standard deviation of the window is a spike.
        skip_spikes: spikes are skipped like non-finite steps.
    """

    def __init__(self, device: torch.device, *, sigma: float, skip_spikes: bool) -> None:
        self.sigma = sigma
        self.skip_spikes = skip_spikes
        self.history = torch.zeros(2, WINDOW, dtype=torch.float64, device=device)
        self.count = torch.zeros((), dtype=torch.int64, device=device)
        self.consecutive_skips = torch.zeros((), dtype=torch.int64, device=device)
        self._column = torch.arange(WINDOW, device=device)

    @torch.no_grad()
    def judge(self, loss: Tensor, grad_norm: Tensor, parameter_norms: Tensor) -> Verdict:
        """Judge one step from its loss, its gradient norm and the norm of every parameter's gradient.

        All ranks must pass the same (already reduced) values, so that all judge alike.
        """
        values = torch.stack([loss, grad_norm]).double()
        bad = ~is_finite(parameter_norms)
        first_bad = torch.where(bad.any(), bad.int().argmax(), -1)
        finite = is_finite(values).all() & ~bad.any()
        spike = finite & self._is_spike(values)
        skip = ~finite | (spike & self.skip_spikes)
        self._remember(values, skip)
        # In place: a graph that is replayed finds its state where it left it.
        self.consecutive_skips.copy_(torch.where(skip, self.consecutive_skips + 1, 0))
        return Verdict(skip=skip, spike=spike, bad_parameter=first_bad)

    def _is_spike(self, values: Tensor) -> Tensor:
        filled = (self._column < self.count).double()
        n = filled.sum().clamp(min=1)
        mean = (self.history * filled).sum(1) / n
        variance = ((self.history - mean[:, None]).square() * filled).sum(1) / n
        above = values > mean + self.sigma * variance.sqrt()
        return above.any() & (self.count >= MIN_HISTORY)

    def _remember(self, values: Tensor, skip: Tensor) -> None:
        write = (self._column == self.count % WINDOW) & ~skip
        self.history.copy_(torch.where(write, values[:, None], self.history))
        self.count.add_((~skip).long())

    def state(self) -> dict[str, Tensor]:
        """Tensors that a checkpoint keeps, so that a resumed run judges like an uninterrupted one."""
        return {"history": self.history, "count": self.count, "consecutive_skips": self.consecutive_skips}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` returned."""
        for name, tensor in self.state().items():
            tensor.copy_(state[name])
