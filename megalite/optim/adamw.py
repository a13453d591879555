"""AdamW: one fused pass over each shard of the optimizer state."""

from __future__ import annotations

import torch
from torch import Tensor

from megalite.config import OptimizerConfig
from megalite.parallel.collectives import all_reduce_sum
from megalite.parallel.mesh import ALONE, Axis
from megalite.parallel.partial import box_norms
from megalite.parallel.state import ModelState
from megalite_kernels import adamw_


class AdamW:
    """Adam with decoupled weight decay (arXiv 1711.05101) on a `ModelState` whose masters are fp32,
    in one tensor or in two.

    The step counter, the learning rate, the clipping factor and the skip flag are device scalars: a skipped
    step changes neither weights, moments nor the counter, and nothing waits for the host.

    Args:
        state: what is updated; each process updates its own shards.
        config: coefficients.
        world: all processes that hold parts of the model.
    """

    def __init__(self, state: ModelState, config: OptimizerConfig, world: Axis = ALONE) -> None:
        self.state = state
        self.config = config
        self.world = world
        device = state.optimizer_shards()[0].weights.device
        self.step_count = torch.zeros((), dtype=torch.float32, device=device)
        """Updates applied so far (skipped steps not counted): fp32 scalar, exact up to 2^24."""

    @torch.no_grad()
    def step(self, learning_rate: Tensor, clip_coefficient: Tensor, skip: Tensor) -> None:
        """Apply one update from the main gradients; `ModelState.publish` brings it to the other ranks.

        Args:
            learning_rate: fp32 scalar on the device.
            clip_coefficient: fp32 scalar that multiplies every gradient.
            skip: bool scalar; True leaves everything as it is.
        """
        self.step_count += (~skip).float()
        for shard in self.state.optimizer_shards():
            adamw_(
                shard.weights,
                shard.master,
                shard.exp_avg,
                shard.exp_avg_sq,
                shard.main_grad,
                lr=learning_rate,
                beta1=self.config.beta1,
                beta2=self.config.beta2,
                eps=self.config.eps,
                weight_decay=self.config.weight_decay if shard.decay else 0.0,
                step=self.step_count,
                clip_coefficient=clip_coefficient,
                skip=skip,
                remainder=shard.remainder,
            )

    @torch.no_grad()
    def update_ratio(self, learning_rate: float) -> tuple[float, float]:
        """Size of the last update relative to the weights, and the weights' norm, over decayed parameters.

        Recomputed from the moments (weight decay left out), so it costs nothing on the steps that do not ask.
        Every element of the model counts once, wherever it is: all processes must call this, and get the same.
        Waits for the device. A healthy pre-training run is near 1e-3.
        """
        steps = max(1.0, self.step_count.item())
        device = self.step_count.device
        squares = torch.zeros(2, dtype=torch.float64, device=device)
        masters = self.state.boxes("master")
        moments = zip(self.state.boxes("exp_avg"), self.state.boxes("exp_avg_sq"), strict=True)
        for box, (first, second), copies in zip(masters, moments, self.state.box_copies(), strict=True):
            if box.piece.decay:
                norm = box_norms([box], device)[0].double()  # one by one: a box may have to be put together
                squares[0] += (
                    self._update_square(first.tensor.flatten(), second.tensor.flatten(), steps) / copies
                )
                squares[1] += norm.square() / copies
        update, weight = all_reduce_sum(squares, self.world).sqrt().tolist()
        return learning_rate * update / max(weight, 1e-30), weight

    def _update_square(self, exp_avg: Tensor, exp_avg_sq: Tensor, steps: float) -> Tensor:
        """Sum of squares of Adam's direction, in chunks so that no full-sized temporary is made."""
        first, second = 1.0 - self.config.beta1**steps, 1.0 - self.config.beta2**steps
        total = torch.zeros((), dtype=torch.float64, device=exp_avg.device)
        for m, v in zip(exp_avg.split(1 << 20), exp_avg_sq.split(1 << 20), strict=True):
            direction = (m / first) / ((v / second).sqrt() + self.config.eps)
            total += torch.dot(direction, direction)
        return total
