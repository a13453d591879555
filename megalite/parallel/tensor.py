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
from megalite.parallel.chunked import gather_product, product_scatter, product_sum
from megalite.parallel.collectives import reduce_from, reduce_scatter_to, start_all_gather, wait
from megalite.parallel.gradients import GradientSink, add_weight_gradient, get_sink
from megalite.parallel.handover import Handover
from megalite.parallel.mesh import ALONE, Axis
from megalite_kernels.ops.embedding import accumulate_embedding_gradient
from megalite_kernels.ops.linear import matrix, project, project_back


@dataclass(frozen=True, slots=True)
class TensorSplit:
    """How layers are cut: over which axis, and whether activations between them are split by tokens."""

    axis: Axis = ALONE
    sequence: bool = False
    chunks: int = 1
    """Parts into which a product is cut where only its own parts can hide the communication that it needs."""

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


def takes_handover(weight: Tensor, split: TensorSplit, *, row: bool) -> bool:
    """A `column_linear` or `row_linear` with this weight, called now, can be given a `Handover` for its input.

    Not a column-parallel one that is cut: its weight gradient hides the sum of the input's gradient, which the layer
    that would bring the input has to wait for. Not where the weight's gradient is autograd's, which wants it at once.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or get_sink(weight) is None:
        return False
    return row or split.axis.group is None


def column_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    split: TensorSplit,
    given: Handover | None = None,
) -> Tensor:
    """x @ weight.T + bias with this rank's rows of the weight.

    Args:
        x: [..., I], the same on all ranks; with `split.sequence` this rank's tokens [T / tp, I].
        weight: [O / tp, I].
        bias: [O / tp] or None.
        given: brings x again in the backward pass, so that it is not kept; where `takes_handover` says so.

    Returns:
        [..., O / tp] of all tokens.
    """
    sink = get_sink(weight)
    if split.axis.group is None and sink is None:
        return kernels.linear(x, weight, bias=bias)
    if sink is not None and torch.compiler.is_compiling():
        # A graph adds into the main gradient, but calls nobody: `announce` tells the sink.
        return kernels.linear(x, weight, bias=bias, main_grad=sink.main_grad)
    return _ColumnLinear.apply(x, weight, bias, split, sink, given)


def row_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    split: TensorSplit,
    given: Handover | None = None,
) -> Tensor:
    """The sum over ranks of x @ weight.T, plus bias, with this rank's columns of the weight.

    Args:
        x: [..., I / tp] of all tokens.
        weight: [O, I / tp].
        bias: [O] or None, the same on all ranks, added once.
        given: as in `column_linear`.

    Returns:
        [..., O]; with `split.sequence` this rank's tokens [T / tp, O].
    """
    if split.axis.group is None:
        return column_linear(x, weight, bias, split, given)
    out = _RowLinear.apply(x, weight, split, get_sink(weight), given)
    return out if bias is None else out + bias


def own_tokens(x: Tensor, split: TensorSplit) -> Tensor:
    """This rank's rows of x [T, ...], which needs no gradient and is the same on all ranks."""
    return x[split.axis.shard(x.shape[0])] if split.sequence else x


def _save(ctx: Any, x: Tensor, weight: Tensor, given: Handover | None) -> None:
    """For a product's backward pass: the weight last, and the input unless it is brought."""
    ctx.given = given
    ctx.save_for_backward(*((x, weight) if given is None else (weight,)))


def _wait_for_input(ctx: Any, dy: Tensor) -> None:
    """Add the weight's gradient when the product's input is there."""
    sink: GradientSink = ctx.sink

    def use(x: Tensor) -> None:
        add_weight_gradient(sink, dy, x)

    ctx.given.wait(use)


class _ColumnLinear(torch.autograd.Function):
    """The backward starts each collective before the product that hides it: dgrad, its sum, wgrad."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        split: TensorSplit,
        sink: GradientSink | None,
        given: Handover | None,
    ) -> Tensor:
        _save(ctx, x, weight, given)
        ctx.split, ctx.sink, ctx.has_bias = split, sink, bias is not None
        if split.sequence:
            return gather_product(x, weight.t(), bias, split.axis, split.chunks)[0]
        return project(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        flat = matrix(dy)
        if ctx.split.axis.group is None:
            *kept, weight = ctx.saved_tensors
            dx, dweight = project_back(dy, weight), None
            if ctx.given is not None:
                _wait_for_input(ctx, flat)
            else:
                dweight = add_weight_gradient(ctx.sink, flat, kept[0])
            return dx, dweight, flat.sum(0) if ctx.has_bias else None, None, None, None
        x, weight = ctx.saved_tensors
        axis, sequence = ctx.split.axis, ctx.split.sequence
        # The tokens are gathered again, not kept: 1 / tp of the activation memory, hidden behind dgrad.
        whole, gathering = start_all_gather(x, axis) if sequence else (x, None)
        # A wgrad that is put off hides nothing: dgrad then hides its own sum.
        chunks = ctx.split.chunks if ctx.sink is not None and ctx.sink.queue is not None else 1
        dx, summing = (product_scatter if sequence else product_sum)(flat, weight, axis, chunks)
        wait(gathering)
        dweight = add_weight_gradient(ctx.sink, flat, whole)
        dbias = flat.sum(0) if ctx.has_bias else None
        for work in summing:
            wait(work)
        return dx.view(x.shape), dweight, dbias, None, None, None


class _RowLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        split: TensorSplit,
        sink: GradientSink | None,
        given: Handover | None,
    ) -> Tensor:
        _save(ctx, x, weight, given)
        ctx.split, ctx.sink, ctx.input_shape = split, sink, x.shape
        multiply = product_scatter if split.sequence else product_sum
        out, summing = multiply(x.flatten(0, -2), weight.t(), split.axis, split.chunks)
        for work in summing:
            wait(work)
        return out if split.sequence else out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        *kept, weight = ctx.saved_tensors
        if ctx.split.sequence:
            dx, whole = gather_product(dy, weight, None, ctx.split.axis, ctx.split.chunks, keep=True)
            assert whole is not None
        else:
            dx, whole = project_back(dy, weight), dy
        dx = dx.view(ctx.input_shape)
        if ctx.given is not None:
            _wait_for_input(ctx, whole)
            return dx, None, None, None, None
        return dx, add_weight_gradient(ctx.sink, whole, kept[0]), None, None, None


def embedding_rows(ids: Tensor, weight: Tensor) -> Tensor:
    """`weight[ids]`, whose gradient goes into the weight's sink where it has one."""
    sink = get_sink(weight)
    return kernels.embedding(ids, weight) if sink is None else _SinkEmbedding.apply(ids, weight, sink)


class _SinkEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, sink: GradientSink) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.sink = sink
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, None, None]:
        (ids,) = ctx.saved_tensors
        accumulate_embedding_gradient(dy, ids, ctx.sink.cleared())
        ctx.sink.added()
        return None, None, None


def vocab_embedding(ids: Tensor, weight: Tensor, first_row: int, split: TensorSplit) -> Tensor:
    """Rows of a matrix whose rows are split over the ranks.

    Args:
        ids: [...] int64; with `split.sequence` [T], all tokens.
        weight: [V / tp, H], rows from `first_row` on.

    Returns:
        [..., H]; with `split.sequence` this rank's tokens [T / tp, H].
    """
    if split.axis.group is None:
        return embedding_rows(ids, weight)
    local = ids - first_row
    here = (local >= 0) & (local < weight.shape[0])
    rows = embedding_rows(torch.where(here, local, 0), weight)
    part = rows.masked_fill(~here.unsqueeze(-1), 0.0)  # other ranks' tokens: zeros, and no gradient
    return reduce_scatter_to(part, split.axis) if split.sequence else reduce_from(part, split.axis)
