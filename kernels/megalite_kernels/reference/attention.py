"""Scaled dot-product attention written out in plain torch, one document at a time.

Valid for every option and differentiable by hand (`backward`); holds all scores of a document, so it is the
definition and not the fast path. Shapes: N query heads, K key/value heads, G = N / K, D features per head.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from megalite_kernels.reference.common import widen


def visible(
    rows: int, columns: int, causal: bool, window: int, device: torch.device, offset: int = 0
) -> Tensor | None:
    """Boolean [rows, columns] of what each query may see, or None when it sees everything.

    Query i stands at key position i + columns - rows + offset: with offset 0 the queries are the last `rows` of
    `columns` positions (bottom-right aligned), as with a key/value cache. A window of w lets a query see itself
    and the w - 1 tokens before it (and, when not causal, after it).
    """
    if not causal and window <= 0:
        return None
    query = torch.arange(rows, device=device).unsqueeze(1) + (columns - rows + offset)
    key = torch.arange(columns, device=device)
    mask = key <= query if causal else torch.ones(rows, columns, dtype=torch.bool, device=device)
    if window > 0:
        mask = mask & (key > query - window) & (key < query + window)
    return mask


class Options(NamedTuple):
    """What every form takes, in the order of the op's schema; window 0 and softcap 0 mean none."""

    causal: bool
    window: int
    offset: int
    max_seqlen: int
    """For kernels that must not read cu_seqlens; nothing here needs it."""
    softcap: float
    scale: float


class Bounds(NamedTuple):
    """Where packed documents start, of the queries and (None: the same) of the keys."""

    queries: Tensor | None
    keys: Tensor | None = None


def forward(
    q: Tensor, k: Tensor, v: Tensor, bounds: Bounds, sinks: Tensor | None, options: Options
) -> tuple[Tensor, Tensor]:
    """(out like q, lse): q [B, S, N, D] gives lse [B, N, S]; packed q [T, N, D] gives lse [N, T].

    A query that sees no key gives zeros and an lse of -inf. `sinks` [N] are logits that take probability and
    give no value.
    """
    if bounds.queries is None:
        return _dense_forward(q, k, v, sinks, options)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((q.shape[1], q.shape[0]), dtype=widen(q[:0]).dtype, device=q.device)
    for part, keys in documents(bounds, q.shape[0], k.shape[0]):
        one_out, one_lse = _dense_forward(q[None, part], k[None, keys], v[None, keys], sinks, options)
        out[part], lse[:, part] = one_out[0], one_lse[0]
    return out, lse


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bounds: Bounds,
    sinks: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dsinks); dsinks is empty without sinks. Arguments and shapes as in `forward`."""
    if bounds.queries is None:
        return _dense_backward(dout, dlse, q, k, v, out, lse, sinks, options)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    dsinks = q.new_zeros(0) if sinks is None else torch.zeros_like(sinks)
    for part, keys in documents(bounds, q.shape[0], k.shape[0]):
        inputs = (dout[None, part], None if dlse is None else dlse[None, :, part])
        tensors = (q[None, part], k[None, keys], v[None, keys], out[None, part], lse[None, :, part])
        grads = _dense_backward(*inputs, *tensors, sinks, options)
        dq[part], dk[keys], dv[keys] = grads[0][0], grads[1][0], grads[2][0]
        dsinks = dsinks + grads[3]
    return dq, dk, dv, dsinks


def documents(bounds: Bounds, tokens: int, key_tokens: int) -> list[tuple[slice, slice]]:
    """The ranges of query and key tokens of every document that has any; reads the bounds on the host."""
    if bounds.queries is None:
        raise ValueError("cu_seqlens is None: pass where the documents start")
    queries = _ranges(bounds.queries, tokens, "cu_seqlens", "q")
    if bounds.keys is None:
        keys = queries
    else:
        keys = _ranges(bounds.keys, key_tokens, "cu_seqlens_k", "k")
    pairs = zip(queries, keys, strict=True)
    return [(part, other) for part, other in pairs if part.stop > part.start or other.stop > other.start]


def _ranges(cu_seqlens: Tensor, tokens: int, name: str, of: str) -> list[slice]:
    places = cu_seqlens.tolist()
    if places[0] != 0 or places[-1] != tokens or any(a > b for a, b in itertools.pairwise(places)):
        raise ValueError(
            f"{name} goes from {places[0]} to {places[-1]}: must rise from 0 to the {tokens} tokens of {of}"
        )
    return [slice(start, stop) for start, stop in itertools.pairwise(places)]


def _dense_forward(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, options: Options
) -> tuple[Tensor, Tensor]:
    heads = k.shape[2]
    scores = _scores(q, k, options)
    logits = scores
    if sinks is not None:
        column = sinks.to(scores.dtype).view(1, heads, -1, 1, 1).expand(*scores.shape[:-1], 1)
        logits = torch.cat((scores, column), dim=-1)
    lse = logits.logsumexp(-1)
    out = _probabilities(scores, lse) @ _per_head(v, heads)
    return _merge(out).to(q.dtype), lse.flatten(1, 2)


def _dense_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sinks: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """With P the probabilities: dV = P'dO, dS = P * (dO V' - rowsum(dO * O) + dlse), dQ = dS K, dK = dS' Q."""
    heads = k.shape[2]
    scores = _scores(q, k, options)
    lse = lse.to(scores.dtype).unflatten(1, (heads, -1))
    probabilities = _probabilities(scores, lse)
    wide_dout = _per_head(dout, heads)
    offset = -(wide_dout * _per_head(out, heads)).sum(-1)
    if dlse is not None:
        offset = offset + dlse.to(offset.dtype).unflatten(1, (heads, -1))
    dscores = probabilities * (wide_dout @ _per_head(v, heads).transpose(-1, -2) + offset.unsqueeze(-1))
    if options.softcap:
        slope = 1 - (scores / options.softcap).square()
        dscores = torch.where(probabilities == 0, 0.0, dscores * slope)
    dv = (probabilities.transpose(-1, -2) @ wide_dout).sum(2, keepdim=True)
    dq = dscores @ _per_head(k, heads) * options.scale
    dk = (dscores.transpose(-1, -2) @ _per_head(q, heads)).sum(2, keepdim=True) * options.scale
    dsinks = q.new_zeros(0)
    if sinks is not None:
        weight = torch.exp(sinks.to(scores.dtype).view(1, heads, -1, 1) - lse)
        dsinks = (weight * offset).sum((0, 3)).flatten().to(sinks.dtype)
    return _merge(dq).to(q.dtype), _merge(dk).to(k.dtype), _merge(dv).to(v.dtype), dsinks


def _scores(q: Tensor, k: Tensor, options: Options) -> Tensor:
    """Logits [B, K, G, S, Sk] after scale, soft-cap and mask."""
    heads = k.shape[2]
    scores = (_per_head(q, heads) * options.scale) @ _per_head(k, heads).transpose(-1, -2)
    if options.softcap:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    mask = visible(q.shape[1], k.shape[1], options.causal, options.window, q.device, options.offset)
    return scores if mask is None else scores.masked_fill(~mask, -torch.inf)


def _probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    # A row that sees no key has lse -inf: exp(-inf - 0) gives the zeros that exp(-inf + inf) would not.
    safe = torch.where(lse == -torch.inf, 0.0, lse)
    return torch.exp(scores - safe.unsqueeze(-1))


def _per_head(x: Tensor, heads: int) -> Tensor:
    """[B, S, K * G, D] as wide [B, K, G, S, D]."""
    return widen(x).transpose(1, 2).unflatten(1, (heads, -1))


def _merge(x: Tensor) -> Tensor:
    """[B, K, G, S, D] as contiguous [B, S, K * G, D]."""
    return x.flatten(1, 2).transpose(1, 2).contiguous()
