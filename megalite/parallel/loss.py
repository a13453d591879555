"""Output head and cross-entropy, whole or with the vocabulary split over the tensor-parallel axis.

A whole head's gradient is made with the loss, in the forward pass, and added to its main gradient there.

Of a split one each rank computes four numbers per token from its own rows. One all-gather of them, the only collective
of the pass, gives every rank the loss and the logsumexp of the whole vocabulary, from which it makes the gradient of
its own rows. The backward pass sums the gradient of the hidden states. With sequence parallelism the hidden states are
gathered in each pass too. In chunks of tokens, a gather or a sum hides behind the products of another chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import megalite_kernels as kernels
from megalite.parallel.chunked import gathered_chunks, spans
from megalite.parallel.collectives import Work, all_gather, start_all_reduce, start_reduce_scatter, wait
from megalite.parallel.gradients import GradientSink, get_sink
from megalite.parallel.tensor import TensorSplit
from megalite_kernels.ops.cross_entropy_local import cross_entropy_combine
from megalite_kernels.ops.linear_cross_entropy_local import (
    linear_cross_entropy_local,
    linear_cross_entropy_local_grad,
)


def head_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    valid_rows: int,
    ignore_index: int,
    grad_scale: Tensor | None = None,
) -> Tensor:
    """Sum of the cross-entropies (nats) of all tokens: fp32 scalar.

    Args:
        hidden: [T, H].
        weight: [V, H]; rows beyond `valid_rows` are padding.
        labels: [T] int64.
        grad_scale: the gradient that the sum is going to get, where a backward pass follows and this is known. The
            weight's gradient then goes into its sink, if it has one, at once.
    """
    sink = get_sink(weight) if grad_scale is not None and torch.is_grad_enabled() else None
    main_grad, add = (None, True) if sink is None else sink.taken()
    loss = kernels.linear_cross_entropy(
        hidden,
        weight if sink is None else weight.detach(),
        labels,
        ignore_index=ignore_index,
        reduction="sum",
        valid_rows=valid_rows,
        main_grad=main_grad,
        main_grad_add=add,
        grad_scale=grad_scale,
    )
    if sink is not None:
        sink.added()
    return loss


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

    The weight's gradient goes into its sink, if it has one.

    Saved: hidden, labels, one float32 per token.
    """
    place = {"vocab_start": first_row, "valid_rows": valid_rows, "ignore_index": ignore_index}
    return _Losses.apply(hidden, weight, labels, split, place, vocab_size, get_sink(weight))


class _Losses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        split: TensorSplit,
        place: dict[str, Any],
        vocab_size: int,
        sink: GradientSink | None,
    ) -> Tensor:
        stats = hidden.new_empty((4, *labels.shape), dtype=torch.promote_types(hidden.dtype, torch.float32))
        for part, rows in _chunks(hidden, split, split.chunks if split.sequence else 1):
            own = linear_cross_entropy_local(rows, weight, _select(labels, part, split).flatten(), **place)
            _select(stats, part, split).copy_(own.view(4, -1, rows.shape[0] // _ranks(split)))
        every = all_gather(stats, split.axis).view(split.axis.size, *stats.shape)
        ignore = place["ignore_index"]
        loss, lse = cross_entropy_combine(every, labels, vocab_size=vocab_size, ignore_index=ignore)
        ctx.save_for_backward(hidden, weight, labels, lse)
        ctx.split, ctx.sink, ctx.options = split, sink, {**place, "vocab_size": vocab_size}
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        """The sum of a chunk's dx hides behind the next chunk's products."""
        hidden, weight, labels, lse = ctx.saved_tensors
        split = ctx.split
        total = ctx.sink.cleared() if ctx.sink is not None else None
        if total is None and split.chunks > 1:
            total = torch.zeros_like(weight, dtype=lse.dtype)
        summed: list[tuple[Tensor, Work]] = []
        for part, rows in _chunks(hidden, split, split.chunks):
            of_tokens = (_select(x, part, split).flatten().contiguous() for x in (labels, lse, dloss))
            dx, dweight, _ = linear_cross_entropy_local_grad(
                rows, weight, *of_tokens, main_grad=total, **ctx.options
            )
            summed.append(_start_sum(dx, split))
        if ctx.sink is not None:
            ctx.sink.added()
        elif total is not None:
            dweight = total.to(weight.dtype)
        for _, work in summed:
            wait(work)
        dx = summed[0][0] if len(summed) == 1 else torch.cat([part for part, _ in summed])
        return dx, dweight, *(None for _ in range(5))


def _chunks(hidden: Tensor, split: TensorSplit, chunks: int) -> Iterator[tuple[slice, Tensor]]:
    """(which tokens, hidden [t, H] of them) of the whole batch, as `_select` takes them."""
    if split.sequence:
        return gathered_chunks(hidden, split.axis, chunks)
    return ((part, hidden[part]) for part in spans(hidden.shape[0], chunks))


def _ranks(split: TensorSplit) -> int:
    """Ranks whose tokens lie one after the other in a whole batch."""
    return split.axis.size if split.sequence else 1


def _select(x: Tensor, part: slice, split: TensorSplit) -> Tensor:
    """A chunk of x [..., T] as `gathered_chunks` cuts it: the same tokens of every rank's part, [..., ranks, m]."""
    return x.unflatten(-1, (_ranks(split), -1))[..., part]


def _start_sum(dx: Tensor, split: TensorSplit) -> tuple[Tensor, Work]:
    """The sum over the ranks, or this rank's tokens of it, not waited for."""
    if split.sequence:
        return start_reduce_scatter(dx, split.axis)
    return dx, start_all_reduce(dx, split.axis)
