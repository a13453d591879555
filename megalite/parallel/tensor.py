"""Matrices cut over the tensor-parallel axis, and the token shards between them (Megatron's layers as functions).

A column-parallel product gives each rank some of the output features, a row-parallel one reads those and gives a
part of a sum. Between a row-parallel product and the next column-parallel one the activations are either whole on
every rank (the sum is an all-reduce) or, with sequence parallelism, split by tokens (a reduce-scatter before the
norms, an all-gather after them: the same bytes, and the norms' work and memory are split too).

Sources: Shoeybi et al., arXiv 1909.08053; Korthikanti et al., arXiv 2205.05198.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import megalite_kernels as kernels
from megalite.parallel.collectives import (
    all_gather,
    all_reduce_sum,
    reduce_from,
    reduce_scatter,
    reduce_scatter_to,
    start_all_gather,
    start_all_reduce,
    start_reduce_scatter,
    wait,
)
from megalite.parallel.mesh import ALONE, Axis


@dataclass(frozen=True, slots=True)
class TensorSplit:
    """How layers are cut: over which axis, and whether activations between them are split by tokens."""

    axis: Axis = ALONE
    sequence: bool = False

    def whole_tokens(self) -> TensorSplit:
        """The same cut of the weights with activations whole on every rank (generation, odd batches)."""
        return TensorSplit(self.axis)


UNSPLIT = TensorSplit()
"""One process holds everything."""


@dataclass(frozen=True, slots=True)
class Shard:
    """Rows of one projection that a rank holds, in numbers of rows of the whole."""

    total: int
    start: int
    size: int
    shared: bool = False
    """Other ranks hold the same rows too (key/value heads fewer than ranks): their gradients are summed."""

    @classmethod
    def whole(cls, total: int) -> Shard:
        """All rows."""
        return cls(total, 0, total)

    @classmethod
    def even(cls, total: int, axis: Axis) -> Shard:
        """This rank's even part."""
        rows = axis.shard(total)
        return cls(total, rows.start, rows.stop - rows.start)

    @classmethod
    def heads(cls, num_heads: int, head_dim: int, axis: Axis) -> Shard:
        """This rank's heads; with fewer heads than ranks, the one head that several ranks share."""
        if num_heads % axis.size == 0:
            return cls.even(num_heads * head_dim, axis)
        assert axis.size % num_heads == 0, f"{num_heads} heads over {axis.size} ranks"
        head = axis.rank * num_heads // axis.size
        return cls(num_heads * head_dim, head * head_dim, head_dim, shared=True)


def column_linear(x: Tensor, weight: Tensor, bias: Tensor | None, split: TensorSplit) -> Tensor:
    """x @ weight.T + bias with this rank's rows of the weight.

    Args:
        x: [..., I], the same on all ranks; with `split.sequence` this rank's tokens [T / tp, I].
        weight: [O / tp, I].
        bias: [O / tp] or None.

    Returns:
        [..., O / tp] of all tokens.
    """
    if split.axis.group is None:
        return F.linear(x, weight, bias)
    return _ColumnLinear.apply(x, weight, bias, split)


def row_linear(x: Tensor, weight: Tensor, bias: Tensor | None, split: TensorSplit) -> Tensor:
    """The sum over ranks of x @ weight.T, plus bias, with this rank's columns of the weight.

    Args:
        x: [..., I / tp] of all tokens.
        weight: [O, I / tp].
        bias: [O] or None, the same on all ranks, added once.

    Returns:
        [..., O]; with `split.sequence` this rank's tokens [T / tp, O].
    """
    if split.axis.group is None:
        return F.linear(x, weight, bias)
    out = _RowLinear.apply(x, weight, split)
    return out if bias is None else out + bias


def own_tokens(x: Tensor, split: TensorSplit) -> Tensor:
    """This rank's rows of x [T, ...], which needs no gradient and is the same on all ranks."""
    return x[split.axis.shard(x.shape[0])] if split.sequence else x


class _ColumnLinear(torch.autograd.Function):
    """The backward starts each collective before the product that hides it: dgrad, its sum, wgrad."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, split: TensorSplit) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.split, ctx.has_bias = split, bias is not None
        whole = all_gather(x, split.axis) if split.sequence else x
        return F.linear(whole, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        axis, sequence = ctx.split.axis, ctx.split.sequence
        # The tokens are gathered again, not kept: 1 / tp of the activation memory, hidden behind dgrad.
        whole, gathering = start_all_gather(x, axis) if sequence else (x, None)
        dx = dy @ weight
        if sequence:
            dx, summing = start_reduce_scatter(dx, axis)
        else:
            summing = start_all_reduce(dx, axis)
        wait(gathering)
        flat = dy.flatten(0, -2)
        dweight = flat.t() @ whole.flatten(0, -2)
        dbias = flat.sum(0) if ctx.has_bias else None
        wait(summing)
        return dx, dweight, dbias, None


class _RowLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, split: TensorSplit) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.split = split
        part = F.linear(x, weight)
        return reduce_scatter(part, split.axis) if split.sequence else all_reduce_sum(part, split.axis)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        whole = all_gather(dy, ctx.split.axis) if ctx.split.sequence else dy
        dx = whole @ weight
        dweight = whole.flatten(0, -2).t() @ x.flatten(0, -2)
        return dx, dweight, None


def vocab_embedding(ids: Tensor, weight: Tensor, first_row: int, split: TensorSplit) -> Tensor:
    """Rows of a matrix whose rows are split over the ranks.

    Args:
        ids: [...] int64; with `split.sequence` [T], all tokens.
        weight: [V / tp, H], rows from `first_row` on.

    Returns:
        [..., H]; with `split.sequence` this rank's tokens [T / tp, H].
    """
    if split.axis.group is None:
        return kernels.embedding(ids, weight)
    local = ids - first_row
    here = (local >= 0) & (local < weight.shape[0])
    rows = kernels.embedding(torch.where(here, local, 0), weight)
    part = rows.masked_fill(~here.unsqueeze(-1), 0.0)  # other ranks' tokens: zeros, and no gradient
    return reduce_scatter_to(part, split.axis) if split.sequence else reduce_from(part, split.axis)
