"""FP8 copies of weights that live as long as the weights stay as they are: while one step's micro-batches run.

Each product quantises its weight: the forward pass by rows (3 bytes an element moved for 16-bit weights), the gradient
of its input by columns (5). With M micro-batches that is the same work M times. A `WeightCopies` keeps the results of
the first, 2 bytes an element, and gives the others those bits.

They exist only inside `quantized_once`, which surrounds the forward and backward passes of a step: whatever changes
weights (the optimizer, a checkpoint, the arrival of other ranks' parts before the first use) comes before or after
it, so a copy cannot be old. Passes outside of it, such as validation, quantise for themselves. Nothing is kept between
steps, and a CUDA graph of a step has the quantisation, and the copies' memory, in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from megalite_kernels.ops import fp8_linear as steps
from megalite_kernels.ops.fp8_linear import Quantized, QuantizedWeight, Scaling


class WeightCopies:
    """Of one weight; made when they are first asked for."""

    def __init__(self, scaling: Scaling) -> None:
        self.scaling = scaling
        self.live = False
        self.rows: Quantized | None = None
        self.columns: Quantized | None = None

    def start(self) -> None:
        """Keep what is made from now on."""
        self.live = True

    def drop(self) -> None:
        """The weight may change."""
        self.live, self.rows, self.columns = False, None, None

    def forward(self, weight: Tensor) -> Quantized:
        """For `forward_product`."""
        rows = self.rows or steps.quantize(weight, self.scaling)
        if self.live:
            self.rows = rows
        return rows

    def backward(self, weight: Tensor, weight_scale: Tensor | None) -> Quantized:
        """For `input_gradient`; `weight_scale` as in `weight_columns`."""
        columns = self.columns or steps.weight_columns(weight, weight_scale, self.scaling)
        if self.live:
            self.columns = columns
        return columns

    def both(self, weight: Tensor) -> None:
        """Make what is missing, for a graph that finds them made."""
        with torch.no_grad():
            self.backward(weight, self.forward(weight)[1])

    @property
    def made(self) -> QuantizedWeight | None:
        """Both, where they are made."""
        return None if self.rows is None or self.columns is None else QuantizedWeight(self.rows, self.columns)


def keep_copies(weight: nn.Parameter, scaling: Scaling) -> WeightCopies:
    """Give a parameter copies, which it has within `quantized_once`."""
    copies = WeightCopies(scaling)
    weight.fp8_copies = copies  # type: ignore[attr-defined]
    return copies


def get_copies(weight: Tensor) -> WeightCopies | None:
    """The parameter's copies, if it may have them."""
    return getattr(weight, "fp8_copies", None)


@contextmanager
def quantized_once(copies: Sequence[WeightCopies], uses: int) -> Iterator[None]:
    """Inside, the first product that reads one of these weights quantises it for all, of `uses` micro-batches.

    One micro-batch uses each copy once: none is kept then.
    """
    try:
        for one in copies if uses > 1 else ():
            one.start()
        yield
    finally:
        for one in copies:
            one.drop()
