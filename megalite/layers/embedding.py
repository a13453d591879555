"""Token and position embeddings, and the matrix of the output head."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from megalite.parallel.pieces import Init, Piece, TensorParallel, whole
from megalite.parallel.tensor import UNSPLIT, TensorSplit, embedding_rows, vocab_embedding


class VocabParallelEmbedding(nn.Module):
    """One row of `weight` for each token id; also serves as the output head, which reads the same matrix.

    Args:
        vocab_size: true number of rows (V).
        hidden_size: row size (H).
        split: each rank holds an even part of the padded rows.
        padded_rows: rows of all ranks together; those beyond `vocab_size` stay zero and are in no file.
        std: standard deviation of the initial weights.
        copy_of: canonical name of a matrix that another pipeline stage holds too (tied embeddings).
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        split: TensorSplit = UNSPLIT,
        *,
        padded_rows: int,
        std: float,
        copy_of: str | None = None,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.copy_of = copy_of
        self.split = split
        self.std = std
        rows = split.axis.shard(padded_rows)
        self.first_row = rows.start
        self.valid_rows = max(0, min(vocab_size, rows.stop) - rows.start)
        self.weight = nn.Parameter(torch.empty(rows.stop - rows.start, hidden_size, **factory))

    def declare_pieces(self, path: str) -> Iterator[tuple[str, Piece]]:
        shape = (self.vocab_size, self.weight.shape[1])
        offset, rows = (min(self.first_row, self.vocab_size), 0), (0, self.valid_rows)
        name, tied, init = f"{self.copy_of or path}.weight", self.copy_of is not None, Init.normal(self.std)
        yield "weight", Piece(name, shape, offset, rows, "sharded", init, decay=True, tied=tied)

    @property
    def rows(self) -> Tensor:
        """The true rows that this rank holds, without padding: [valid_rows, H]."""
        return self.weight[: self.valid_rows]

    def forward(self, ids: Tensor, split: TensorSplit | None = None) -> Tensor:
        """[...] int64 → [..., H]; `split` says how the tokens of the result lie."""
        return vocab_embedding(ids, self.weight, self.first_row, split or self.split)


class PositionEmbedding(nn.Module):
    """One row of `weight` for each position (GPT-2); the same on all ranks."""

    def __init__(
        self,
        max_positions: int,
        hidden_size: int,
        split: TensorSplit = UNSPLIT,
        *,
        std: float,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.split = split
        self.std = std
        self.weight = nn.Parameter(torch.empty(max_positions, hidden_size, **factory))

    def declare_pieces(self, path: str) -> Iterator[tuple[str, Piece]]:
        # With sequence parallelism a rank's gradient comes from its own tokens only.
        tp: TensorParallel = "partial" if self.split.sequence else "replicated"
        shape = tuple(self.weight.shape)
        yield "weight", whole(f"{path}.weight", shape, Init.normal(self.std), tp=tp, decay=True)

    def forward(self, positions: Tensor) -> Tensor:
        """[...] int64 → [..., H]."""
        return embedding_rows(positions, self.weight)
