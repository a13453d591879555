"""Gradients that each tensor-parallel rank has only a part of, and how often an element stands on the ranks.

A rank's gradient of a norm weight under sequence parallelism comes from its own tokens; that of a key head which
several ranks share comes from their query heads. The parts are laid at their place in the whole tensors, all of
them in one buffer, and summed by one all-reduce.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from megalite.parallel.collectives import all_reduce_sum
from megalite.parallel.mesh import Axis
from megalite.parallel.pieces import Piece


def sum_partial_gradients(gradients: Iterable[tuple[Piece, Tensor]], tp: Axis) -> None:
    """Replace the gradient of every piece that is "partial" by the sum over the ranks, in place.

    Args:
        gradients: all pieces with their gradient views, in the same order on all ranks.
        tp: tensor-parallel axis.
    """
    partial = [(piece, grad) for piece, grad in gradients if piece.tp == "partial"]
    if tp.group is None or not partial:
        return
    sizes = [math.prod(piece.global_shape) for piece, _ in partial]
    total = partial[0][1].new_zeros(sum(sizes))
    for (piece, grad), whole in zip(partial, total.split(sizes), strict=True):
        place_in(whole.view(piece.global_shape), piece, grad).copy_(grad)
    all_reduce_sum(total, tp)
    for (piece, grad), whole in zip(partial, total.split(sizes), strict=True):
        grad.copy_(place_in(whole.view(piece.global_shape), piece, grad))


def place_in(whole: Tensor, piece: Piece, part: Tensor) -> Tensor:
    """The view of the whole tensor that a rank's part fills."""
    return whole[
        tuple(slice(start, start + size) for start, size in zip(piece.offset, part.shape, strict=True))
    ]


def norm_shares(pieces: Iterable[tuple[Piece, Tensor]], tp: Axis) -> list[float]:
    """1 / (ranks of the axis that hold the same elements) of each piece, so that a sum over ranks counts each once."""
    shares = []
    for piece, part in pieces:
        same = tp.size * part.numel() // max(1, math.prod(piece.global_shape)) if piece.tp == "partial" else 1
        shares.append(1.0 / (tp.size if piece.tp == "replicated" else max(1, same)))
    return shares


def norm_over(norms: Tensor, shares: Tensor, axis: Axis) -> Tensor:
    """Norm of everything that the ranks of `axis` hold, each element counted once: a scalar like `norms`.

    Args:
        norms: [pieces] norm of each local piece.
        shares: [pieces] from `norm_shares`.
        axis: the ranks that hold the model between them.
    """
    square = (norms.double().square() * shares.double()).sum()
    return all_reduce_sum(square, axis).sqrt().to(norms.dtype)


def as_shares(shares: list[float], device: torch.device) -> Tensor:
    """Shares as the tensor `norm_over` takes."""
    return torch.tensor(shares, dtype=torch.float64, device=device)
