"""Output head and cross-entropy with the vocabulary split over the tensor-parallel axis: one collective per pass.

Each rank computes four numbers per token from its own rows of the head; one all-gather of them gives every rank the
loss and the logsumexp of the whole vocabulary, from which it makes the gradient of its own rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megalite.parallel.collectives import (
    all_gather,
    start_all_reduce,
    start_reduce_scatter,
    wait,
)
from megalite.parallel.tensor import TensorSplit
from megalite_kernels.ops.cross_entropy_local import cross_entropy_combine
from megalite_kernels.ops.linear_cross_entropy_local import (
    linear_cross_entropy_local,
    linear_cross_entropy_local_grad,
)


def vocab_parallel_losses(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    split: TensorSplit,
    *,
    first_row: int,
    valid_rows: int,
    vocab_size: int,
    ignore_index: int,
) -> Tensor:
    """Cross-entropy (nats) of every token, 0 where the label is `ignore_index`: fp32 [T], the same on all ranks.

    Args:
        hidden: [T, H], the same on all ranks; with `split.sequence` this rank's tokens [T / tp, H].
        weight: [V / tp, H], this rank's rows, from `first_row` on; those beyond `valid_rows` are padding.
        labels: [T] int64, all tokens.
        vocab_size: V without padding.

    Saved: hidden, labels, one float32 per token.
    """
    return _Losses.apply(hidden, weight, labels, split, first_row, valid_rows, vocab_size, ignore_index)


class _Losses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        split: TensorSplit,
        first_row: int,
        valid_rows: int,
        vocab_size: int,
        ignore_index: int,
    ) -> Tensor:
        whole = all_gather(hidden, split.axis) if split.sequence else hidden
        stats = linear_cross_entropy_local(
            whole, weight, labels, vocab_start=first_row, valid_rows=valid_rows, ignore_index=ignore_index
        )
        every = all_gather(stats, split.axis).view(split.axis.size, *stats.shape)
        loss, lse = cross_entropy_combine(every, labels, vocab_size=vocab_size, ignore_index=ignore_index)
        ctx.save_for_backward(hidden, weight, labels, lse)
        ctx.split, ctx.place = split, (first_row, valid_rows, vocab_size)
        ctx.ignore_index = ignore_index
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, lse = ctx.saved_tensors
        axis, sequence = ctx.split.axis, ctx.split.sequence
        whole = all_gather(hidden, axis) if sequence else hidden
        first_row, valid_rows, vocab_size = ctx.place
        dx, dweight, _ = linear_cross_entropy_local_grad(
            whole,
            weight,
            labels,
            lse,
            dloss.contiguous(),
            vocab_start=first_row,
            valid_rows=valid_rows,
            vocab_size=vocab_size,
            ignore_index=ctx.ignore_index,
        )
        if sequence:
            dx, summing = start_reduce_scatter(dx, axis)
        else:
            summing = start_all_reduce(dx, axis)
        wait(summing)
        return dx, dweight, *(None for _ in range(6))
