"""Cross-entropy from logits in plain torch, with label smoothing, z-loss and soft-cap.

For one row with logits s (after the soft-cap `c * tanh(s / c)`), L = logsumexp(s), V columns, target t:

    loss = (1 - a) * (L - s_t) + a * (L - mean(s)) + z * L^2
    dloss/ds_j = softmax(s)_j * (1 + 2 z L) - (1 - a) * [j == t] - a / V

Rows whose target is `ignore_index` have loss 0 and gradient 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megalite_kernels.reference.common import widen


class LossOptions(NamedTuple):
    """What every form of the loss takes; a softcap of 0 means none."""

    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float = 0.0


def forward(logits: Tensor, target: Tensor, options: LossOptions) -> tuple[Tensor, Tensor]:
    """(loss [T], logsumexp [T]) in the wide dtype, of logits [T, V] and target [T]."""
    scores = _capped(widen(logits), options.softcap)
    lse = scores.logsumexp(-1)
    valid = target != options.ignore_index
    at_target = scores.gather(-1, torch.where(valid, target, 0).unsqueeze(-1)).squeeze(-1)
    smoothing = options.label_smoothing
    loss = lse - (1 - smoothing) * at_target + options.z_loss * lse.square()
    if smoothing:
        loss = loss - smoothing * scores.mean(-1)
    return torch.where(valid, loss, 0.0), lse


def backward(dloss: Tensor, logits: Tensor, target: Tensor, lse: Tensor, options: LossOptions) -> Tensor:
    """dlogits, with dloss [T] (or a scalar for every row)."""
    wide = widen(logits)
    scores = _capped(wide, options.softcap)
    valid = (target != options.ignore_index).unsqueeze(-1)
    lse = lse.unsqueeze(-1).to(wide.dtype)
    grad = (
        torch.exp(scores - lse) * (1 + 2 * options.z_loss * lse) - options.label_smoothing / logits.shape[-1]
    )
    index = torch.where(valid, target.unsqueeze(-1), 0)
    grad.scatter_add_(-1, index, grad.new_full((), options.label_smoothing - 1.0).expand(index.shape))
    if options.softcap:
        grad = grad * (1 - (scores / options.softcap).square())
    scale = dloss.to(wide.dtype).reshape(-1, 1) if dloss.dim() else dloss.to(wide.dtype)
    return torch.where(valid, grad * scale, 0.0).to(logits.dtype)


def grad_(logits: Tensor, target: Tensor, scale: Tensor, options: LossOptions) -> tuple[Tensor, Tensor]:
    """(loss [T], lse [T]); `logits` is overwritten with `scale * dloss/dlogits`."""
    loss, lse = forward(logits, target, options)
    logits.copy_(backward(scale, logits, target, lse, options))
    return loss, lse


def _capped(scores: Tensor, softcap: float) -> Tensor:
    return softcap * torch.tanh(scores / softcap) if softcap else scores
