"""RMSNorm and LayerNorm, each fused with the residual addition before it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import megalite_kernels as kernels
from megalite.parallel.handover import Handover
from megalite.parallel.pieces import Init, Piece, TensorParallel, whole
from megalite.parallel.tensor import UNSPLIT, TensorSplit
from megalite_kernels.ops.quantized import Operand


class RMSNorm(nn.Module):
    """x / rms(x) * weight, over the last dim.

    Source: Zhang & Sennrich, arXiv 1910.07467.
    """

    def __init__(self, hidden_size: int, eps: float, split: TensorSplit = UNSPLIT, **factory: Any) -> None:
        super().__init__()
        self.eps = eps
        self.tp: TensorParallel = "partial" if split.sequence else "replicated"
        self.weight = nn.Parameter(torch.empty(hidden_size, **factory))
        self.quantizes = False
        """Only FP8 products with a scale for each row read the norm: it comes quantised too."""

    def declare_pieces(self, path: str) -> Iterator[tuple[str, Piece]]:
        shape = tuple(self.weight.shape)
        yield "weight", whole(f"{path}.weight", shape, Init.ones(), tp=self.tp, decay=False)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, given: Handover | None = None
    ) -> tuple[Operand, Tensor]:
        """Return (norm(x + residual), x + residual); without a residual, (norm(x), x).

        `given` is brought the norm again by the backward pass.
        """
        if self.quantizes:
            return _quantized(kernels.fp8_rms_norm, (x, self.weight, self.eps), residual)
        again = None if given is None else given.bring
        if residual is None:
            return kernels.rms_norm(x, self.weight, self.eps, again=again), x
        return kernels.rms_norm(x, self.weight, self.eps, residual=residual, again=again)


class LayerNorm(nn.Module):
    """(x - mean(x)) / std(x) * weight + bias, over the last dim.

    Source: Ba, Kiros & Hinton, arXiv 1607.06450.
    """

    def __init__(self, hidden_size: int, eps: float, split: TensorSplit = UNSPLIT, **factory: Any) -> None:
        super().__init__()
        self.eps = eps
        self.tp: TensorParallel = "partial" if split.sequence else "replicated"
        self.weight = nn.Parameter(torch.empty(hidden_size, **factory))
        self.bias = nn.Parameter(torch.empty(hidden_size, **factory))
        self.quantizes = False
        """As in `RMSNorm`."""

    def declare_pieces(self, path: str) -> Iterator[tuple[str, Piece]]:
        shape = tuple(self.weight.shape)
        yield "weight", whole(f"{path}.weight", shape, Init.ones(), tp=self.tp, decay=False)
        yield "bias", whole(f"{path}.bias", shape, Init.zeros(), tp=self.tp, decay=False)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, given: Handover | None = None
    ) -> tuple[Operand, Tensor]:
        """Return (norm(x + residual), x + residual); without a residual, (norm(x), x).

        `given` is brought the norm again by the backward pass.
        """
        if self.quantizes:
            return _quantized(kernels.fp8_layer_norm, (x, self.weight, self.bias, self.eps), residual)
        again = None if given is None else given.bring
        if residual is None:
            return kernels.layer_norm(x, self.weight, self.bias, self.eps, again=again), x
        return kernels.layer_norm(x, self.weight, self.bias, self.eps, residual=residual, again=again)


def _quantized(
    norm: Callable[..., Any], arguments: tuple[Any, ...], residual: Tensor | None
) -> tuple[Operand, Tensor]:
    if residual is None:
        return norm(*arguments), arguments[0]
    normed, total = norm(*arguments, residual=residual)
    return normed, total


NORMS: dict[str, type[RMSNorm] | type[LayerNorm]] = {"rms": RMSNorm, "layer": LayerNorm}
