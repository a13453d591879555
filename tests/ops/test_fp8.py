"""FP8: scales, rounding and products against their definition in float64, and the linear layer made of them."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import megalite_kernels as mk
from megalite_kernels.cases.fp8 import rounded
from megalite_kernels.ops import fp8
from megalite_kernels.ops.fp8 import E4M3, E5M2
from megalite_kernels.reference.fp8 import ABSOLUTE, LARGEST, RELATIVE, dequantize
from megalite_kernels.scaled_mm import lacks_fp8, scaled_mm_supports
from tests.ops.catalogue import DEVICE, DTYPES, random

FORMATS = [E4M3, E5M2]
SCALINGS: list[Literal["rowwise", "tensorwise"]] = ["rowwise", "tensorwise"]


def definition(value: float, scale: float, dtype: torch.dtype) -> float:
    """`value / scale` rounded to the nearest number of the format, ties to even, in Python's exact arithmetic."""
    digits, smallest = (4, -9) if dtype == E4M3 else (3, -16)
    x = value / scale
    if x == 0 or not math.isfinite(x):
        return x
    unit = 2.0 ** max(math.frexp(x)[1] - digits, smallest)
    return round(x / unit) * unit  # Python rounds halves to even


@pytest.mark.parametrize("dtype", FORMATS)
def test_scales_are_the_smallest_powers_of_two(dtype: torch.dtype) -> None:
    largest = LARGEST[dtype]
    amax = torch.tensor(
        [largest, largest * (1 + 2**-23), largest * (1 - 2**-23), 1.0, 1.75, 1.7500001, 3.4e38, 1e-30]
    )
    _, scale = fp8.quantize_rows(amax[:, None].to(DEVICE), dtype)
    for value, got in zip(amax.tolist(), scale.tolist(), strict=True):
        assert math.frexp(got)[0] == 0.5
        assert value / got <= largest
        assert value / (got / 2) > largest
    assert scale[:3].tolist() == [1.0, 2.0, 1.0]


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("source", DTYPES)
def test_every_number_is_rounded_to_nearest_even(source: torch.dtype, dtype: torch.dtype) -> None:
    """All magnitudes from below the smallest subnormal up, ties among them."""
    x = (random(64, 24) * torch.exp2(torch.linspace(-22, 3, 24, device=DEVICE))).to(source)
    x[:, :4] = (random(64, 4).to(source) * 16).round() / 16  # short significands: many ties
    data, scale = fp8.quantize_rows(x, dtype)
    for row in range(64):
        expected = [definition(v, float(scale[row]), dtype) for v in x[row].tolist()]
        assert data[row].float().tolist() == expected
    error = (x.double() - dequantize(data, scale, torch.float64)).abs()
    assert (error <= RELATIVE[dtype] * x.double().abs() + ABSOLUTE[dtype] * scale[:, None]).all()


@pytest.mark.parametrize("dtype", FORMATS)
def test_largest_smallest_zero_and_subnormal(dtype: torch.dtype) -> None:
    largest, tiny = LARGEST[dtype], 2 * ABSOLUTE[dtype]
    x = torch.zeros(5, 16, device=DEVICE)
    x[1, 0], x[1, 1], x[1, 2], x[1, 3] = largest, -largest, tiny, tiny / 2  # a tie: to zero
    x[2, 0] = torch.finfo(torch.float32).max
    x[3, 0], x[3, 1] = 1e-39, -1e-44  # float32's own subnormals
    x[4] = -0.0
    data, scale = fp8.quantize_rows(x, dtype)
    assert scale.tolist()[:2] == [1.0, 1.0]
    assert data[1].float().tolist()[:4] == [largest, -largest, tiny, 0.0]
    assert largest / 2 < data[2, 0].float() <= largest
    assert scale[3] == 2.0**-126
    assert torch.isfinite(data.float()).all()
    assert (data[0].float() == 0).all()
    assert torch.signbit(data[4].float()).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_so_and_in_its_row(bad: float) -> None:
    """A row (or, tensorwise, a tensor) with one such element is NaN as a whole: a step's guard then sees it."""
    x = random(6, 32)
    x[2, 5] = bad
    data, scale = fp8.quantize_rows(x, E4M3)
    values = dequantize(data, scale)
    assert torch.isnan(values[2]).all()
    assert torch.isfinite(values[[0, 1, 3, 4, 5]]).all()
    scale = fp8.tensor_scale(x, E5M2)
    assert torch.isnan(dequantize(fp8.cast(x, scale, E5M2), scale)).all()


@pytest.mark.parametrize("dtype", FORMATS)
def test_transposed_and_whole_tensors_are_the_same_rounding(dtype: torch.dtype) -> None:
    x = random(37, 21).bfloat16()
    data, scale = fp8.quantize_columns(x, dtype)
    rows, row_scale = fp8.quantize_rows(x.t().contiguous(), dtype)
    assert torch.equal(data.float(), rows.float())
    assert torch.equal(scale, row_scale)
    one = fp8.tensor_scale(x, dtype)
    _, flat = fp8.quantize_rows(x.reshape(1, -1), dtype)
    assert torch.equal(one, flat[0])
    assert torch.equal(
        fp8.cast_transposed(x, one, dtype).float(), fp8.cast(x, one, dtype).float().t().contiguous()
    )


@pytest.mark.parametrize("shape", [(0, 16), (5, 0)])
def test_empty(shape: tuple[int, int]) -> None:
    x = torch.empty(shape, device=DEVICE)
    assert fp8.quantize_rows(x, E4M3)[0].shape == shape
    assert fp8.quantize_columns(x, E4M3)[0].shape == shape[::-1]
    assert fp8.tensor_scale(x, E4M3) == 1


def test_parts_of_a_row_have_the_values_of_the_whole_but_below_the_normal_range() -> None:
    """What lets tensor-parallel ranks quantise their shards without asking each other."""
    x = (random(64, 256) * torch.exp(3 * random(64, 256, seed=1))).bfloat16()
    whole = rounded(x.float(), "rowwise")
    parts = torch.cat([rounded(part.float(), "rowwise") for part in x.chunk(4, 1)], 1)
    _, scale = fp8.quantize_rows(x, E4M3)
    normal = x.float().abs() >= 2.0**-6 * scale[:, None]
    assert torch.equal(whole[normal], parts[normal])
    assert not torch.equal(whole, parts)


@pytest.mark.parametrize("rowwise", [True, False])
@pytest.mark.parametrize("formats", [(E4M3, E4M3), (E5M2, E4M3)])
def test_product_sums_in_fp32_and_rounds_once(
    rowwise: bool, formats: tuple[torch.dtype, torch.dtype]
) -> None:
    a, b, bias = random(48, 512), random(32, 512, seed=1), random(32, seed=2).bfloat16()

    def quantized(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if rowwise:
            return fp8.quantize_rows(x, dtype)
        scale = fp8.tensor_scale(x, dtype)
        return fp8.cast(x, scale, dtype), scale

    (a8, a_scale), (b8, b_scale) = quantized(a, formats[0]), quantized(b, formats[1])
    out = fp8.product(a8, a_scale, b8, b_scale, bias, torch.bfloat16)
    wide, other = dequantize(a8, a_scale, torch.float64), dequantize(b8, b_scale, torch.float64)
    truth = wide @ other.t() + bias.double()
    # Half a unit of bf16, and fp32 sums of 512 terms.
    limit = 2.0**-8 * truth.abs() + 512 * 2.0**-24 * (wide.abs() @ other.abs().t())
    assert ((out.double() - truth).abs() <= limit).all()


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("shape", [(7,), (2, 5, 32)])
def test_leading_dims_bias_and_frozen_weights(shape: tuple[int, ...], scaling: str) -> None:
    x = random(*(shape if len(shape) > 1 else (16, 32))).bfloat16().requires_grad_()
    weight, bias = random(48, 32, seed=1).bfloat16(), random(48, seed=2).bfloat16().requires_grad_()
    out = mk.fp8_linear(x, weight, bias=bias, scaling=scaling)  # type: ignore[arg-type]
    assert out.shape == (*x.shape[:-1], 48)
    dx, dbias = torch.autograd.grad(out.sum(), [x, bias])
    assert dx.shape == x.shape
    assert torch.equal(dbias, torch.full_like(bias, x.numel() / 32))


# The relative error of a product of rounded factors, each of uniform relative error up to RELATIVE: that of one
# rounding is RELATIVE / sqrt(3) at the start of a binade and half of it at its end, 0.7 of that on average (root mean
# square); sums of independent terms keep it. Two factors: sqrt of the sum of squares. A quarter more for chance.
def expected_error(*formats: torch.dtype) -> float:
    return 1.25 * math.sqrt(sum((0.7 * RELATIVE[f] / math.sqrt(3)) ** 2 for f in formats))


@pytest.mark.parametrize("scaling", SCALINGS)
def test_errors_are_those_of_the_formats(scaling: Literal["rowwise", "tensorwise"]) -> None:
    """Of output and gradients against fp32, in root mean square."""
    x, weight, dy = random(256, 512), random(128, 512, seed=1) / 512**0.5, random(256, 128, seed=2)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    truth = [F.linear(x, weight)]
    truth += torch.autograd.grad(truth[0], leaves, dy)
    got = [mk.fp8_linear(x, weight, scaling=scaling)]
    got += torch.autograd.grad(got[0], leaves, dy)
    gradient = E4M3 if scaling == "rowwise" else E5M2
    limits = [expected_error(E4M3, E4M3), expected_error(gradient, E4M3), expected_error(gradient, E4M3)]
    if scaling == "rowwise":
        limits[2] = 1e-6  # a plain product
    for name, ours, exact, limit in zip(("out", "dx", "dweight"), got, truth, limits, strict=True):
        error = ((ours - exact).norm() / exact.norm()).item()
        assert error <= limit, f"{name}: {error:.4f} over {limit:.4f}"
        assert error >= limit / 3 or limit < 1e-3, f"{name}: {error:.4f} is too good to have been quantised"


def test_a_token_does_not_see_the_others_with_row_scales() -> None:
    x, weight = random(32, 64), random(48, 64, seed=1)
    other = x.clone()
    other[16:] *= 1e4
    assert torch.equal(mk.fp8_linear(x, weight)[:16], mk.fp8_linear(other, weight)[:16])
    assert not torch.equal(
        mk.fp8_linear(x, weight, scaling="tensorwise")[:16],
        mk.fp8_linear(other, weight, scaling="tensorwise")[:16],
    )


def test_errors_name_value_and_limit() -> None:
    x, weight = random(16, 32), random(48, 32)
    with pytest.raises(
        ValueError, match=r"scaling='blockwise' is not known: use one of 'rowwise', 'tensorwise'"
    ):
        mk.fp8_linear(x, weight, scaling="blockwise")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"weight has shape \[48, 31\]"):
        mk.fp8_linear(x, weight[:, :31])
    with pytest.raises(ValueError, match=r"main_grad has shape \[32, 48\]"):
        mk.fp8_linear(x, weight, main_grad=torch.zeros(32, 48, device=DEVICE))


def test_the_librarys_product_says_what_it_needs() -> None:
    a = random(16, 24).to(E4M3)
    assert "takes sizes in multiples of 16, not (16, 24) x (16, 24)" in str(
        scaled_mm_supports(a, None, a, None, None, torch.bfloat16)
    )
    assert "runs on NVIDIA GPUs" in str(lacks_fp8(torch.device("cpu")))


@pytest.mark.gpu
@pytest.mark.skipif(lacks_fp8(torch.device(DEVICE)) is not None, reason="needs a GPU with FP8 tensor cores")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rowwise", [True, False])
def test_the_librarys_product_is_the_definitions(rowwise: bool, dtype: torch.dtype) -> None:
    """`torch._scaled_mm` on the device against the emulated product: fp32 sums in another order, rounded once."""
    a, b, bias = random(256, 1024), random(512, 1024, seed=1), random(512, seed=2).bfloat16()
    if rowwise:
        (a8, a_scale), (b8, b_scale) = fp8.quantize_rows(a, E4M3), fp8.quantize_rows(b, E4M3)
    else:
        a_scale, b_scale = fp8.tensor_scale(a, E5M2), fp8.tensor_scale(b, E4M3)
        a8, b8 = fp8.cast(a, a_scale, E5M2), fp8.cast(b, b_scale, E4M3)
    for added in (None, bias):
        results = []
        for backend in ("cuda", "reference"):
            with mk.use_backend(backend):
                results.append(fp8.product(a8, a_scale, b8, b_scale, added, dtype).float())
        # Row scales give bf16 on the way to fp32.
        torch.testing.assert_close(*results, rtol=2.0**-7, atol=2.0**-7)
