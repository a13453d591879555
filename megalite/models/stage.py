"""One stage of a pipeline: some consecutive layers of a `Transformer`, as the pipeline engine calls them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from megalite.models.transformer import Transformer


class Stage(nn.Module):
    """tokens or residual stream → residual stream, or on the last stage the scaled loss.

    Its parameters are the model's own; the model's methods do the work, so that a pipeline computes what a single
    process computes.

    Args:
        model: holds these layers, and the embedding or the head if they are the first or the last.
        layers: their numbers.
    """

    def __init__(self, model: Transformer, layers: range) -> None:
        super().__init__()
        self.layers = layers
        self.is_last = layers.stop == model.config.num_layers
        self.parts = nn.ModuleList(model.layers[number] for number in layers)
        if layers.start == 0:
            self.parts.extend(m for m in (model.embedding, model.position_embedding) if m is not None)
        if self.is_last:
            self.parts.extend(m for m in (model.final_norm, model.output) if m is not None)
        self._run, self._losses = model.run, model.hidden_losses
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=model.device)
        """Losses computed here since it was last reset, unscaled."""

    def forward(self, x: Tensor, *, labels: Tensor, scale: Tensor, **where: Any) -> Tensor:
        """`where` as in `Transformer.run`; labels [T] and scale (a scalar) are used by the last stage."""
        out = self._run(x, self.layers, **where)
        if not self.is_last:
            return out
        loss = self._losses(out, labels, "sum", scale)
        self.loss_sum += loss.detach()
        return loss * scale
