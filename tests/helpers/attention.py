"""Attention written out, and what every tiled implementation of it is held against."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

import megalite_kernels as mk
from megalite_kernels.ops.attention import attention_backward, attention_forward
from megalite_kernels.testing import assert_as_accurate
from tests.ops.catalogue import random

NAMES = ("out", "lse", "dq", "dk", "dv", "dsinks")
Bounds = list[list[int]] | None
"""Where packed documents start, of the queries and (left out: the same) of the keys."""


def plain(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, bounds: Bounds, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """(out, lse) written out in the dtype of the inputs, documents one after another."""
    if bounds is None:
        return one_document(q, k, v, sinks, **options)
    places = zip(itertools.pairwise(bounds[0]), itertools.pairwise(bounds[-1]), strict=True)
    parts = [
        one_document(q[None, a:b], k[None, c:d], v[None, c:d], sinks, **options) for (a, b), (c, d) in places
    ]
    return torch.cat([out[0] for out, _ in parts]), torch.cat([lse[0] for _, lse in parts], -1)


def one_document(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    causal: bool = True,
    window: int | None = None,
    offset: int = 0,
    softcap: float | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of a batch [B, S, N, D]."""
    groups = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.einsum("bqnd,bknd->bnqk", q, k) * scale
    scores = scores.float() if scores.dtype != torch.float64 else scores
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    shift = k.shape[1] - q.shape[1] + offset
    back = torch.arange(q.shape[1]).unsqueeze(1) + shift - torch.arange(k.shape[1])
    mask = ((back >= 0) | (not causal)) & (back.abs() < (window or 10**9))
    seen = mask.any(-1, keepdim=True)
    if sinks is None:
        logits = scores.masked_fill(~mask & seen, -torch.inf)
    else:
        column = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        logits, seen = torch.cat((scores.masked_fill(~mask, -torch.inf), column), -1), seen | True
    probabilities = logits.softmax(-1)[..., : k.shape[1]].masked_fill(~mask, 0.0)
    lse = logits.logsumexp(-1).masked_fill(~seen.squeeze(-1), -torch.inf)
    return torch.einsum("bnqk,bknd->bqnd", probabilities.to(v.dtype), v), lse


def cumulative(bounds: Bounds) -> dict[str, Any]:
    """The arguments of the op that say `bounds`."""
    if bounds is None:
        return {}
    longest = max(b - a for places in bounds for a, b in itertools.pairwise(places))
    cu_seqlens, *keys = (torch.tensor(places, dtype=torch.int32) for places in bounds)
    return {"cu_seqlens": cu_seqlens, "cu_seqlens_k": keys[0] if keys else None, "max_seqlen": longest}


def ours(
    backend: str, inputs: list[Tensor], grads: list[Tensor], bounds: Bounds, options: dict[str, Any]
) -> list[Tensor]:
    """Out, lse and every gradient, on a backend."""
    q, k, v, sinks = [*inputs, None][:4]
    every = {**options, **cumulative(bounds), "sinks": sinks}
    with mk.use_backend(backend):
        out, lse = attention_forward(q, k, v, **every)
        results = attention_backward(grads[0], q, k, v, out, lse, dlse=grads[1], **every)
    return [out, lse, *(x for x in results if x is not None)]


def theirs(
    inputs: list[Tensor], grads: list[Tensor], bounds: Bounds, options: dict[str, Any]
) -> list[Tensor]:
    """The same of `plain`."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    q, k, v, sinks = [*leaves, None][:4]
    out, lse = plain(q, k, v, sinks, bounds, options)
    finite = torch.where(torch.isfinite(lse), lse, 0.0)
    loss = (out * grads[0].to(out.dtype)).sum() + (finite * grads[1].to(lse.dtype)).sum()
    return [out.detach(), lse.detach(), *torch.autograd.grad(loss, leaves)]


def check(
    backend: str,
    shapes: tuple[Any, ...],
    options: dict[str, Any] | None = None,
    *,
    dtype: torch.dtype,
    bounds: Bounds = None,
    sinks: bool = False,
    batch: int = 1,
    from_lse: bool = False,
) -> None:
    """All results as accurate as `plain`; shapes: queries, keys, heads, key heads, dim. Packed if there are bounds.

    With `from_lse` plain torch is also what makes the probabilities again from the log-sum-exp, as a tiled backward
    pass must: where logits are large that costs units in the last place, which `plain` does not lose on every CPU (on
    one with AVX2 alone dq of 33 queries with a scale of -0.3 was off by 4.7e-7, that way by 7.3e-7).
    """
    rows, keys, heads, kv_heads, dim = shapes
    lead = (batch,) if bounds is None else ()
    inputs = [random(*lead, rows, heads, dim), *(random(*lead, keys, kv_heads, dim, seed=i) for i in (1, 2))]
    inputs = [x.to(dtype) for x in inputs] + ([random(heads, seed=3).to(dtype)] if sinks else [])
    grads = [random(*lead, rows, heads, dim, seed=4).to(dtype), random(*lead, heads, rows, seed=5)]
    got = ours(backend, inputs, grads, bounds, options or {})
    same = theirs(inputs, grads, bounds, options or {})
    truth = theirs([x.double() for x in inputs], [x.double() for x in grads], bounds, options or {})
    if from_lse:
        other = ours("reference", inputs, grads, bounds, options or {})
        same = [
            max(pair, key=lambda x, c=c: (x - c).abs().max())
            for *pair, c in zip(same, other, truth, strict=True)
        ]
    for name, a, b, c in zip(NAMES, got, same, truth, strict=False):
        # Gradients are differences of sums of `dim` terms, and may cancel to nothing.
        magnitude = dim**0.5 if name.startswith("d") else 0.0
        assert_as_accurate(a, b.to(a.dtype), c, magnitude=magnitude, name=name)
    assert len(got) == len(truth)


def do_not_leak(backend: str, dtype: torch.dtype, dim: int) -> None:
    """Other contents of one document, non-finite ones too, change no bit of another: outputs and gradients."""
    inputs = [random(70, heads, dim, seed=i).to(dtype) for i, heads in enumerate((2, 1, 1))]
    grads = [random(70, 2, dim, seed=4).to(dtype), random(2, 70, seed=5)]
    results = []
    for factor in (1.0, -3.0, torch.nan):
        changed = [x.clone() for x in (*inputs, grads[0])]
        for x in changed:
            x[20:45] *= factor
        results.append(ours(backend, changed[:3], [changed[3], grads[1]], [[0, 20, 45, 60, 70]], {}))
    others = torch.cat([torch.arange(20), torch.arange(45, 70)])
    for name, first, *rest in zip(NAMES, *results, strict=False):
        axis = -1 if name == "lse" else 0
        assert torch.isfinite(first).all()
        for other in rest:
            assert torch.equal(first.index_select(axis, others), other.index_select(axis, others)), name
