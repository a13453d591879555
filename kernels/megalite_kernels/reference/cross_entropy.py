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


def backward(
    dloss: Tensor,
    logits: Tensor,
    target: Tensor,
    lse: Tensor,
    options: LossOptions,
    *,
    start: int = 0,
    vocabulary: int | None = None,
) -> Tensor:
    """dlogits, with dloss [T] (or a scalar for every row).

    The columns may be the classes from `start` on of a larger vocabulary, whose lse is given.
    """
    wide = widen(logits)
    scores = _capped(wide, options.softcap)
    valid = (target != options.ignore_index).unsqueeze(-1)
    lse = lse.unsqueeze(-1).to(wide.dtype)
    grad = torch.exp(scores - lse) * (1 + 2 * options.z_loss * lse)
    grad -= options.label_smoothing / (logits.shape[-1] if vocabulary is None else vocabulary)
    local, here = _in_shard(target, start, logits.shape[-1], options)
    if logits.shape[-1]:
        hit = here.to(grad.dtype) * (options.label_smoothing - 1.0)
        grad.scatter_add_(-1, local.unsqueeze(-1), hit.unsqueeze(-1))
    if options.softcap:
        grad = grad * (1 - (scores / options.softcap).square())
    scale = dloss.to(wide.dtype).reshape(-1, 1) if dloss.dim() else dloss.to(wide.dtype)
    return torch.where(valid, grad * scale, 0.0).to(logits.dtype)


def grad_(logits: Tensor, target: Tensor, scale: Tensor, options: LossOptions) -> tuple[Tensor, Tensor]:
    """(loss [T], lse [T]); `logits` is overwritten with `scale * dloss/dlogits`."""
    loss, lse = forward(logits, target, options)
    logits.copy_(backward(scale, logits, target, lse, options))
    return loss, lse


def local(logits: Tensor, target: Tensor, options: LossOptions, *, start: int = 0) -> Tensor:
    """What one shard adds to the loss: [4, T] in the wide dtype.

    Of the scores s of the shard's classes: m = max(s), sum of exp(s - m) (of exp(s) where m is infinite), s at
    the target (0 where another shard owns it), sum of s (0 without label smoothing).
    """
    scores = _capped(widen(logits), options.softcap)
    stats = scores.new_zeros(4, logits.shape[0])
    stats[0] = -torch.inf
    if not logits.shape[-1]:
        return stats
    stats[0] = scores.amax(-1)
    stats[1] = torch.exp(scores - _shift(stats[0]).unsqueeze(-1)).sum(-1)
    index, here = _in_shard(target, start, logits.shape[-1], options)
    stats[2] = torch.where(here, scores.gather(-1, index.unsqueeze(-1)).squeeze(-1), 0.0)
    if options.label_smoothing:
        stats[3] = scores.sum(-1)
    return stats


def combine(stats: Tensor, target: Tensor, options: LossOptions, *, vocabulary: int) -> tuple[Tensor, Tensor]:
    """(loss [T], logsumexp [T]) from the stats [shards, 4, T] of all shards."""
    top = stats[:, 0].amax(0)
    total = (stats[:, 1] * torch.exp(stats[:, 0] - _shift(top))).sum(0)
    lse = _shift(top) + total.log()
    smoothing = options.label_smoothing
    loss = lse - (1 - smoothing) * stats[:, 2].sum(0) + options.z_loss * lse.square()
    if smoothing:
        loss = loss - smoothing * stats[:, 3].sum(0) / vocabulary
    # No shard owns a class outside the vocabulary: NaN says so, since a device cannot raise.
    loss = torch.where((target < 0) | (target >= vocabulary), torch.nan, loss)
    return torch.where(target != options.ignore_index, loss, 0.0), lse


def _shift(top: Tensor) -> Tensor:
    """What is taken off the scores before exp: their maximum, or nothing where it is infinite."""
    return torch.where(top.isinf(), 0.0, top)


def _in_shard(target: Tensor, start: int, cols: int, options: LossOptions) -> tuple[Tensor, Tensor]:
    """(column of the target, 0 if it has none; whether it has one)."""
    here = (target >= start) & (target < start + cols) & (target != options.ignore_index)
    return torch.where(here, target - start, 0), here


def _capped(scores: Tensor, softcap: float) -> Tensor:
    return softcap * torch.tanh(scores / softcap) if softcap else scores
