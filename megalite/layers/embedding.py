"""Token and position embeddings, and the matrix of the output head."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megalite.parallel.pieces import Init, Piece, TensorParallel, whole


class Embedding(nn.Module):
    """One row of `weight` for each index; also serves as the output head, which reads the same matrix.

    Args:
        num_rows: true number of rows (V, or the number of positions).
        hidden_size: row size (H).
        std: standard deviation of the initial weights.
        padded_rows: rows held in memory; those beyond `num_rows` stay zero and are in no file.
        tp: how the rows live under tensor parallelism.
    """

    def __init__(
        self,
        num_rows: int,
        hidden_size: int,
        *,
        std: float,
        padded_rows: int = 0,
        tp: TensorParallel = "replicated",
        **factory: Any,
    ) -> None:
        super().__init__()
        self.num_rows = num_rows
        self.std = std
        self.tp: TensorParallel = tp
        self.weight = nn.Parameter(torch.empty(padded_rows or num_rows, hidden_size, **factory))

    def declare_pieces(self, path: str) -> Iterator[tuple[str, Piece]]:
        shape = (self.num_rows, self.weight.shape[1])
        yield "weight", whole(f"{path}.weight", shape, Init.normal(self.std), tp=self.tp, decay=True)

    @property
    def rows(self) -> Tensor:
        """The true rows of the matrix, without padding: [V, H]."""
        return self.weight[: self.num_rows]

    def forward(self, indices: Tensor) -> Tensor:
        """[...] int64 → [..., H]."""
        return F.embedding(indices, self.weight)
