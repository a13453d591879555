"""Attention: masks, grouped heads, packing, log-sum-exp, on every backend that a CPU has."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import megalite_kernels as mk
from megalite_kernels.testing import assert_as_accurate
from tests.ops.catalogue import BACKENDS, DTYPES, check, cpu_only, needs_native, random

ALL = [*BACKENDS, pytest.param("sdpa", marks=cpu_only)]


def plain(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, window: int | None = None
) -> tuple[Tensor, Tensor]:
    """(out, lse) written out for [B, S, N, D], with the mask from how far back each key is."""
    groups = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
    scores = torch.einsum("bqnd,bknd->bnqk", q, k) / q.shape[-1] ** 0.5
    back = torch.arange(q.shape[1]).unsqueeze(1) + (k.shape[1] - q.shape[1]) - torch.arange(k.shape[1])
    mask = ((back >= 0) | (not causal)) & (back.abs() < (window or 10**9))
    scores = scores.float() if scores.dtype != torch.float64 else scores
    scores = scores.masked_fill(~mask, -torch.inf)
    return torch.einsum("bnqk,bknd->bqnd", scores.softmax(-1).to(v.dtype), v), scores.logsumexp(-1)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "keys", "options"),
    [
        (1, 1, {}),
        (67, 67, {}),
        (300, 300, {}),
        (64, 64, {"causal": False}),
        (40, 40, {"causal": False, "window": 7}),
        (300, 300, {"window": 41}),
        (5, 70, {}),
        (1, 33, {}),
        (9, 70, {"window": 13}),
    ],
)
def test_accuracy(rows: int, keys: int, options: dict[str, Any], dtype: torch.dtype, backend: str) -> None:
    inputs = [random(2, rows, 4, 16), random(2, keys, 2, 16, seed=1), random(2, keys, 2, 16, seed=2)]
    check(
        lambda q, k, v: mk.attention(q, k, v, **options),
        lambda q, k, v: plain(q, k, v, **options)[0],
        inputs,
        dtype=dtype,
        backend=backend,
        magnitude=16.0,  # dq and dk are differences of products of 16 terms, and 0 for a single key
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(3, 1, 20), (2, 2, 96), (1, 1, 128), (4, 2, 5)])
def test_head_shapes(heads: int, kv_heads: int, dim: int, backend: str) -> None:
    inputs = [
        random(1, 35, heads, dim),
        random(1, 35, kv_heads, dim, seed=1),
        random(1, 35, kv_heads, dim, seed=2),
    ]
    check(
        mk.attention,
        lambda q, k, v: plain(q, k, v)[0],
        inputs,
        dtype=torch.float32,
        backend=backend,
        magnitude=float(dim),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_lse_is_right_and_differentiable(backend: str) -> None:
    inputs = [random(2, 50, 4, 16), random(2, 50, 2, 16, seed=1), random(2, 50, 2, 16, seed=2)]
    check(
        lambda q, k, v: mk.attention(q, k, v, return_lse=True),
        plain,
        inputs,
        dtype=torch.float32,
        backend=backend,
    )


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("options", [{}, {"window": 9}, {"causal": False}])
def test_packed_documents_equal_each_alone(options: dict[str, Any], backend: str) -> None:
    bounds = [0, 16, 32, 32, 71, 72, 100]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    inputs = [random(100, 4, 16), random(100, 2, 16, seed=1), random(100, 2, 16, seed=2)]

    def alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = [slice(a, b) for a, b in itertools.pairwise(bounds) if b > a]
        return torch.cat([plain(*(x[None, p] for x in (q, k, v)), **options)[0][0] for p in parts])

    check(
        lambda q, k, v: mk.attention(q, k, v, cu_seqlens=cu_seqlens, max_seqlen=39, **options),
        alone,
        inputs,
        dtype=torch.float32,
        backend=backend,
    )


@pytest.mark.parametrize("backend", ALL)
def test_empty_documents_change_nothing(backend: str) -> None:
    """Batches are padded with them to one number of documents: the same bits, whatever the bound of the lengths."""
    leaves = [random(150, 4, 16, seed=i).requires_grad_() for i in range(3)]
    bounds, results = [0, 40, 100, 140, 150], []
    with mk.use_backend(backend):
        for ends, longest in (([], 60), ([150] * 59, 128), ([150], 150)):
            cu_seqlens = torch.tensor(bounds + ends, dtype=torch.int32)
            out = mk.attention(*leaves, cu_seqlens=cu_seqlens, max_seqlen=longest, window=30)
            assert isinstance(out, Tensor)
            results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("dtype", DTYPES)
def test_documents_do_not_leak(dtype: torch.dtype, backend: str) -> None:
    """Other contents of one document, non-finite ones too, change no bit of another: outputs and gradients."""
    cu_seqlens = torch.tensor([0, 40, 100, 140, 150], dtype=torch.int32)

    def run(document: float) -> list[Tensor]:
        leaves = [random(150, 4, 16, seed=i).to(dtype) for i in range(3)]
        for x in leaves:
            x[40:100] *= document
            x.requires_grad_()
        out = mk.attention(*leaves, cu_seqlens=cu_seqlens, max_seqlen=60)
        assert isinstance(out, Tensor)
        out.backward(torch.ones_like(out))
        return [out.detach(), *(x.grad for x in leaves if x.grad is not None)]

    with mk.use_backend(backend):
        results = [run(1.0), run(-3.0), run(torch.nan)]
    others = torch.cat([torch.arange(40), torch.arange(100, 150)])
    for first, *rest in zip(*results, strict=True):
        assert torch.isfinite(first).all()
        for other in rest:
            assert torch.equal(first[others], other[others])


@pytest.mark.parametrize("backend", ALL)
def test_single_tokens_of_a_batch_that_was_heads_first(backend: str) -> None:
    """[B, N, 1, D] transposed: torch calls it contiguous, though the stride of its only token is that of a head."""
    q, k, v = (random(3, heads, 1, 16, seed=i) for i, heads in enumerate((4, 2, 2)))
    past_k, past_v = random(3, 20, 2, 16, seed=3), random(3, 20, 2, 16, seed=4)
    queries, key, value = (x.transpose(1, 2) for x in (q, k, v))
    for keys, values in ((past_k, past_v), (key, value)):
        with mk.use_backend(backend):
            out = mk.attention(queries, keys, values)
        torch.testing.assert_close(out, plain(queries, keys, values)[0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", ALL)
def test_views_of_a_fused_projection(backend: str) -> None:
    packed = random(2, 30, 8, 16).requires_grad_()
    q, k, v = packed.split((4, 2, 2), dim=2)
    with mk.use_backend(backend):
        viewed = mk.attention(q, k, v)
        copied = mk.attention(q.contiguous(), k.contiguous(), v.contiguous())
    assert isinstance(viewed, Tensor)
    assert isinstance(copied, Tensor)
    assert viewed.is_contiguous()
    assert torch.equal(viewed, copied)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [20, 131, 300])
def test_accuracy_with_softcap_sinks_and_scale(rows: int, dtype: torch.dtype, backend: str) -> None:
    def ours(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Any:
        return mk.attention(q, k, v, softcap=2.0, sinks=sinks, scale=0.5)

    def torch_attention(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(2, dim=2) for x in (k, v))
        scores = 2.0 * torch.tanh(torch.einsum("bqnd,bknd->bnqk", q, k) * 0.5 / 2.0)
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        scores = scores.masked_fill(~mask, -torch.inf)
        scores = torch.cat((scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)), -1)
        return torch.einsum("bnqk,bknd->bqnd", scores.softmax(-1)[..., :-1], v)

    inputs = [random(2, rows, 4, 8), random(2, rows, 2, 8, seed=1), random(2, rows, 2, 8, seed=2)]
    inputs.append(random(4, seed=4))
    # dsinks sums terms of both signs over all queries: its rounding is that of the terms. dk of 300 rows is off by
    # 5.6e-7 through autograd, by 9.4e-7 from the log-sum-exp in plain torch (both in fp32, on a CPU with AVX2 alone).
    tiled = backend != "reference"
    check(ours, torch_attention, inputs, dtype=dtype, backend=backend, magnitude=8.0, or_reference=tiled)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sink", [-1e4, -torch.inf, 100.0, 1e4])
def test_extreme_sinks(sink: float, backend: str) -> None:
    """A far lower sink changes nothing, a far higher one takes all; neither makes a NaN."""
    q, k, v = (random(1, 33, 1, 8, seed=i).requires_grad_() for i in range(3))
    sinks = torch.tensor([sink], requires_grad=True)
    with mk.use_backend(backend):
        out, lse = mk.attention(q, k, v, sinks=sinks, return_lse=True)
        plain_out, plain_lse = mk.attention(q, k, v, return_lse=True)
        out.sum().backward()
    if sink < 0:
        torch.testing.assert_close(out, plain_out)
        torch.testing.assert_close(lse, plain_lse)
    else:
        torch.testing.assert_close(out, torch.zeros_like(out))
        torch.testing.assert_close(lse, torch.full_like(lse, sink))
    for x in (q, k, v, sinks):
        assert x.grad is not None
        assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_queries_without_keys_give_zeros(backend: str) -> None:
    q, k = random(1, 5, 2, 8).requires_grad_(), random(1, 3, 2, 8, seed=1)
    with mk.use_backend(backend):
        out, lse = mk.attention(q, k, k, return_lse=True)
        out.sum().backward()
    assert torch.equal(out[:, :2], torch.zeros(1, 2, 2, 8))
    assert (lse[..., :2] == -torch.inf).all()
    assert torch.isfinite(lse[..., 2:]).all()
    assert q.grad is not None
    assert torch.isfinite(q.grad).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1e-10, 1e10])
def test_extreme_logits(scale: float, backend: str) -> None:
    inputs = [random(1, 40, 1, 16), random(1, 40, 1, 16, seed=1), random(1, 40, 1, 16, seed=2)]
    with mk.use_backend(backend):
        out = mk.attention(inputs[0] * scale, inputs[1], inputs[2])
    truth = plain(inputs[0].double() * scale, inputs[1].double(), inputs[2].double())[0]
    torch.testing.assert_close(out, truth.float(), rtol=1e-4, atol=1e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [True, False])
def test_accuracy_where_later_scores_are_far_larger(dtype: torch.dtype, causal: bool, backend: str) -> None:
    """Weights relative to the first keys' scores leave the range of floats: logits here go up to 300."""
    growth = torch.linspace(0, 1, 300)[None, :, None, None] ** 2
    q = random(1, 300, 2, 16).abs() + 1
    k = (random(1, 300, 2, 16, seed=1) * 0.1 + 1) * growth * 40
    inputs = [q.to(dtype), k.to(dtype), random(1, 300, 2, 16, seed=2).to(dtype)]
    with mk.use_backend(backend):
        out, lse = mk.attention(*inputs, causal=causal, return_lse=True)
    true_out, true_lse = plain(*(x.double() for x in inputs), causal=causal)
    same_dtype = plain(*inputs, causal=causal)[0]
    assert true_lse.max() > 300
    assert_as_accurate(out, same_dtype, true_out)
    torch.testing.assert_close(lse, true_lse.float(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty(backend: str) -> None:
    with mk.use_backend(backend):
        empty = torch.empty(0, 4, 8)
        cu_seqlens = torch.zeros(1, dtype=torch.int32)
        assert mk.attention(empty, empty, empty, cu_seqlens=cu_seqlens).shape == (0, 4, 8)  # type: ignore[union-attr]


@needs_native
def test_the_default_on_a_cpu_is_native_and_repeats_bits() -> None:
    chosen = {c.op: c.backend for c in mk.explain("cpu")}
    assert chosen["attention_fwd"] == chosen["attention_bwd"] == "cpu"
    q = random(2, 100, 4, 32)
    assert torch.equal(mk.attention(q, q, q), mk.attention(q, q, q))  # type: ignore[arg-type]


def test_inputs_are_not_written() -> None:
    leaves = [random(1, 9, 2, 8, seed=i).requires_grad_() for i in range(3)]
    out = mk.attention(*leaves)
    out.sum().backward()  # type: ignore[union-attr]
    assert [x._version for x in leaves] == [0, 0, 0]


def test_errors_name_value_and_limit() -> None:
    q = random(1, 6, 4, 8)
    packed, bounds = q[0], torch.tensor([0, 6], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"q has shape \[6, 4, 8\]: pass \[B, S, N, D\]"):
        mk.attention(packed, packed, packed)
    with pytest.raises(ValueError, match=r"q has 4 heads: must be a multiple of the 3 heads of k"):
        mk.attention(q, q[:, :, :3], q[:, :, :3])
    with pytest.raises(ValueError, match=r"window=0 must be at least 1"):
        mk.attention(q, q, q, window=0)
    with pytest.raises(ValueError, match=r"softcap=-1.0 must be greater than 0"):
        mk.attention(q, q, q, softcap=-1.0)
    with pytest.raises(ValueError, match=r"sinks has shape \[3\], but q with 4 heads needs \[4\]"):
        mk.attention(q, q, q, sinks=torch.ones(3))
    with pytest.raises(ValueError, match=r"max_seqlen=6 has a meaning with cu_seqlens only"):
        mk.attention(q, q, q, max_seqlen=6)
    with pytest.raises(ValueError, match=r"cu_seqlens is torch.int64 \[2\]: pass int32"):
        mk.attention(packed, packed, packed, cu_seqlens=bounds.long())
    with pytest.raises(
        ValueError, match=r"cu_seqlens goes from 0 to 5: must rise from 0 to the 6 tokens of q"
    ):
        mk.attention(packed, packed, packed, cu_seqlens=torch.tensor([0, 5], dtype=torch.int32))
    with pytest.raises(ValueError, match=r"k is torch.bfloat16 but q is torch.float32"):
        mk.attention(q, q.bfloat16(), q)


@needs_native
@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("heads", [(1, 1), (6, 1), (4, 2)])
def test_few_tasks_are_cut_and_repeat_bits(heads: tuple[int, int], threads: int) -> None:
    """With fewer heads than threads a head's queries are shared out; sums over them keep one order."""
    inputs = [random(1, 200, heads[0], 16), random(1, 200, heads[1], 16, seed=1)]
    inputs += [random(1, 200, heads[1], 16, seed=2), random(heads[0], seed=3)]

    def run() -> list[Tensor]:
        leaves = [x.bfloat16().requires_grad_() for x in inputs]
        out = mk.attention(*leaves[:3], sinks=leaves[3])
        assert isinstance(out, Tensor)
        return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]

    before = torch.get_num_threads()
    alone = run()
    torch.set_num_threads(threads)
    try:
        first, second = run(), run()
    finally:
        torch.set_num_threads(before)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(first, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=2**-6, atol=2**-6 * float(b.abs().max()))
    assert torch.equal(first[0], alone[0])
    assert torch.equal(first[1], alone[1])
