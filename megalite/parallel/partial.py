"""Gradients that each tensor-parallel rank has only a part of, and norms that count every element once.

A rank's gradient of a norm weight under sequence parallelism comes from its own tokens; that of a key head which
several ranks share comes from their query heads. The parts are laid side by side in one buffer, by which rows of the
whole tensor a rank holds, and summed by one all-reduce.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from megalite.parallel.collectives import all_reduce_sum
from megalite.parallel.mesh import Axis, Mesh
from megalite.parallel.pieces import Box, Piece
from megalite_kernels.ops.grad_norm import grad_norms


def sum_partial(boxes: Iterable[Box], tp: Axis) -> None:
    """Replace every box of a piece that is "partial" by its sum over the ranks that hold the same rows, in place.

    Args:
        boxes: of the gradients. All tensor-parallel ranks cut their pieces alike, so they have boxes of equal shapes
            in the same order, although the rows that those hold may differ.
        tp: tensor-parallel axis.
    """
    partial = [box for box in boxes if box.piece.tp == "partial"]
    if tp.group is None or not partial:
        return
    total = partial[0].tensor.new_zeros(sum(holders(box.piece)[1] * box.tensor.numel() for box in partial))
    places, end = [], 0
    for box in partial:
        index, count = holders(box.piece)
        size = box.tensor.numel()
        places.append(total[end + index * size : end + (index + 1) * size].view(box.tensor.shape))
        end += count * size
        places[-1].copy_(box.tensor)
    all_reduce_sum(total, tp)
    for box, place in zip(partial, places, strict=True):
        box.tensor.copy_(place)


def holders(piece: Piece) -> tuple[int, int]:
    """(which, of how many) equal parts of the rows of the whole tensor the local part of a piece is."""
    rows = max(1, piece.rows[1] - piece.rows[0])
    return piece.offset[0] // rows, max(1, piece.global_shape[0] // rows)


def tp_copies(piece: Piece, tp: Axis) -> int:
    """Tensor-parallel ranks that hold the same elements of a piece as this one."""
    if piece.tp == "sharded":
        return 1
    return tp.size if piece.tp == "replicated" else max(1, tp.size // holders(piece)[1])


def box_copies(boxes: Iterable[Box], mesh: Mesh, data_copies: int) -> list[int]:
    """Processes of the world that hold each box, when `data_copies` data-parallel ranks do."""
    return [
        data_copies * tp_copies(box.piece, mesh.tp) * (mesh.tied.size if box.piece.tied else 1)
        for box in boxes
    ]


def box_norms(boxes: Sequence[Box], device: torch.device) -> Tensor:
    """Euclidean norm of each box, in the order given: [boxes], of the boxes' dtype."""
    if not boxes:
        return torch.zeros(0, device=device)
    return grad_norms([box.tensor for box in boxes])


def total_norm(norms: Tensor, copies: Tensor | Sequence[int], world: Axis) -> Tensor:
    """Norm of everything that the processes of the world hold, each element counted once: a scalar like `norms`.

    Squares are added in float64.

    Args:
        norms: [boxes] norm of each box of this process.
        copies: how many processes hold each box (`ModelState.box_copies`); a float64 tensor beside the norms costs no
            copy from the host.
        world: all processes.
    """
    shares = torch.as_tensor(copies, dtype=torch.float64, device=norms.device)
    square = (norms.double().square() / shares).sum()
    return all_reduce_sum(square, world).sqrt().to(norms.dtype)
