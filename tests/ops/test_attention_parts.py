"""Attention whose keys come in parts: partial results merged by log-sum-exp are those of one call."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import megalite_kernels as mk
from megalite_kernels import backend as backends
from megalite_kernels.ops.attention import attention_backward, attention_forward
from tests.ops.catalogue import BACKENDS, cpu_only, needs_native, random

CASES = [
    pytest.param({"causal": True}, id="causal"),
    pytest.param({"causal": False}, id="full"),
    pytest.param({"causal": True, "window": 17}, id="window"),
    pytest.param({"causal": False, "window": 9}, id="both_ways"),
    pytest.param({"causal": True, "softcap": 1.5}, id="softcap"),
    pytest.param({"causal": True, "sinks": True}, id="sinks"),
]
# Per document: (queries, keys of the first part, keys of the second part).
DENSE = [(70, 33, 37)]
PACKED = [(40, 15, 25), (30, 12, 25), (0, 0, 25), (25, 0, 25), (26, 80, 25)]
KINDS = [
    pytest.param(torch.float64, "reference", id="float64"),
    pytest.param(torch.float32, "reference", id="float32"),
    pytest.param(torch.float32, "cpu", id="float32_cpu", marks=needs_native),
]


def plain(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, options: dict[str, Any]) -> Tensor:
    """One document [S, N, D], written out, in the dtype of q."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qnd,knd->nqk", q, k) / q.shape[-1] ** 0.5
    if "softcap" in options:
        scores = options["softcap"] * torch.tanh(scores / options["softcap"])
    back = torch.arange(q.shape[0]).unsqueeze(1) + (k.shape[0] - q.shape[0]) - torch.arange(k.shape[0])
    seen = ((back >= 0) | (not options["causal"])) & (back.abs() < options.get("window", 10**9))
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks.view(-1, 1, 1).expand(-1, q.shape[0], 1)), dim=-1)
    return torch.einsum("nqk,knd->qnd", scores.softmax(-1)[..., : k.shape[0]], v)


def bounds_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def make(documents: list[tuple[int, int, int]], dtype: torch.dtype) -> dict[str, Tensor]:
    queries, keys = sum(d[0] for d in documents), sum(d[1] + d[2] for d in documents)
    shapes = {"q": (queries, 4, 16), "k": (keys, 2, 16), "v": (keys, 2, 16), "dout": (queries, 4, 16)}
    tensors = {name: random(*shape, seed=i).to(dtype) for i, (name, shape) in enumerate(shapes.items())}
    return {**tensors, "sinks": random(4, seed=9).to(dtype)}


def truth(
    inputs: dict[str, Tensor], documents: list[tuple[int, int, int]], options: dict[str, Any], sinks: bool
) -> list[Tensor]:
    """out, dq, dk, dv and dsinks in float64, each document by itself."""
    names = ["q", "k", "v", *(["sinks"] if sinks else [])]
    leaves = {name: inputs[name].double().requires_grad_() for name in names}
    outs, at, key_at = [], 0, 0
    for queries, first, second in documents:
        rows, keys = slice(at, at + queries), slice(key_at, key_at + first + second)
        one = plain(leaves["q"][rows], leaves["k"][keys], leaves["v"][keys], leaves.get("sinks"), options)
        outs.append(one)
        at, key_at = at + queries, key_at + first + second
    out = torch.cat(outs)
    return [out.detach(), *torch.autograd.grad(out, list(leaves.values()), inputs["dout"].double())]


def parts_of(documents: list[tuple[int, int, int]]) -> list[tuple[Tensor, list[int]]]:
    """(token indices of the keys, their number per document) of both parts."""
    indices: tuple[list[int], list[int]] = ([], [])
    place = 0
    for _, first, second in documents:
        indices[0].extend(range(place, place + first))
        indices[1].extend(range(place + first, place + first + second))
        place += first + second
    return [(torch.tensor(indices[i], dtype=torch.int64), [d[1 + i] for d in documents]) for i in (0, 1)]


def in_parts(
    inputs: dict[str, Tensor], documents: list[tuple[int, int, int]], options: dict[str, Any], sinks: bool
) -> list[Tensor]:
    """The same by two calls on the two parts of the keys, the documents' second parts all of one length."""
    queries = [d[0] for d in documents]
    results = []
    for index, ((places, lengths), later) in enumerate(zip(parts_of(documents), (True, False), strict=True)):
        # The first part's queries stand `second` keys later than aligned at its end.
        offsets = {d[2] if later else 0 for d in documents}
        assert len(offsets) == 1
        call: dict[str, Any] = {**options, "offset": offsets.pop()}
        call["sinks"] = inputs["sinks"] if sinks and index == 0 else None
        if len(documents) > 1:
            call |= {"cu_seqlens": bounds_of(queries), "cu_seqlens_k": bounds_of(lengths), "max_seqlen": 99}
        results.append((inputs["k"][places], inputs["v"][places], call, places))
    packed = len(documents) > 1

    def shaped(x: Tensor) -> Tensor:
        return x if packed else x[None]

    q, dout = shaped(inputs["q"]), shaped(inputs["dout"])
    partial = [attention_forward(q, shaped(k), shaped(v), **call) for k, v, call, _ in results]
    lse = torch.logaddexp(partial[0][1], partial[1][1])
    out = torch.zeros_like(q)
    for one_out, one_lse in partial:
        weight = torch.exp(one_lse - lse).nan_to_num(0.0).transpose(-1, -2).unsqueeze(-1)
        out = out + weight.to(out.dtype) * one_out
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(inputs["k"]), torch.zeros_like(inputs["v"])
    dsinks: Tensor | None = None
    for k, v, call, places in results:
        grads = attention_backward(dout, q, shaped(k), shaped(v), out, lse, **call)
        dq = dq + grads[0]
        dk[places], dv[places] = grads[1].view_as(k), grads[2].view_as(v)
        dsinks = grads[3] if grads[3] is not None else dsinks
    total = [out.view_as(inputs["q"]), dq.view_as(inputs["q"]), dk, dv]
    return total + ([] if dsinks is None else [dsinks])


@pytest.mark.parametrize(("dtype", "backend"), KINDS)
@pytest.mark.parametrize("documents", [DENSE, PACKED], ids=["dense", "packed"])
@pytest.mark.parametrize("case", CASES)
def test_two_parts_equal_the_plain_definition(
    case: dict[str, Any], documents: list[tuple[int, int, int]], dtype: torch.dtype, backend: str
) -> None:
    options = {name: value for name, value in case.items() if name != "sinks"}
    sinks = "sinks" in case
    inputs = make(documents, dtype)
    with mk.use_backend(backend):
        found = in_parts(inputs, documents, options, sinks)
    limit = 1e-12 if dtype == torch.float64 else 1e-5
    for ours, right in zip(found, truth(inputs, documents, options, sinks), strict=True):
        torch.testing.assert_close(ours.double(), right, rtol=limit, atol=limit)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("offset", [-100, -7, 0, 5, 64, 1000])
@pytest.mark.parametrize("options", [{}, {"window": 11}, {"causal": False, "window": 11}])
def test_positions_outside_the_keys(options: dict[str, Any], offset: int, backend: str) -> None:
    """A query before all keys, or a window behind them, sees nothing: zeros, -inf, and no gradient."""
    q, k, v, dout = (random(1, 50, 2, 16, seed=i) for i in range(4))
    with mk.use_backend("reference"):
        right = attention_forward(q.double(), k.double(), v.double(), offset=offset, **options)
        wide = [x.double() for x in (dout, q, k, v)]
        right_grads = attention_backward(*wide, *right, offset=offset, **options)
    with mk.use_backend(backend):
        out, lse = attention_forward(q, k, v, offset=offset, **options)
        grads = attention_backward(dout, q, k, v, out, lse, offset=offset, **options)
    position = torch.arange(50).unsqueeze(1) + offset - torch.arange(50)
    seen = position.abs() < options.get("window", 10**9)
    if options.get("causal", True):
        seen &= position >= 0
    assert torch.equal(lse[0, 0] == -torch.inf, ~seen.any(1))
    assert not out[0, ~seen.any(1)].any()
    assert not grads[1][0, ~seen.any(0)].any()
    for ours, exact in zip((out, lse, *grads[:3]), (*right, *right_grads[:3]), strict=True):
        torch.testing.assert_close(ours.double(), exact.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_documents_with_keys_only_or_queries_only(backend: str) -> None:
    q, k, v = random(9, 2, 8), random(12, 2, 8, seed=1), random(12, 2, 8, seed=2)
    bounds = torch.tensor([0, 4, 4, 9], dtype=torch.int32), torch.tensor([0, 5, 12, 12], dtype=torch.int32)
    call: dict[str, Any] = {"cu_seqlens": bounds[0], "cu_seqlens_k": bounds[1]}
    with mk.use_backend(backend):
        out, lse = attention_forward(q, k, v, **call)
        dq, dk, dv, dsinks = attention_backward(torch.ones_like(q), q, k, v, out, lse, **call)
    assert dsinks is None
    assert not out[4:].any()
    assert (lse[:, 4:] == -torch.inf).all()
    assert not dq[4:].any()
    assert not dk[5:].any()
    assert not dv[5:].any()
    alone = mk.attention(q[None, :4], k[None, :5], v[None, :5])
    torch.testing.assert_close(out[None, :4], alone)


@cpu_only
@pytest.mark.parametrize("offset", [3, 40])
def test_sdpa_takes_offsets(offset: int) -> None:
    q, k, v, dout = (random(2, 40, 2, 16, seed=i) for i in range(4))
    found = []
    for backend in ("sdpa", "reference"):
        with mk.use_backend(backend):
            out, lse = attention_forward(q, k, v, offset=offset)
            found.append((out, lse, *attention_backward(dout, q, k, v, out, lse, offset=offset)[:3]))
    for ours, right in zip(*found, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-5, atol=1e-5)


@cpu_only
def test_packed_offsets_under_sdpa() -> None:
    q, k, v = (random(30, 2, 8, seed=i) for i in range(3))
    bounds = torch.tensor([0, 5, 11, 30], dtype=torch.int32)
    with mk.use_backend("sdpa"):
        ours = attention_forward(q, k, v, offset=2, cu_seqlens=bounds)
    with mk.use_backend("reference"):
        right = attention_forward(q, k, v, offset=2, cu_seqlens=bounds)
    torch.testing.assert_close(ours, right)


def test_max_seqlen_reaches_the_op() -> None:
    """GPU kernels size their grid by it; here it must arrive and change nothing."""
    q, bounds = random(10, 2, 8), torch.tensor([0, 4, 10], dtype=torch.int32)
    found = []
    implementation = backends._implementations["attention_fwd"]["reference"]
    original = implementation.target
    assert callable(original)

    def spy(*args: Any) -> Any:
        found.append(args[9])
        return original(*args)

    implementation.target = spy
    try:
        with mk.use_backend("reference"):
            known = mk.attention(q, q, q, cu_seqlens=bounds, max_seqlen=6)
            unknown = mk.attention(q, q, q, cu_seqlens=bounds)
    finally:
        implementation.target = original
    assert found == [6, 0]
    assert torch.equal(known, unknown)  # type: ignore[arg-type]


def test_errors_of_parts() -> None:
    q, k, bounds = random(6, 4, 8), random(5, 4, 8), torch.tensor([0, 6], dtype=torch.int32)
    out, lse = torch.empty_like(q), torch.empty(4, 6)
    with pytest.raises(ValueError, match="cu_seqlens_k is given without cu_seqlens"):
        attention_forward(q, k, k, cu_seqlens_k=bounds)
    with pytest.raises(ValueError, match=r"cu_seqlens_k has shape \[3\], but cu_seqlens needs \[2\]"):
        attention_forward(q, k, k, cu_seqlens=bounds, cu_seqlens_k=torch.zeros(3, dtype=torch.int32))
    with pytest.raises(
        ValueError, match="cu_seqlens_k goes from 0 to 6: must rise from 0 to the 5 tokens of k"
    ):
        attention_forward(q, k, k, cu_seqlens=bounds, cu_seqlens_k=bounds)
    with pytest.raises(ValueError, match="max_seqlen=-1 must be at least 0"):
        attention_forward(q, q, q, cu_seqlens=bounds, max_seqlen=-1)
    with pytest.raises(
        ValueError, match=r"lse has shape \[4, 5\], but q of shape \[6, 4, 8\] needs \[4, 6\]"
    ):
        attention_backward(q, q, q, q, out, lse[:, :5], cu_seqlens=bounds)
    with pytest.raises(ValueError, match=r"dout has shape \[5, 4, 8\]"):
        attention_backward(k, q, q, q, out, lse, cu_seqlens=bounds)
    with pytest.raises(ValueError, match=r"dlse has shape \[4, 5\]"):
        attention_backward(q, q, q, q, out, lse, cu_seqlens=bounds, dlse=lse[:, :5])
