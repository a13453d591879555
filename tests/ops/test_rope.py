"""Rotary embedding."""

from __future__ import annotations

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
def test_norms_come_before_the_rotation(backend: str) -> None:
    angle = angles(6, 8)

    def ours(q: Tensor, k: Tensor, wq: Tensor, wk: Tensor) -> tuple[Tensor, Tensor]:
        return mk.rope(q, k, angle.cos(), angle.sin(), q_norm=wq, k_norm=wk)

    def torch_rope(q: Tensor, k: Tensor, wq: Tensor, wk: Tensor) -> tuple[Tensor, Tensor]:
        q, k = F.rms_norm(q, (16,), wq, 1e-6), F.rms_norm(k, (16,), wk, 1e-6)
        return plain(q, angle, False), plain(k, angle, False)

    inputs = [random(6, 4, 16), random(6, 2, 16, seed=1), random(16, seed=2), random(16, seed=3)]
    check(ours, torch_rope, inputs, dtype=torch.float32, backend=backend, floor=2)


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
    with pytest.raises(ValueError, match=r"q has shape \[3, 8\]: pass \[B, S, N, D\] or packed"):
        mk.rope(q[:, 0], q[:, 0], table, table)
