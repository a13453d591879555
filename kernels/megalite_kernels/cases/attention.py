"""Cases of attention: causal with grouped heads, full, window, packed documents, a packed projection."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megalite_kernels.cases.base import Case, Inputs, Shape, Work, normal
from megalite_kernels.cases.rowwise import angle_table, rotate_half
from megalite_kernels.ops.attention import attention
from megalite_kernels.ops.packed_attention import packed_attention

WINDOW = {"check": 17, "train": 512}
DOCUMENTS = 8
"""Packed documents in a sequence, of very different lengths."""


def make_inputs(shape: Shape, generator: torch.Generator) -> Inputs:
    """q [B, S, N, D], k and v [B, S, K, D]."""
    heads = (shape["N"], shape["K"], shape["K"])
    return Inputs([normal(generator, shape["B"], shape["S"], count, shape["D"]) for count in heads])


def document_bounds(tokens: int) -> list[int]:
    """Where `DOCUMENTS` documents start, and their end: lengths go from 1 share to 8."""
    shares = list(itertools.accumulate(range(1, DOCUMENTS + 1)))
    return [0, *(tokens * share // shares[-1] for share in shares)]


def make_packed(shape: Shape, generator: torch.Generator) -> Inputs:
    """q [S, N, D], k and v [S, K, D], and cu_seqlens."""
    leaves = [x[0] for x in make_inputs({**shape, "B": 1}, generator).leaves]
    bounds = torch.tensor(document_bounds(shape["S"]), dtype=torch.int32, device=generator.device)
    return Inputs(leaves, [bounds])


def make_projection(shape: Shape, generator: torch.Generator) -> Inputs:
    """qkv [B, S, (N + 2K) D], and cos and sin of rotary angles [S, D / 2]."""
    columns = (shape["N"] + 2 * shape["K"]) * shape["D"]
    tables = angle_table(shape, generator.device)
    return Inputs([normal(generator, shape["B"], shape["S"], columns)], list(tables))


def work(shape: Shape, itemsize: int, *, pairs: float) -> Work:
    """`pairs`: how many (query, key) pairs of a head are seen; the backward has 5 products to the forward's 2."""
    rows = shape["B"] * shape["S"] * shape["D"] * itemsize
    heads, keys = shape["N"], shape["K"]
    flops = int(4 * shape["B"] * pairs * heads * shape["D"])
    # forward: q, k, v in, out out; backward: q, k, v, out, dout in, dq, dk, dv out; lse is 1/D of it
    return Work(rows * (2 * heads + 2 * keys), rows * (4 * heads + 4 * keys), flops, flops * 5 // 2)


def packed_work(shape: Shape, itemsize: int) -> Work:
    """Of causal attention, the tables read and three operations per feature that turns, in each direction."""
    whole = work(shape, itemsize, pairs=shape["S"] ** 2 / 2)
    tables = 4 * shape["S"] * shape["D"]
    turned = 3 * shape["B"] * shape["S"] * (shape["N"] + shape["K"]) * shape["D"]
    return Work(
        whole.forward_bytes + tables,
        whole.backward_bytes + tables,
        whole.forward_flops + turned,
        whole.backward_flops + 2 * turned,
    )


def window_of(shape: Shape) -> int:
    """The window that goes with a shape."""
    return WINDOW["train" if shape["S"] >= 2 * WINDOW["train"] else "check"]


def _window_pairs(shape: Shape) -> float:
    width, rows = window_of(shape), shape["S"]
    return width * (width + 1) / 2 + (rows - width) * width


def _packed_pairs(shape: Shape) -> float:
    return sum((stop - start) ** 2 / 2 for start, stop in itertools.pairwise(document_bounds(shape["S"])))


def plain(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, window: int | None = None) -> Tensor:
    """Written out for [B, S, N, D], softmax in fp32 (or fp64), with the mask from how far back each key is."""
    groups = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
    scores = torch.einsum("bqnd,bknd->bnqk", q, k) / q.shape[-1] ** 0.5
    rows, keys = (torch.arange(x.shape[1], device=q.device) for x in (q, k))
    back = rows.unsqueeze(1) + (k.shape[1] - q.shape[1]) - keys
    mask = ((back >= 0) | (not causal)) & (back.abs() < (window or 2**31))
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.to(wide).masked_fill(~mask, -torch.inf).softmax(-1)
    return torch.einsum("bnqk,bknd->bqnd", weights.to(v.dtype), v)


def per_document(one: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """Runs a [B, S, N, D] attention on each packed document by itself."""

    def run(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
        parts = [slice(a, b) for a, b in itertools.pairwise(document_bounds(q.shape[0])) if b > a]
        return torch.cat([one(q[None, part], k[None, part], v[None, part])[0] for part in parts])

    return run


def sdpa(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, mask: Tensor | None = None) -> Tensor:
    """torch's own attention on [B, S, N, D]."""
    grouped, causal = q.shape[2] != k.shape[2], causal and mask is None
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped
    ).transpose(1, 2)


def _sdpa_window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    width = window_of({"S": q.shape[1]})
    places = torch.arange(q.shape[1], device=q.device)
    back = places.unsqueeze(1) - places
    return sdpa(q, k, v, mask=(back >= 0) & (back < width))


def _window(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda q, k, v: function(q, k, v, window=window_of({"S": q.shape[1]}))


def _packed(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    bounds = document_bounds(q.shape[0])
    longest = max(b - a for a, b in itertools.pairwise(bounds))
    return attention(q, k, v, cu_seqlens=cu_seqlens, max_seqlen=longest)


def _shapes(*, head_dims: tuple[int, ...] = (64, 128), cpu_tokens: int = 2048) -> dict[str, Any]:
    small = {"B": 1, "S": cpu_tokens, "N": 8, "K": 2}
    large = {"B": 1, "S": 16384, "N": 16, "K": 4}
    return {
        "check": {"B": 2, "S": 67, "N": 4, "K": 2, "D": 16},
        "doctor": {"B": 1, "S": 1024, "N": 4, "K": 2, "D": 64},
        "cpu": tuple({**small, "D": dim} for dim in head_dims),
        "cuda": tuple({**large, "D": dim} for dim in head_dims),
        "bound": "compute",
        "floor": 2.0,  # single rows of few keys differ by the last place
    }


def _projected(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    heads = _query_heads(qkv, cos)
    return packed_attention(qkv, heads, heads // 2, rotary=(cos, sin))


def _projected_by(one: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Splits a projection, turns queries and keys, and attends by `one`."""

    def run(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        heads = _query_heads(qkv, cos)
        sizes = (heads, heads // 2, heads // 2)
        q, k, v = qkv.unflatten(-1, (-1, 2 * cos.shape[-1])).split(sizes, dim=2)
        return one(rotate_half(q, cos, sin), rotate_half(k, cos, sin), v)

    return run


def _query_heads(qkv: Tensor, cos: Tensor) -> int:
    """N of heads that turn whole, where K = N / 2."""
    return qkv.shape[-1] // (4 * cos.shape[-1])


CASES = (
    Case(
        "attention",
        "attention causal",
        attention,
        plain,
        make_inputs,
        lambda shape, itemsize: work(shape, itemsize, pairs=shape["S"] ** 2 / 2),
        eager=sdpa,
        **_shapes(),
    ),
    Case(
        "attention",
        "attention full",
        lambda q, k, v: attention(q, k, v, causal=False),
        lambda q, k, v: plain(q, k, v, causal=False),
        make_inputs,
        lambda shape, itemsize: work(shape, itemsize, pairs=shape["S"] ** 2),
        eager=lambda q, k, v: sdpa(q, k, v, causal=False),
        **_shapes(head_dims=(128,), cpu_tokens=1024),
    ),
    Case(
        "attention",
        "attention window",
        _window(attention),
        _window(plain),
        make_inputs,
        lambda shape, itemsize: work(shape, itemsize, pairs=_window_pairs(shape)),
        eager=_sdpa_window,
        **_shapes(head_dims=(128,), cpu_tokens=1024),
    ),
    Case(
        "attention",
        "attention packed",
        _packed,
        per_document(plain),
        make_packed,
        lambda shape, itemsize: work(shape, itemsize, pairs=_packed_pairs(shape)),
        eager=per_document(sdpa),
        **_shapes(head_dims=(64,)),
    ),
    Case(
        "packed_attention",
        "packed_attention",
        _projected,
        _projected_by(plain),
        make_projection,
        packed_work,
        eager=_projected_by(sdpa),
        **{
            **_shapes(),
            "doctor": {"B": 1, "S": 1024, "N": 4, "K": 2, "D": 64},
            "cpu": ({"B": 4, "S": 512, "N": 8, "K": 4, "D": 64},),
            "cuda": ({"B": 1, "S": 16384, "N": 16, "K": 8, "D": 128},),
        },
    ),
)
