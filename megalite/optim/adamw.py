"""AdamW over flat buffers: one fused pass per weight-decay group."""

from __future__ import annotations

import torch
from torch import Tensor

from megalite.config import OptimizerConfig
from megalite.parallel.data import FlatBuffers, FlatGroup
from megalite_kernels import adamw_


class AdamW:
    """Adam with decoupled weight decay (arXiv 1711.05101) on `FlatBuffers`.

    The step counter, the learning rate, the clipping factor and the skip flag are device scalars: a skipped
    step changes neither weights, moments nor the counter, and nothing waits for the host.
    """

    def __init__(self, buffers: FlatBuffers, config: OptimizerConfig) -> None:
        self.buffers = buffers
        self.config = config
        device = buffers.groups[0].weights.device
        self.step_count = torch.zeros((), dtype=torch.float32, device=device)
        """Updates applied so far (skipped steps not counted): fp32 scalar, exact up to 2^24."""

    @torch.no_grad()
    def step(self, learning_rate: Tensor, clip_coefficient: Tensor, skip: Tensor) -> None:
        """Apply one update from the main gradients.

        Args:
            learning_rate: fp32 scalar on the device.
            clip_coefficient: fp32 scalar that multiplies every gradient.
            skip: bool scalar; True leaves everything as it is.
        """
        self.step_count += (~skip).float()
        for group in self.buffers.groups:
            adamw_(
                group.weights,
                group.master,
                group.exp_avg,
                group.exp_avg_sq,
                group.main_grad,
                lr=learning_rate,
                beta1=self.config.beta1,
                beta2=self.config.beta2,
                eps=self.config.eps,
                weight_decay=self.config.weight_decay if group.decay else 0.0,
                step=self.step_count,
                clip_coefficient=clip_coefficient,
                skip=skip,
            )

    @torch.no_grad()
    def update_ratio(self, learning_rate: float) -> tuple[float, float]:
        """Size of the last update relative to the weights, and the weights' norm, over decayed parameters.

        Recomputed from the moments (weight decay left out), so it costs nothing on the steps that do not ask.
        Waits for the device. A healthy pre-training run is near 1e-3.
        """
        beta1, beta2, eps = self.config.beta1, self.config.beta2, self.config.eps
        steps = max(1.0, self.step_count.item())
        update_squares = weight_squares = 0.0
        for group in (g for g in self.buffers.groups if g.decay):
            update_squares += _update_square(group, steps, beta1, beta2, eps)
            weight_squares += float(torch.linalg.vector_norm(group.master)) ** 2
        weight_norm = weight_squares**0.5
        return learning_rate * update_squares**0.5 / max(weight_norm, 1e-30), weight_norm


def _update_square(group: FlatGroup, steps: float, beta1: float, beta2: float, eps: float) -> float:
    """Sum of squares of Adam's direction, in chunks so that no full-sized temporary is made."""
    total = 0.0
    first, second = 1.0 - beta1**steps, 1.0 - beta2**steps
    for m, v in zip(group.exp_avg.split(1 << 20), group.exp_avg_sq.split(1 << 20), strict=True):
        direction = (m / first) / ((v / second).sqrt() + eps)
        total += float(torch.dot(direction, direction))
    return total
