"""Attention of a packed projection: rotation, masks, grouped heads and documents, against plain torch."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import megalite_kernels as mk
from tests.ops.catalogue import BACKENDS, DTYPES, check, cpu_only, generator, needs_native, random
from tests.ops.test_attention import plain as plain_attention

ALL = [*BACKENDS, pytest.param("sdpa", marks=cpu_only)]
HEADS, KV_HEADS, DIM = 4, 2, 16
BOUNDS = [0, 16, 32, 32, 71, 72, 100]


def tables(rows: int, half: int) -> tuple[Tensor, Tensor]:
    """cos and sin of angles as rotary embeddings have them: up to the row, in falling frequencies."""
    angles = torch.arange(rows).unsqueeze(1) * 100.0 ** (-torch.arange(half) / half)
    return angles.cos(), angles.sin()


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Written out for [B, S, heads, D]; features past twice the columns of the tables stay."""
    half = cos.shape[-1]
    wide = torch.promote_types(x.dtype, torch.float32)
    c, s = cos.unsqueeze(-2).to(wide), sin.unsqueeze(-2).to(wide)
    first, second, rest = x[..., :half].to(wide), x[..., half : 2 * half].to(wide), x[..., 2 * half :]
    turned = torch.cat((first * c - second * s, second * c + first * s), -1)
    return torch.cat((turned.to(x.dtype), rest), -1)


def plain(
    qkv: Tensor,
    rotary: tuple[Tensor, Tensor] | None,
    heads: int = HEADS,
    kv_heads: int = KV_HEADS,
    **options: Any,
) -> Tensor:
    """Written out for [B, S, (N + 2K) D]."""
    q, k, v = qkv.unflatten(-1, (heads + 2 * kv_heads, -1)).split((heads, kv_heads, kv_heads), dim=2)
    if rotary is not None:
        q, k = turn(q, *rotary), turn(k, *rotary)
    return plain_attention(q, k, v, **options)[0]


def projection(batch: int, rows: int, heads: int = HEADS, kv_heads: int = KV_HEADS, dim: int = DIM) -> Tensor:
    return random(batch, rows, (heads + 2 * kv_heads) * dim)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "half", "options"),
    [
        (1, 8, {}),
        (67, 8, {}),
        (300, 8, {}),
        (67, 3, {}),  # features 6 to 15 stay
        (131, 0, {}),  # learned positions
        (40, 8, {"causal": False, "window": 7}),
        (300, 8, {"window": 41}),
    ],
)
def test_accuracy(rows: int, half: int, options: dict[str, Any], dtype: torch.dtype, backend: str) -> None:
    rotary = tables(rows, half) if half else None
    check(
        lambda qkv: mk.packed_attention(qkv, HEADS, KV_HEADS, rotary=rotary, **options),
        lambda qkv: plain(qkv, rotary, **options),
        [projection(2, rows)],
        dtype=dtype,
        backend=backend,
        magnitude=16.0,  # as attention's: differences of products of 16 terms
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(3, 1, 20), (2, 2, 96), (1, 1, 128), (8, 2, 64)])
def test_accuracy_of_head_shapes(
    heads: int, kv_heads: int, dim: int, dtype: torch.dtype, backend: str
) -> None:
    rotary = tables(150, dim // 2)
    check(
        lambda qkv: mk.packed_attention(qkv, heads, kv_heads, rotary=rotary),
        lambda qkv: plain(qkv, rotary, heads, kv_heads),
        [projection(1, 150, heads, kv_heads, dim)],
        dtype=dtype,
        backend=backend,
        magnitude=float(dim),
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_accuracy_with_a_negative_scale_softcap_and_sinks(dtype: torch.dtype, backend: str) -> None:
    rotary = tables(140, 8)

    def torch_attention(qkv: Tensor, sinks: Tensor) -> Tensor:
        q, k, v = qkv.unflatten(-1, (8, -1)).split((4, 2, 2), dim=2)
        q, k = turn(q, *rotary), turn(k, *rotary)
        k, v = (x.repeat_interleave(2, dim=2) for x in (k, v))
        scores = 2.0 * torch.tanh(torch.einsum("bqnd,bknd->bnqk", q, k) * -0.5 / 2.0)
        scores = scores.masked_fill(~torch.ones(140, 140, dtype=torch.bool).tril(), -torch.inf)
        scores = torch.cat((scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)), -1)
        return torch.einsum("bnqk,bknd->bqnd", scores.softmax(-1)[..., :-1], v)

    check(
        lambda qkv, sinks: mk.packed_attention(
            qkv, 4, 2, rotary=rotary, scale=-0.5, softcap=2.0, sinks=sinks
        ),
        torch_attention,
        [projection(2, 140), random(4, seed=4)],
        dtype=dtype,
        backend=backend,
        magnitude=16.0,
    )


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("kind", ["one row of angles per token", "the same rows in each sequence"])
def test_rows_of_angles(kind: str, backend: str) -> None:
    rows = tables(150, 8)
    places = torch.randint(0, 150, (3, 50), generator=generator(), device="cpu")
    rotary = (rows[0][places], rows[1][places]) if kind.startswith("one") else (rows[0][:50], rows[1][:50])
    check(
        lambda qkv: mk.packed_attention(qkv, HEADS, KV_HEADS, rotary=rotary),
        lambda qkv: plain(qkv, rotary),
        [projection(3, 50)],
        dtype=torch.float32,
        backend=backend,
    )


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("options", [{}, {"window": 9}])
def test_packed_documents_equal_each_alone(options: dict[str, Any], backend: str) -> None:
    cu_seqlens = torch.tensor(BOUNDS, dtype=torch.int32)
    positions = torch.cat([torch.arange(b - a) for a, b in itertools.pairwise(BOUNDS)])
    cos, sin = (table[positions] for table in tables(100, 8))

    def alone(qkv: Tensor) -> Tensor:
        parts = [slice(a, b) for a, b in itertools.pairwise(BOUNDS) if b > a]
        return torch.cat([plain(qkv[None, p], (cos[p], sin[p]), **options)[0] for p in parts])

    check(
        lambda qkv: mk.packed_attention(
            qkv, HEADS, KV_HEADS, rotary=(cos, sin), cu_seqlens=cu_seqlens, max_seqlen=39, **options
        ),
        alone,
        [projection(1, 100)[0]],
        dtype=torch.float32,
        backend=backend,
    )


@pytest.mark.parametrize("backend", ALL)
def test_documents_do_not_leak(backend: str) -> None:
    """Other contents of one document, non-finite ones too, change no bit of another: outputs and gradients."""
    cu_seqlens, rotary = torch.tensor([0, 40, 100, 140, 150], dtype=torch.int32), tables(150, 8)

    def run(document: float) -> list[Tensor]:
        qkv = projection(1, 150)[0].bfloat16()
        qkv[40:100] *= document
        qkv.requires_grad_()
        out = mk.packed_attention(qkv, HEADS, KV_HEADS, rotary=rotary, cu_seqlens=cu_seqlens, max_seqlen=60)
        return [out.detach(), *torch.autograd.grad(out, qkv, torch.ones_like(out))]

    with mk.use_backend(backend):
        results = [run(1.0), run(-3.0), run(torch.nan)]
    others = torch.cat([torch.arange(40), torch.arange(100, 150)])
    for first, *rest in zip(*results, strict=True):
        assert torch.isfinite(first[others]).all()
        assert all(torch.equal(first[others], other[others]) for other in rest)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 3])
def test_it_is_rope_then_attention(dtype: torch.dtype, threads: int) -> None:
    """Up to roundings in between; tasks that are cut because they are few repeat their bits."""
    qkv, rotary = projection(1, 200, 2, 1, 64).to(dtype).requires_grad_(), tables(200, 32)

    def separate(qkv: Tensor) -> Tensor:
        q, k, v = qkv.unflatten(-1, (4, -1)).split((2, 1, 1), dim=2)
        return mk.attention(*mk.rope(q, k, *rotary), v)

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        outs = [separate(qkv), *(mk.packed_attention(qkv, 2, 1, rotary=rotary) for _ in range(2))]
        grads = [torch.autograd.grad(out, qkv, torch.ones_like(out))[0] for out in outs]
    finally:
        torch.set_num_threads(before)
    outs = [out.detach() for out in outs]
    assert torch.equal(outs[1], outs[2])
    assert torch.equal(grads[1], grads[2])
    error = 3 * torch.finfo(dtype).eps
    torch.testing.assert_close(outs[1], outs[0], rtol=error, atol=error * float(outs[0].abs().max()))
    torch.testing.assert_close(grads[1], grads[0], rtol=error, atol=error * float(grads[0].abs().max()))


@needs_native
def test_one_tensor_and_the_statistics_are_kept() -> None:
    chosen = {c.op: c.backend for c in mk.explain("cpu")}
    assert chosen["packed_attention_fwd"] == chosen["packed_attention_bwd"] == "cpu"
    qkv, rotary = projection(1, 40).requires_grad_(), tables(40, 8)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):  # type: ignore[func-returns-value]
        out = mk.packed_attention(qkv, HEADS, KV_HEADS, rotary=rotary)
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}
    for known in (qkv, out, *rotary):
        del storages[known.untyped_storage().data_ptr()]
    assert list(storages.values()) == [4 * 40 * HEADS], "the log-sum-exp"


def test_inputs_are_not_written_and_a_second_backward_is_refused() -> None:
    qkv, (cos, sin) = projection(1, 9).requires_grad_(), tables(9, 8)
    before = qkv.detach().clone()
    out = mk.packed_attention(qkv, HEADS, KV_HEADS, rotary=(cos, sin))
    dout = torch.ones_like(out)
    out.backward(dout)
    assert [x._version for x in (qkv, cos, sin, dout)] == [0, 0, 0, 0]
    assert torch.equal(qkv.detach(), before)
    assert torch.equal(dout, torch.ones_like(out))
    with pytest.raises(RuntimeError, match="second time"):
        out.backward(dout)


def test_an_overwritten_input_is_noticed() -> None:
    qkv = projection(1, 9).requires_grad_()
    packed = qkv * 1
    out = mk.packed_attention(packed, HEADS, KV_HEADS, rotary=tables(9, 8))
    packed.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_columns_of_a_wider_tensor(backend: str) -> None:
    wide = random(2, 30, 200).requires_grad_()
    with mk.use_backend(backend):
        viewed = mk.packed_attention(wide[..., 8:136], HEADS, KV_HEADS, rotary=tables(30, 8))
        copied = mk.packed_attention(wide[..., 8:136].contiguous(), HEADS, KV_HEADS, rotary=tables(30, 8))
    assert torch.equal(viewed, copied)
    grads = [torch.autograd.grad(out.square().sum(), wide)[0] for out in (viewed, copied)]
    assert torch.equal(*grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty(backend: str) -> None:
    with mk.use_backend(backend):
        qkv, bounds = torch.empty(0, 128).requires_grad_(), torch.zeros(1, dtype=torch.int32)
        out = mk.packed_attention(qkv, HEADS, KV_HEADS, rotary=tables(0, 8), cu_seqlens=bounds)
        out.sum().backward()
    assert out.shape == (0, HEADS, 16)
    assert qkv.grad is not None


def test_errors_name_value_and_limit() -> None:
    qkv = projection(1, 6)
    with pytest.raises(ValueError, match=r"qkv has shape \[6, 128\]: pass \[B, S, \(N \+ 2K\) D\]"):
        mk.packed_attention(qkv[0], HEADS, KV_HEADS)
    with pytest.raises(ValueError, match=r"qkv has 128 columns: must be a multiple of .* = 4 \+ 2 \* 3"):
        mk.packed_attention(qkv, 4, 3)
    with pytest.raises(ValueError, match=r"multiple of .* = 4 \+ 2 \* 0, both at least 1"):
        mk.packed_attention(qkv, 4, 0)
    with pytest.raises(ValueError, match=r"q has 2 heads: must be a multiple of the 3 heads of k"):
        mk.packed_attention(qkv, 2, 3)
    with pytest.raises(
        ValueError, match=r"cos has shape \[5, 8\], but q of shape \[1, 6, 4, 16\] needs one row"
    ):
        mk.packed_attention(qkv, HEADS, KV_HEADS, rotary=tables(5, 8))
    with pytest.raises(ValueError, match=r"window=0 must be at least 1"):
        mk.packed_attention(qkv, HEADS, KV_HEADS, window=0)
