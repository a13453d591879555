"""A projection, or several that read the same input and so share one matrix product."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from megalite.parallel.fp8 import fp8_column_linear, fp8_row_linear
from megalite.parallel.fp8_weights import WeightCopies, keep_copies
from megalite.parallel.handover import Handover
from megalite.parallel.pieces import Init, Piece, TensorParallel
from megalite.parallel.tensor import Shard, TensorSplit, column_linear, row_linear, takes_handover
from megalite_kernels.ops.fp8_linear import Scaling
from megalite_kernels.ops.quantized import Operand, QuantizedTensor


class ColumnParallelLinear(nn.Module):
    """y = x @ weight.T + bias; `weight` holds this rank's rows of all `outputs` in turn.

    Args:
        in_features: size of the input's last dim.
        outputs: name → this rank's rows of each projection; canonical names are `<parent>.<name>.weight` and
            `.bias`.
        split: how the layer is cut; without an axis every shard is whole.
        bias: add a bias.
        std: standard deviation of the initial weights.
    """

    def __init__(
        self,
        in_features: int,
        outputs: Mapping[str, Shard],
        split: TensorSplit,
        *,
        bias: bool,
        std: float,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.outputs = dict(outputs)
        self.split = split
        self.std = std
        self.fp8: Scaling | None = None
        rows = sum(shard.size for shard in outputs.values())
        self.weight = nn.Parameter(torch.empty(rows, in_features, **factory))
        self.bias = nn.Parameter(torch.empty(rows, **factory)) if bias else None

    def declare_pieces(self, path: str) -> Iterator[tuple[str, Piece]]:
        parent = path.rpartition(".")[0]
        normal, zeros = Init.normal(self.std), Init.zeros()
        first, columns = 0, self.weight.shape[1]
        for output, shard in self.outputs.items():
            name = f"{parent}.{output}" if parent else output
            rows = (first, first + shard.size)
            tp: TensorParallel = "partial" if shard.shared else "sharded"
            yield (
                "weight",
                Piece(
                    f"{name}.weight", (shard.total, columns), (shard.start, 0), rows, tp, normal, decay=True
                ),
            )
            if self.bias is not None:
                yield (
                    "bias",
                    Piece(f"{name}.bias", (shard.total,), (shard.start,), rows, tp, zeros, decay=False),
                )
            first += shard.size

    def handover(self, split: TensorSplit | None = None) -> Handover | None:
        """What can bring the next call's input again in the backward pass; None: the call has to keep it."""
        takes = self.fp8 is None and takes_handover(self.weight, split or self.split, row=False)
        return Handover() if takes else None

    def forward(self, x: Operand, split: TensorSplit | None = None, given: Handover | None = None) -> Tensor:
        """[..., in] → [..., rows]; `split` says how the tokens of x lie, by default as the layer was made.

        `given`, of `handover`, will bring x again, which is not kept then.
        """
        split = split or self.split
        if self.fp8 is not None:
            return fp8_column_linear(x, self.weight, self.bias, split, self.fp8)
        assert not isinstance(x, QuantizedTensor)
        return column_linear(x, self.weight, self.bias, split, given)


class RowParallelLinear(nn.Module):
    """y = x @ weight.T + bias, summed over the ranks; `weight` holds this rank's columns.

    Args:
        inputs: this rank's part of the input's last dim.
        out_features: size of the output's last dim.
        name: canonical name is `<parent>.<name>`.
        split, bias, std: as in `ColumnParallelLinear`; the bias is the same on all ranks and added once.
    """

    def __init__(
        self,
        inputs: Shard,
        out_features: int,
        split: TensorSplit,
        *,
        name: str,
        bias: bool,
        std: float,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.inputs, self.name = inputs, name
        self.split = split
        self.std = std
        self.fp8: Scaling | None = None
        self.weight = nn.Parameter(torch.empty(out_features, inputs.size, **factory))
        self.bias = nn.Parameter(torch.empty(out_features, **factory)) if bias else None

    def declare_pieces(self, path: str) -> Iterator[tuple[str, Piece]]:
        parent = path.rpartition(".")[0]
        name = f"{parent}.{self.name}" if parent else self.name
        rows = (0, self.weight.shape[0])
        shape, offset = (rows[1], self.inputs.total), (0, self.inputs.start)
        yield (
            "weight",
            Piece(f"{name}.weight", shape, offset, rows, "sharded", Init.normal(self.std), decay=True),
        )
        if self.bias is not None:
            # With sequence parallelism a rank adds it to its own tokens only.
            tp: TensorParallel = "partial" if self.split.sequence else "replicated"
            yield "bias", Piece(f"{name}.bias", rows[1:], (0,), rows, tp, Init.zeros(), decay=False)

    def handover(self, split: TensorSplit | None = None) -> Handover | None:
        """As `ColumnParallelLinear.handover`."""
        takes = self.fp8 is None and takes_handover(self.weight, split or self.split, row=True)
        return Handover() if takes else None

    def forward(self, x: Operand, split: TensorSplit | None = None, given: Handover | None = None) -> Tensor:
        """[..., in / tp] → [..., out]; `split` says how the tokens of the output lie, `given` may bring x again."""
        split = split or self.split
        if self.fp8 is not None:
            return fp8_row_linear(x, self.weight, self.bias, split, self.fp8)
        assert not isinstance(x, QuantizedTensor)
        return row_linear(x, self.weight, self.bias, split, given)


def keep_fp8_copies(model: nn.Module) -> list[WeightCopies]:
    """Let a step's micro-batches share the FP8 copies of a model's weights, for `quantized_once`.

    After the model was moved into its state, which may make other parameters.
    """
    return [
        keep_copies(module.weight, module.fp8)
        for module in model.modules()
        if isinstance(module, (ColumnParallelLinear, RowParallelLinear)) and module.fp8 is not None
    ]


def use_fp8(model: nn.Module, scaling: Scaling | None) -> None:
    """Multiply in FP8 in every projection of a model's blocks, or (None) in the weights' own type.

    With a scale for each row, what feeds a projection quantises while it writes (`feeds_projections` names it); one
    scale for all would be known only when all is written.
    """
    for module in model.modules():
        if isinstance(module, (ColumnParallelLinear, RowParallelLinear)):
            module.fp8 = scaling
        for name in getattr(module, "feeds_projections", ()):
            getattr(module, name).quantizes = scaling == "rowwise"
