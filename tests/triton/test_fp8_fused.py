"""Norms and activations that write FP8, interpreted: the bits of the unfused kernels, one after the other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from megalite_kernels.reference import fp8 as reference
from megalite_kernels.triton import activation, fp8_activation, fp8_norm, layer_norm, rms_norm
from megalite_kernels.triton.launch import Launch, override
from tests.helpers.margins import surrounded, surrounded_outputs
from tests.triton.test_fp8 import assert_same, wild

E4M3 = torch.float8_e4m3fn
SHAPES = [(1, 1), (37, 70), (12, 130), (0, 5), (5, 0)]
"""130 columns are beyond the longest row in registers here: three turns, the last of two columns."""
SOURCES = [torch.bfloat16, torch.float32]


@pytest.fixture(autouse=True)
def small_rows() -> Iterator[None]:
    blocks = Launch({"TILE": 256, "WARP": 512, "LIMIT": 256, "CHUNK": 64}, num_warps=32)
    with override("norm_forward", blocks), override("fp8_activation", blocks):
        yield


def assert_quantized(got: tuple[Tensor, ...], plain: tuple[Tensor, ...] | Tensor) -> None:
    """(y, data, scale, ...): y and the rest are the unfused op's, data and scale those of its y, bit for bit."""
    y, *rest = plain if isinstance(plain, tuple) else (plain,)
    rows = y.reshape(y.shape[:-1].numel(), y.shape[-1])
    assert_same(got, (y, *reference.quantize_rows(rows, E4M3), *rest))


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_norms(rows: int, columns: int, source: torch.dtype) -> None:
    x, residual = wild(rows, columns, source), wild(rows, columns, source).flip(0)
    weight, bias = 1 + wild(1, columns, source)[0] / 8, wild(2, columns, source)[1]
    assert_quantized(fp8_norm.rms_norm(x, weight, 1e-6, True), rms_norm.forward(x, weight, 1e-6, True))
    assert_quantized(
        fp8_norm.rms_norm_residual(x, residual, weight, 1e-6, False),
        rms_norm.residual_forward(x, residual, weight, 1e-6, False),
    )
    assert_quantized(fp8_norm.layer_norm(x, weight, bias, 1e-5), layer_norm.forward(x, weight, bias, 1e-5))
    assert_quantized(
        fp8_norm.layer_norm_residual(x, residual, weight, None, 1e-5),
        layer_norm.residual_forward(x, residual, weight, None, 1e-5),
    )


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("kind", ["gelu_tanh", "relu2", "silu"])
def test_activations(rows: int, columns: int, kind: str, source: torch.dtype) -> None:
    x, packed = wild(rows, columns, source), wild(rows, 2 * columns, source)
    assert_quantized(fp8_activation.forward(x, kind), activation.forward(x, kind))
    assert_quantized(fp8_activation.packed_forward(packed, kind), activation.packed_forward(packed, kind))


def test_what_is_quantised_is_what_was_rounded() -> None:
    """Elements just above a tie of e4m3, which bf16 rounds onto it: quantised from fp32 they would go up."""
    x = torch.full((4, 32), 1.0625 + 2.0**-9)
    weight = torch.ones(32)
    x[:, 0] = 0.25  # so that the norm changes nothing by itself but the scale
    y, data, scale, _ = fp8_norm.rms_norm(x.bfloat16(), weight, 1e-6, False)
    expected = reference.quantize_rows(y, E4M3)
    assert_same((data, scale), expected)
    up = torch.full((4, 32), 1.0 + 2.0**-7).bfloat16()
    gate = (1.0625 + 0.0625 * torch.arange(32)).expand(4, 32).bfloat16()
    packed = torch.cat([gate, up], 1)
    y, data, scale = fp8_activation.packed_forward(packed, "relu2")
    assert_same((data, scale), reference.quantize_rows(y, E4M3))
    exact = gate.float() ** 2 * up.float()
    direct, _ = reference.quantize_rows(exact, E4M3)
    assert not torch.equal(direct.float(), data.float()), "these numbers do not tell the two apart"


@pytest.mark.parametrize("columns", [64, 130])
def test_the_scale_is_that_of_what_was_rounded(columns: int) -> None:
    """Largest elements that bf16 rounds down to 1.75: those need half the scale of anything above it."""
    x, weight = torch.ones(3, columns).bfloat16(), torch.full((columns,), 1.75 * (1 + 2.0**-10))
    y, data, scale, _ = fp8_norm.rms_norm(x, weight, 0.0, False)
    assert (y == 1.75).all()
    assert scale.tolist() == [2.0**-8] * 3
    assert (data.float() == 448.0).all()


def test_views_and_leading_dims() -> None:
    wide = wild(10, 6 * 90, torch.bfloat16).reshape(10, 6, 90)
    for x in (wide[..., 3:63], wide.transpose(0, 1)[:, ::2]):
        weight = torch.ones(x.shape[-1]).bfloat16()
        expected = rms_norm.forward(x.contiguous(), weight, 1e-6, False)
        assert_quantized(fp8_norm.rms_norm(x, weight, 1e-6, False), expected)
        plain = activation.packed_forward(x.contiguous(), "silu")
        assert_quantized(fp8_activation.packed_forward(x, "silu"), plain)


@pytest.mark.parametrize("columns", [70, 130])
def test_nothing_outside_of_a_tensor_is_read_or_written(columns: int) -> None:
    x = surrounded(wild(5, columns, torch.bfloat16))
    weight, packed = surrounded(x[0].clone()), surrounded(wild(5, 2 * columns, torch.bfloat16))
    with surrounded_outputs():
        results = [
            fp8_norm.rms_norm_residual(x, x, weight, 1e-6, False),
            fp8_norm.layer_norm(x, weight, None, 1e-5),
            fp8_activation.packed_forward(packed, "silu"),
            fp8_activation.forward(x, "relu2"),
        ]
    assert all(torch.isfinite(tensor.float()).all() for result in results for tensor in result)
