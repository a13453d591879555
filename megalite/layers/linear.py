"""A projection, or several that read the same input and so share one matrix product."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

import megalite_kernels as kernels
from megalite.parallel.pieces import Init, Piece, TensorParallel, whole


class Linear(nn.Module):
    """y = x @ weight.T + bias, the rows of `weight` being those of all `outputs` in turn.

    Args:
        in_features: size of the input's last dim.
        outputs: name → rows of each projection; canonical names are `<parent>.<name>.weight` and `.bias`.
        bias: add a bias.
        std: standard deviation of the initial weights.
        split: which dim tensor parallelism cuts: "column" the outputs, "row" the inputs.
    """

    def __init__(
        self,
        in_features: int,
        outputs: Mapping[str, int],
        *,
        bias: bool,
        std: float,
        split: Literal["column", "row"],
        **factory: Any,
    ) -> None:
        super().__init__()
        self.outputs = dict(outputs)
        self.std = std
        self.split = split
        self.weight = nn.Parameter(torch.empty(sum(outputs.values()), in_features, **factory))
        self.bias = nn.Parameter(torch.empty(sum(outputs.values()), **factory)) if bias else None

    def declare_pieces(self, path: str) -> Iterator[tuple[str, Piece]]:
        parent = path.rpartition(".")[0]
        bias_tp: TensorParallel = "sharded" if self.split == "column" else "replicated"
        normal, zeros = Init.normal(self.std), Init.zeros()
        first = 0
        for output, rows in self.outputs.items():
            name = f"{parent}.{output}" if parent else output
            shape = (rows, self.weight.shape[1])
            yield "weight", whole(f"{name}.weight", shape, normal, tp="sharded", decay=True, first_row=first)
            if self.bias is not None:
                yield "bias", whole(f"{name}.bias", (rows,), zeros, tp=bias_tp, decay=False, first_row=first)
            first += rows

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] → [..., out]."""
        return kernels.linear(x, self.weight, bias=self.bias)
