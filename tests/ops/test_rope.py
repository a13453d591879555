"""Rotary embedding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import megalite_kernels as mk
from tests.ops.catalogue import BACKENDS, DTYPES, check, random


def angles(tokens: int, half: int) -> Tensor:
    frequencies = 10000.0 ** (-torch.arange(half) / half)
    return torch.arange(tokens).unsqueeze(1) * frequencies


def plain(x: Tensor, angle: Tensor, interleaved: bool) -> Tensor:
    """The rotation as a complex product, an independent formulation."""
    half = angle.shape[-1]
    rotary, rest = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        first, second = rotary.unflatten(-1, (half, 2)).unbind(-1)
    else:
        first, second = rotary.unflatten(-1, (2, half)).unbind(-2)
    wide = torch.promote_types(x.dtype, torch.float32)
    turn = torch.polar(torch.ones_like(angle), angle).unsqueeze(-2)
    turned = torch.complex(first.to(wide), second.to(wide)) * turn
    parts = (turned.real, turned.imag)
    joined = torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)
    return torch.cat((joined.to(x.dtype), rest), -1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("dim", "half"), [(2, 1), (26, 13), (64, 32), (80, 20)])
def test_accuracy(dim: int, half: int, interleaved: bool, dtype: torch.dtype, backend: str) -> None:
    angle = angles(11, half)
    cos, sin = angle.double().cos(), angle.double().sin()

    def ours(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return mk.rope(q, k, cos.float(), sin.float(), interleaved=interleaved, rotary_dim=2 * half)

    def torch_rope(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return plain(q, angle, interleaved), plain(k, angle, interleaved)

    inputs = [random(2, 11, 3, dim), random(2, 11, 1, dim, seed=1)]
    check(ours, torch_rope, inputs, dtype=dtype, backend=backend, floor=2)  # cos, sin rounded to float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_of_a_fused_projection_give_the_same_bits(backend: str) -> None:
    packed, angle = random(10, 7, 16), angles(10, 8)
    q, k, _ = packed.split((4, 2, 1), dim=1)
    with mk.use_backend(backend):
        viewed = mk.rope(q, k, angle.cos(), angle.sin())
        copied = mk.rope(q.contiguous(), k.contiguous(), angle.cos(), angle.sin())
    assert all(torch.equal(a, b) and a.is_contiguous() for a, b in zip(viewed, copied, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_transposed_heads_and_batched_tables(backend: str) -> None:
    q, k = random(2, 3, 5, 8).transpose(1, 2), random(2, 5, 3, 8, seed=1)
    angle = angles(10, 4).view(2, 5, 4)
    with mk.use_backend(backend):
        got, _ = mk.rope(q, k, angle.cos(), angle.sin())
        rows = [mk.rope(q[i : i + 1], k[i : i + 1], angle[i].cos(), angle[i].sin())[0] for i in range(2)]
    assert torch.equal(got, torch.cat(rows))


@pytest.mark.parametrize("backend", BACKENDS)
def test_single_tokens_of_a_batch_that_was_heads_first(backend: str) -> None:
    """[B, N, 1, D] transposed: torch calls it contiguous, though the stride of its only token is that of a head."""
    q, k = random(3, 4, 1, 16).transpose(1, 2), random(3, 2, 1, 16, seed=1).transpose(1, 2)
    angle = angles(1, 8)
    tables = angle.cos(), angle.sin()
    with mk.use_backend(backend):
        for got, x in zip(mk.rope(q, k, *tables), (q, k), strict=True):
            torch.testing.assert_close(got, plain(x, angle, interleaved=False))
        q_place, k_place = q.clone(), k.clone()
        assert q_place.stride() == q.stride()
        mk.rope_(q_place, k_place, *tables)
    torch.testing.assert_close(q_place, plain(q, angle, interleaved=False))
    torch.testing.assert_close(k_place, plain(k, angle, interleaved=False))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("dim", "half"), [(2, 1), (26, 13), (64, 32), (80, 20)])
def test_norm_accuracy(dim: int, half: int, interleaved: bool, dtype: torch.dtype, backend: str) -> None:
    """The norm of each head comes before the rotation."""
    angle = angles(11, half)
    cos, sin = angle.double().cos().float(), angle.double().sin().float()

    def ours(q: Tensor, k: Tensor, wq: Tensor, wk: Tensor) -> tuple[Tensor, Tensor]:
        return mk.rope(q, k, cos, sin, q_norm=wq, k_norm=wk, interleaved=interleaved, norm_eps=1e-5)

    def torch_rope(q: Tensor, k: Tensor, wq: Tensor, wk: Tensor) -> tuple[Tensor, Tensor]:
        q, k = F.rms_norm(q, (dim,), wq, 1e-5), F.rms_norm(k, (dim,), wk, 1e-5)
        return plain(q, angle, interleaved), plain(k, angle, interleaved)

    inputs = [random(2, 11, 3, dim), random(2, 11, 1, dim, seed=1), random(dim, seed=2), random(dim, seed=3)]
    check(ours, torch_rope, inputs, dtype=dtype, backend=backend, floor=2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_norm_of_views_and_of_weights_in_another_dtype(backend: str) -> None:
    packed, angle = random(10, 7, 16).bfloat16(), angles(10, 6)
    weights = random(16, seed=1).requires_grad_(), random(16, seed=2).requires_grad_()
    options: dict[str, Tensor] = {"q_norm": weights[0], "k_norm": weights[1]}
    found = []
    with mk.use_backend(backend):
        for copy in (False, True):
            leaf = packed.clone().requires_grad_()
            q, k, _ = leaf.split((4, 2, 1), dim=1)
            if copy:
                q, k = q.contiguous(), k.contiguous()
            out = mk.rope(q, k, angle.cos(), angle.sin(), **options)  # type: ignore[arg-type]
            grads = torch.autograd.grad(out, [leaf, *weights], [torch.ones_like(o) for o in out])
            found.append([*out, *grads])
    assert found[0][3].dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_norm_extremes_and_nan(backend: str) -> None:
    q = torch.stack([torch.full((8,), v) for v in (1e18, -1e-30, 0.0, torch.nan, 1.0)]).view(5, 1, 8)
    table = angles(5, 4)
    with mk.use_backend(backend):
        got, _ = mk.rope(q, q[:, :0], table.cos(), table.sin(), q_norm=torch.ones(8), k_norm=torch.ones(8))
    expected = plain(F.rms_norm(q.double(), (8,), torch.ones(8).double(), 1e-6), table, False).float()
    torch.testing.assert_close(got, expected, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place_gives_the_bits_of_out_of_place(dtype: torch.dtype, interleaved: bool, backend: str) -> None:
    """Contiguous, views of one projection, batches with gaps, and features that are apart."""
    base, angle = random(3, 5, 7, 26).to(dtype), angles(5, 9)
    cos, sin = angle.cos(), angle.sin()
    views: list[tuple[Any, Any]] = [
        (lambda x: x[..., :4, :].contiguous(), lambda x: x[..., 4:6, :].contiguous()),
        (lambda x: x[..., :4, :], lambda x: x[..., 4:6, :]),
        (lambda x: x[:, ::2, :4], lambda x: x[:, ::2, 4:6]),
        (lambda x: x[..., ::5, :].transpose(-1, -2).contiguous().transpose(-1, -2), lambda x: x[..., 4:, :]),
    ]
    for q_of, k_of in views:
        q, k = q_of(base.clone()), k_of(base.clone())
        table = (cos[: q.shape[1]], sin[: q.shape[1]])
        with mk.use_backend(backend):
            expected = mk.rope(q, k, *table, interleaved=interleaved, rotary_dim=18)
            got = mk.rope_(q, k, *table, interleaved=interleaved)
        assert got[0] is q
        assert got[1] is k
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_place_gradients(backend: str) -> None:
    """On slices of a projection's output, whose own gradient has to come out right too."""
    angle, grads = angles(10, 8), []
    cos, sin = angle.cos(), angle.sin()
    with mk.use_backend(backend):
        for function in (mk.rope, mk.rope_):
            x, weight = random(10, 12).requires_grad_(), random(12, 112, seed=1).requires_grad_()
            qkv = (x @ weight).view(10, 7, 16)
            q, k = function(qkv[:, :4], qkv[:, 4:6], cos, sin)
            loss = q.pow(3).sum() + k.pow(2).sum() + qkv[:, 6:].sum()
            grads.append(torch.autograd.grad(loss, [x, weight]))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_in_place_on_what_a_backward_needs_is_an_error() -> None:
    q, table = random(3, 2, 8).requires_grad_(), angles(3, 4)
    squares = (q * 1).square()
    doubled = squares * 1
    loss = doubled.square().sum()
    mk.rope_(doubled, squares.detach().clone(), table.cos(), table.sin())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty(backend: str) -> None:
    q, table = torch.empty(0, 4, 8), torch.empty(0, 4)
    with mk.use_backend(backend):
        assert mk.rope(q, q, table, table)[0].shape == (0, 4, 8)


def test_inputs_are_not_written() -> None:
    q, k, angle = random(3, 2, 8).requires_grad_(), random(3, 2, 8).requires_grad_(), angles(3, 4)
    sum(x.sum() for x in mk.rope(q, k, angle.cos(), angle.sin())).backward()  # type: ignore[union-attr]
    assert q._version == k._version == 0


def test_errors_name_value_and_limit() -> None:
    q, table = random(3, 2, 8), angles(3, 4)
    with pytest.raises(ValueError, match=r"k has shape \[3, 2, 6\], but q of shape \[3, 2, 8\] needs"):
        mk.rope(q, q[..., :6], table, table)
    with pytest.raises(ValueError, match=r"cos has shape \[2, 4\], but q of shape \[3, 2, 8\] needs one row"):
        mk.rope(q, q, table[:2], table[:2])
    with pytest.raises(ValueError, match=r"rotary_dim=6 must be twice the columns of cos, which are 4"):
        mk.rope(q, q, table, table, rotary_dim=6)
    with pytest.raises(ValueError, match=r"cos has 5 columns: at most half of the head's 8 features"):
        mk.rope(q, q, angles(3, 5), angles(3, 5))
    with pytest.raises(ValueError, match=r"q_norm and k_norm must be given together"):
        mk.rope(q, q, table, table, q_norm=torch.ones(8))
    with pytest.raises(ValueError, match=r"q_norm has shape \[4\], but heads of 8 features needs \[8\]"):
        mk.rope(q, q, table, table, q_norm=torch.ones(4), k_norm=torch.ones(8))
    with pytest.raises(ValueError, match=r"norm_eps=-1.0 must be at least 0"):
        mk.rope(q, q, table, table, q_norm=torch.ones(8), k_norm=torch.ones(8), norm_eps=-1.0)
    with pytest.raises(ValueError, match=r"rotary_dim=6 must be twice the columns of cos, which are 4"):
        mk.rope_(q, q.clone(), table, table, rotary_dim=6)
    with pytest.raises(ValueError, match=r"q has shape \[3, 8\]: pass \[B, S, N, D\] or packed"):
        mk.rope(q[:, 0], q[:, 0], table, table)
