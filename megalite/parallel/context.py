"""Attention over sequences whose tokens are divided among ranks (context parallel): ring and Ulysses.

Everything else in the model works token by token and needs no change but the tokens' true positions. A packed batch
of T tokens is divided as one stream, wherever documents start and end.

Ring (Liu et al., arXiv 2310.01889): queries stay, keys and values travel around the ring while the part that is
here is computed; partial results merge by their log-sum-exp. Of 2n chunks rank r holds numbers r and 2n - 1 - r, so
that under a causal mask all have equal work.

Ulysses (Jacobs et al., arXiv 2309.14509): an all-to-all turns tokens of all heads into all tokens of some heads and
another turns the result back; it needs key heads that the ranks can divide.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

import megalite_kernels as kernels
from megalite.parallel.collectives import all_to_all, start_ring_shift
from megalite.parallel.mesh import Axis
from megalite_kernels.ops.attention import attention_backward, attention_forward

Method = Literal["ring", "ulysses"]


@dataclass(frozen=True, slots=True)
class ContextSplit:
    """How one packed batch lies on the ranks.

    Args:
        axis: context-parallel axis, of more than one rank.
        method: ring or ulysses.
        bounds: where documents start, and T: `cu_seqlens` of the whole batch on the host.

    Raises:
        ValueError: T does not divide into two chunks for each rank.
    """

    axis: Axis
    method: Method
    bounds: tuple[int, ...]

    def __post_init__(self) -> None:
        tokens, ranks = self.bounds[-1], self.axis.size
        if tokens % (2 * ranks):  # the rest would be left out
            raise ValueError(
                f"a packed batch of {tokens} tokens does not divide over parallel.cp={ranks}: make "
                f"micro_batch_size * seq_length a multiple of {2 * ranks}"
            )

    @property
    def chunk(self) -> int:
        """Tokens of a chunk: a rank of a ring holds two, one of Ulysses one of twice the size."""
        return self.bounds[-1] // (2 * self.axis.size)

    def own_tokens(self, x: Tensor) -> Tensor:
        """This rank's rows of x [T, ...], which is the same on all ranks."""
        return torch.cat([x[start : start + self.chunk] for start in self.own_starts(self.axis.rank)])

    def own_starts(self, rank: int) -> tuple[int, int]:
        """First token of both chunks of a rank, in the order in which it holds them."""
        first, second = (
            (rank, 2 * self.axis.size - 1 - rank) if self.method == "ring" else (2 * rank, 2 * rank + 1)
        )
        return first * self.chunk, second * self.chunk

    def document_of(self, token: int) -> tuple[int, int]:
        """[start, end) of the document that holds a token."""
        end = next(bound for bound in self.bounds if bound > token)
        start = max(bound for bound in self.bounds if bound <= token)
        return start, end


def context_attention(q: Tensor, k: Tensor, v: Tensor, split: ContextSplit, *, window: int | None) -> Tensor:
    """Causal attention of this rank's queries to the keys of all ranks.

    Args:
        q: [T / cp, N, D], rotated by the tokens' true positions.
        k, v: [T / cp, K, D].
        split: where these tokens stand.
        window: tokens a query may look back at, itself included.

    Returns:
        [T / cp, N, D].

    Raises:
        ValueError: Ulysses with heads that the ranks do not divide.
    """
    if split.method == "ulysses":
        return _ulysses(q, k, v, split, window)
    return _Ring.apply(q, k, v, split, window)


@dataclass(frozen=True, slots=True)
class Part:
    """Some of this rank's queries against some of the keys that have arrived: rows of each, and where they stand."""

    queries: slice
    keys: slice
    bounds: tuple[int, ...] | None
    """Documents within a chunk that meets itself; None: one document."""
    offset: int

    def options(self, like: Tensor, window: int | None) -> dict[str, Any]:
        """Keyword arguments of `attention_forward` and `attention_backward`."""
        if self.bounds is None:
            return {"window": window, "offset": self.offset}
        cu_seqlens = torch.tensor(self.bounds, dtype=torch.int32, device=like.device)
        longest = max(b - a for a, b in zip(self.bounds, self.bounds[1:], strict=False))
        return {"window": window, "cu_seqlens": cu_seqlens, "max_seqlen": longest}


def ring_parts(split: ContextSplit, source: int, window: int | None) -> Iterator[Part]:
    """What this rank computes with the keys of rank `source`: at most one part for each pair of chunks."""
    size = split.chunk
    for i, query_start in enumerate(split.own_starts(split.axis.rank)):
        for j, key_start in enumerate(split.own_starts(source)):
            if key_start == query_start:
                inner = [b - key_start for b in split.bounds if key_start < b < key_start + size]
                yield Part(
                    slice(i * size, (i + 1) * size),
                    slice(j * size, (j + 1) * size),
                    (0, *inner, size),
                    offset=0,
                )
            elif key_start < query_start:
                # Only the document that runs from the one chunk into the other has anything to see there.
                start, end = split.document_of(query_start)
                first_key = max(start, key_start)
                rows, keys = min(end - query_start, size), key_start + size - first_key
                near = query_start - (key_start + size) + 1  # from the first query back to the last key
                if keys <= 0 or (window is not None and near >= window):
                    continue
                yield Part(
                    slice(i * size, i * size + rows),
                    slice((j + 1) * size - keys, (j + 1) * size),
                    None,
                    offset=query_start - first_key - (keys - rows),
                )


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, split: ContextSplit, window: int | None) -> Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)
        out = torch.zeros(q.shape, dtype=wide, device=q.device)
        lse = torch.full((q.shape[1], q.shape[0]), -torch.inf, dtype=wide, device=q.device)
        for source, keys, values in _travelling(torch.stack((k, v)), split.axis):
            for part in ring_parts(split, source, window):
                _merge(out, lse, *_forward_part(part, q, keys, values, window), part.queries)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.split, ctx.window = split, window
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        split, window = ctx.split, ctx.window
        saved, dout = (q, out, lse, dout.contiguous()), dout.contiguous()
        dq = torch.zeros(q.shape, dtype=lse.dtype, device=q.device)
        home = torch.zeros((2, *k.shape), dtype=lse.dtype, device=q.device)
        arriving: tuple[Tensor, list[Any]] | None = None
        for source, keys, values in _travelling(torch.stack((k, v)), split.axis):
            dkv = torch.zeros_like(home)
            for part in ring_parts(split, source, window):
                part_dq, part_dk, part_dv = _backward_part(part, *saved, keys, values, window)
                dq[part.queries] += part_dq
                dkv[0, part.keys] += part_dk
                dkv[1, part.keys] += part_dv
            if arriving is not None:  # what the ranks before have added for these keys
                dkv += _arrived(arriving)
            arriving = start_ring_shift(dkv, split.axis)
        assert arriving is not None
        home = _arrived(arriving)
        return dq.to(q.dtype), home[0].to(k.dtype), home[1].to(v.dtype), None, None


def _travelling(kv: Tensor, axis: Axis) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(rank of origin, keys, values) of each rank in turn, one's own first; the next are on their way meanwhile."""
    for step in range(axis.size):
        arriving = start_ring_shift(kv, axis) if step + 1 < axis.size else None
        yield (axis.rank - step) % axis.size, kv[0], kv[1]
        if arriving is not None:
            kv = _arrived(arriving)


def _arrived(arriving: tuple[Tensor, list[Any]]) -> Tensor:
    tensor, works = arriving
    for work in works:
        work.wait()
    return tensor


def _forward_part(part: Part, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
    """(out [rows, N, D], lse [N, rows])."""
    options = part.options(q, window)
    tensors = (q[part.queries], k[part.keys], v[part.keys])
    if part.bounds is not None:
        return attention_forward(*tensors, **options)
    out, lse = attention_forward(*(x.unsqueeze(0) for x in tensors), **options)
    return out[0], lse[0]


def _backward_part(
    part: Part,
    q: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of the part's rows."""
    options, rows = part.options(q, window), part.queries
    tensors = [dout[rows], q[rows], k[part.keys], v[part.keys], out[rows], lse[:, rows].contiguous()]
    if part.bounds is not None:
        return attention_backward(*tensors, **options)[:3]
    dq, dk, dv, _ = attention_backward(*(x.unsqueeze(0) for x in tensors), **options)
    return dq[0], dk[0], dv[0]


def _merge(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor, rows: slice) -> None:
    """Add a part to what is there, in place: outputs weighted by how much of the softmax each has seen."""
    before, both = lse[:, rows], torch.logaddexp(lse[:, rows], part_lse.to(lse.dtype))
    nothing = both == -torch.inf
    old, new = (torch.where(nothing, 0.0, torch.exp(x - both)).t().unsqueeze(-1) for x in (before, part_lse))
    out[rows] = old * out[rows] + new * part_out
    lse[:, rows] = both


def _ulysses(q: Tensor, k: Tensor, v: Tensor, split: ContextSplit, window: int | None) -> Tensor:
    ranks, heads, key_heads = split.axis.size, q.shape[1], k.shape[1]
    if key_heads % ranks:
        raise ValueError(
            f"parallel.cp={ranks} with cp_method='ulysses' must divide the {key_heads} key/value heads of a rank "
            f"(and its {heads} query heads): use cp_method='ring'"
        )
    q, k, v = (_HeadsForTokens.apply(x, split.axis) for x in (q, k, v))
    cu_seqlens = torch.tensor(split.bounds, dtype=torch.int32, device=q.device)
    longest = max(b - a for a, b in zip(split.bounds, split.bounds[1:], strict=False))
    out = kernels.attention(q, k, v, window=window, cu_seqlens=cu_seqlens, max_seqlen=longest)
    return _TokensForHeads.apply(out, split.axis)


def heads_for_tokens(x: Tensor, axis: Axis) -> Tensor:
    """[T / n, heads, D] to [T, heads / n, D]."""
    blocks = x.unflatten(1, (axis.size, -1)).movedim(1, 0).contiguous()
    return all_to_all(blocks, axis).flatten(0, 1)


def tokens_for_heads(x: Tensor, axis: Axis) -> Tensor:
    """[T, heads / n, D] to [T / n, heads, D]."""
    blocks = x.unflatten(0, (axis.size, -1)).contiguous()
    return all_to_all(blocks, axis).movedim(0, 1).flatten(1, 2)


class _HeadsForTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return heads_for_tokens(x, axis)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        return tokens_for_heads(dx, ctx.axis), None


class _TokensForHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return tokens_for_heads(x, axis)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        return heads_for_tokens(dx, ctx.axis), None
