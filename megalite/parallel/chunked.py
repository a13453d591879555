"""Products whose communication hides behind the product itself, cut by tokens into chunks.

A gather before a product, or a sum after it, has nothing else to hide behind: in chunks, the communication of one
runs while another is multiplied, and only the first gather or the last sum stays exposed. Every output row is the
same sum as without chunks.

With sequence parallelism rank r holds tokens r * n .. (r + 1) * n. A chunk is the same rows of every rank's part,
so that gathering or scattering it gives each rank rows that stand together; in the whole [ranks * n, ...], seen as
[ranks, n, ...], it is a slice of dim 1, which the batched product reads and writes where it is.

Source: Wang et al., ASPLOS 2023 (decomposition of dependent collectives), doi 10.1145/3567955.3567959.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from megalite.parallel.collectives import (
    Work,
    start_all_gather,
    start_all_reduce,
    start_reduce_scatter,
    wait,
)
from megalite.parallel.mesh import Axis
from megalite_kernels.ops.linear import project


def spans(rows: int, chunks: int) -> list[slice]:
    """`rows` in `chunks` parts whose sizes differ by one at most; fewer parts if there are fewer rows."""
    parts = max(1, min(rows, chunks))
    edges = [i * rows // parts for i in range(parts + 1)]
    return [slice(a, b) for a, b in pairwise(edges)]


def gathered_chunks(shard: Tensor, axis: Axis, chunks: int) -> Iterator[tuple[slice, Tensor]]:
    """Tokens of all ranks, chunk by chunk, the next on its way while the caller works on one.

    Args:
        shard: [n, ...], this rank's tokens.
        chunks: parts of n; they need not divide it.

    Yields:
        (the chunk's m rows among each rank's n, those rows of all ranks [ranks * m, ...]).
    """
    parts = spans(shard.shape[0], chunks)
    arriving = start_all_gather(shard[parts[0]], axis)
    for part, following in zip(parts, [*parts[1:], None], strict=True):
        rows, work = arriving
        if following is not None:
            arriving = start_all_gather(shard[following], axis)
        wait(work)
        yield part, rows


def gather_product(
    shard: Tensor, factor: Tensor, bias: Tensor | None, axis: Axis, chunks: int, *, keep: bool = False
) -> tuple[Tensor, Tensor | None]:
    """all_gather(shard) @ factor + bias; the next chunk is gathered while one is multiplied.

    Args:
        shard: [n, I], this rank's tokens.
        factor: [I, O].
        bias: [O] or None.
        chunks: parts of n; they need not divide it.
        keep: give the gathered tokens back too.

    Returns:
        (product [ranks * n, O], gathered [ranks * n, I] or None).
    """
    if chunks == 1:
        ((_, whole),) = gathered_chunks(shard, axis, chunks)
        return _product(whole, factor, bias), whole
    gathered = shard.new_empty((axis.size, *shard.shape)) if keep else None
    out = shard.new_empty((axis.size, shard.shape[0], factor.shape[1]))
    for part, rows in gathered_chunks(shard, axis, chunks):
        rows = rows.unflatten(0, (axis.size, -1))
        _product(rows, factor, bias, out=out[:, part])
        if gathered is not None:
            gathered[:, part] = rows
    return out.flatten(0, 1), None if gathered is None else gathered.flatten(0, 1)


def product_scatter(x: Tensor, factor: Tensor, axis: Axis, chunks: int) -> tuple[Tensor, list[Work]]:
    """reduce_scatter(x @ factor), not waited for; one chunk is summed while the next is multiplied.

    Args:
        x: [ranks * n, I].
        factor: [I, O].

    Returns:
        (this rank's tokens [n, O], what to wait for).
    """
    rows = x.shape[0] // axis.size
    parts = spans(rows, chunks)
    if len(parts) == 1:
        shard, work = start_reduce_scatter(_product(x, factor, None), axis)
        return shard, [work]
    by_rank = x.unflatten(0, (axis.size, rows))
    shard = x.new_empty((rows, factor.shape[1]))
    works = []
    for part in parts:
        product = _product(by_rank[:, part], factor, None).flatten(0, 1)
        works.append(start_reduce_scatter(product, axis, out=shard[part])[1])
    return shard, works


def product_sum(x: Tensor, factor: Tensor, axis: Axis, chunks: int) -> tuple[Tensor, list[Work]]:
    """all_reduce(x @ factor), not waited for; one chunk is summed while the next is multiplied.

    Args:
        x: [T, I].
        factor: [I, O].

    Returns:
        (sum over the ranks [T, O], what to wait for).
    """
    parts = spans(x.shape[0], chunks)
    if len(parts) == 1:
        product = _product(x, factor, None)
        return product, [start_all_reduce(product, axis)]
    out = x.new_empty((x.shape[0], factor.shape[1]))
    works = []
    for part in parts:
        _product(x[part], factor, None, out=out[part])
        works.append(start_all_reduce(out[part], axis))
    return out, works


def _product(x: Tensor, factor: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """x @ factor + bias for x [T, I], or [ranks, T, I] with any distance between ranks."""
    if x.dim() == 3:
        factor = factor.expand(x.shape[0], -1, -1)
        return torch.bmm(x, factor, out=out) if bias is None else torch.baddbmm(bias, x, factor, out=out)
    if out is None:
        return project(x, factor.t(), bias)
    return torch.mm(x, factor, out=out) if bias is None else torch.addmm(bias, x, factor, out=out)
