"""A `ModelState` with nothing but values: any layout's boxes, without the layers and collectives that train in it."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megalite.config import ModelConfig
from megalite.models.blocks import ModelPart
from megalite.models.transformer import Transformer
from megalite.parallel.mesh import Axis
from megalite.parallel.pieces import Box, Piece, boxes_of_range, iter_pieces
from megalite.parallel.state import Kind, OptimizerShard
from megalite.parallel.tensor import TensorSplit

KINDS: tuple[Kind, ...] = ("master", "exp_avg", "exp_avg_sq")
Division = Literal["none", "flat", "rows"]
"""How data-parallel ranks divide the state: not at all, by ranges of a flat buffer, by rows of each parameter."""


@dataclass(frozen=True)
class Layout:
    """Degrees of parallelism; ranks with tp innermost, pp outermost."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    division: Division = "flat"

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.tp * self.pp * self.dp

    def place(self, rank: int) -> tuple[int, int, int]:
        """tp, dp and pp rank."""
        return rank % self.tp, rank // self.tp % self.dp, rank // self.tp // self.dp


class BoxedState:
    """The masters and moments that one rank of a layout would hold."""

    def __init__(self, config: ModelConfig, layout: Layout, rank: int, fill: float | None = None) -> None:
        tp, dp, pp = layout.place(rank)
        per_stage = config.num_layers // layout.pp
        part = ModelPart(
            tuple(range(pp * per_stage, (pp + 1) * per_stage)), embedding=pp == 0, head=pp == layout.pp - 1
        )
        model = Transformer(config, TensorSplit(Axis(layout.tp, tp)), part=part, device="meta")
        self.tied_rank = int(pp > 0)
        self.updated = False
        self._boxes = {kind: _boxes(model, layout, dp) for kind in KINDS}
        for kind in KINDS:
            for box in self._boxes[kind]:
                box.tensor.copy_(value_of(kind, box.piece)[box.index]) if fill is None else box.tensor.fill_(
                    fill
                )

    def boxes(self, kind: Kind) -> list[Box]:
        """See `ModelState`."""
        return self._boxes[kind]

    def zero_state(self) -> None:
        """See `ModelState`."""
        for box in (box for boxes in self._boxes.values() for box in boxes):
            box.tensor.zero_()

    def copy_master_to_weights(self) -> None:
        """Note that it was called: there are no weights."""
        self.updated = True

    def wrong(self) -> list[str]:
        """What does not hold the values that every layout starts with."""
        return [
            f"{kind} {box.piece.name} at {box.offset}"
            for kind in KINDS
            for box in self._boxes[kind]
            if not torch.equal(box.tensor, value_of(kind, box.piece)[box.index])
        ]

    def start_step(self, num_microbatches: int) -> None:
        """Not needed."""

    def finish_gradients(self) -> None:
        """Not needed."""

    def publish(self) -> None:
        """Not needed."""

    def release(self) -> None:
        """Not needed."""

    def local_finite(self) -> Tensor:
        """Not needed."""
        return torch.tensor(True)

    def optimizer_shards(self) -> list[OptimizerShard]:
        """Not needed."""
        return []

    def box_copies(self) -> list[int]:
        """Not needed."""
        return []


def value_of(kind: str, piece: Piece) -> Tensor:
    """A whole tensor: the same in every layout, different for every name."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{kind}/{piece.name}".encode()))
    return torch.randn(piece.global_shape, generator=generator)


def _boxes(model: Transformer, layout: Layout, dp: int) -> list[Box]:
    count = 1 if layout.division == "none" else layout.dp
    index = 0 if layout.division == "none" else dp
    parameters: dict[str, list[tuple[Piece, torch.Size]]] = {}
    for parameter, name, piece in iter_pieces(model):
        parameters.setdefault(name, []).append((piece, parameter.shape))
    total = sum(pieces[0][1].numel() for pieces in parameters.values())
    boxes, end = [], 0
    for pieces in parameters.values():
        start, shape = end, pieces[0][1]
        end = start + shape.numel()
        if layout.division == "rows":
            width = math.prod(shape[1:])
            rows = -(-shape[0] // count)
            own = range(
                start + min(index * rows, shape[0]) * width, start + min((index + 1) * rows, shape[0]) * width
            )
        else:
            size = -(-total // count)
            own = range(index * size, (index + 1) * size)
        for piece, _ in pieces:
            boxes += _own_part(piece, shape, start, own)
    return boxes


def _own_part(piece: Piece, shape: torch.Size, start: int, own: range) -> list[Box]:
    """Boxes of the piece's elements in a range of the buffer in which its parameter begins at `start`."""
    width = math.prod(shape[1:])
    first, last = start + piece.rows[0] * width, start + piece.rows[1] * width
    low, high = max(first, own.start), min(last, own.stop)
    if low >= high:
        return []
    local = (piece.rows[1] - piece.rows[0], *shape[1:])
    return list(boxes_of_range(piece, local, torch.empty(high - low), low - first))
