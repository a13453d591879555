"""rms_norm and layer_norm, alone and with the residual addition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import megalite_kernels as mk
from tests.ops.catalogue import BACKENDS, DTYPES, check, needs_native, random

ROWS_AND_SIZES = [(3, 1), (5, 17), (64, 64), (130, 256), (2, 4099)]


def plain_rms(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, 1e-6)


def plain_layer(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],), weight, bias, 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), ROWS_AND_SIZES)
class TestAccuracy:
    def test_rms_norm(self, rows: int, size: int, dtype: torch.dtype, backend: str) -> None:
        inputs = [random(rows, size), random(size, seed=1)]
        check(mk.rms_norm, plain_rms, inputs, dtype=dtype, backend=backend)

    def test_rms_norm_with_residual(self, rows: int, size: int, dtype: torch.dtype, backend: str) -> None:
        inputs = [random(rows, size), random(rows, size, seed=2), random(size, seed=1)]
        check(
            lambda x, r, w: mk.rms_norm(x, w, residual=r),
            lambda x, r, w: (plain_rms(x + r, w), x + r),
            inputs,
            dtype=dtype,
            backend=backend,
        )

    def test_layer_norm(self, rows: int, size: int, dtype: torch.dtype, backend: str) -> None:
        inputs = [random(rows, size) + 3, random(size, seed=1), random(size, seed=2)]
        check(mk.layer_norm, plain_layer, inputs, dtype=dtype, backend=backend)

    def test_layer_norm_with_residual(self, rows: int, size: int, dtype: torch.dtype, backend: str) -> None:
        inputs = [random(rows, size), random(rows, size, seed=3), random(size, seed=1), random(size, seed=2)]
        check(
            lambda x, r, w, b: mk.layer_norm(x, w, b, residual=r),
            lambda x, r, w, b: (plain_layer(x + r, w, b), x + r),
            inputs,
            dtype=dtype,
            backend=backend,
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_centered_weight_is_one_plus_weight(backend: str) -> None:
    inputs = [random(7, 48), random(48, seed=1, scale=0.1)]
    check(
        lambda x, w: mk.rms_norm(x, w, zero_centered=True),
        lambda x, w: plain_rms(x, 1 + w),
        inputs,
        dtype=torch.float32,
        backend=backend,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_layer_norm_without_bias(backend: str) -> None:
    check(
        mk.layer_norm, plain_layer, [random(9, 40), random(40, seed=1)], dtype=torch.float32, backend=backend
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1e-18, 1e-4, 1e4, 1e18])
def test_extreme_scales(scale: float, backend: str) -> None:
    inputs = [random(4, 64, scale=scale), random(64, seed=1)]
    check(mk.rms_norm, plain_rms, inputs, dtype=torch.float32, backend=backend, floor=4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_layer_norm_with_a_large_mean(backend: str) -> None:
    inputs = [random(4, 256) + 1000, random(256, seed=1), random(256, seed=2)]
    check(mk.layer_norm, plain_layer, inputs, dtype=torch.float32, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_rows_keep_the_weight_gradient_accurate(backend: str) -> None:
    inputs = [random(5000, 24), random(24, seed=1)]
    check(mk.rms_norm, plain_rms, inputs, dtype=torch.float32, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_non_contiguous_and_higher_dims(dtype: torch.dtype, backend: str) -> None:
    inputs = [random(6, 4, 32), random(32, seed=1)]
    check(
        lambda x, w: mk.rms_norm(x.transpose(0, 1), w),
        lambda x, w: plain_rms(x.transpose(0, 1), w),
        inputs,
        dtype=dtype,
        backend=backend,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty(backend: str) -> None:
    x, weight = torch.empty(0, 16, requires_grad=True), torch.ones(16, requires_grad=True)
    with mk.use_backend(backend):
        mk.rms_norm(x, weight).sum().backward()
    assert x.grad is not None
    assert x.grad.shape == (0, 16)
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.zeros(16))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_row(backend: str) -> None:
    x = random(3, 20)
    x[1, 5] = torch.nan
    with mk.use_backend(backend):
        y = mk.rms_norm(x, torch.ones(20))
    assert torch.equal(torch.isfinite(y).all(1), torch.tensor([True, False, True]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_mixed_dtypes_fp32_weight_with_bf16_rows(backend: str) -> None:
    x, weight = random(5, 32).bfloat16().requires_grad_(), random(32, seed=1).requires_grad_()
    with mk.use_backend(backend):
        y = mk.rms_norm(x, weight)
        y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    truth = plain_rms(x.detach().double(), weight.detach().double())
    torch.testing.assert_close(y.double(), truth, rtol=2**-8, atol=1e-6)  # one rounding to bf16


def test_inputs_are_not_written() -> None:
    x, residual, weight = random(5, 16).requires_grad_(), random(5, 16, seed=1), random(16, seed=2)
    versions = [t._version for t in (x, residual, weight)]
    y, total = mk.rms_norm(x, weight, residual=residual)
    dy = torch.ones_like(y)
    torch.autograd.backward([y, total], [dy, dy])
    assert [t._version for t in (x, residual, weight)] == versions
    assert torch.equal(dy, torch.ones_like(y))


@needs_native
def test_same_bits_on_every_run_and_for_a_row_alone() -> None:
    x, weight = random(300, 256).bfloat16(), random(256, seed=1).bfloat16()
    y = mk.rms_norm(x, weight)
    assert torch.equal(y, mk.rms_norm(x, weight))
    assert torch.equal(y[17], mk.rms_norm(x[17:18], weight)[0])


def test_errors_name_value_and_limit() -> None:
    x, weight = random(4, 16), torch.ones(16)
    with pytest.raises(ValueError, match=r"weight has shape \[8\], but x with 16 features needs \[16\]"):
        mk.rms_norm(x, weight[:8])
    with pytest.raises(ValueError, match=r"x has dtype torch.int64: pass bfloat16"):
        mk.rms_norm(torch.ones(4, 16, dtype=torch.int64), weight)
    with pytest.raises(ValueError, match=r"eps=-1.0 must be at least 0"):
        mk.rms_norm(x, weight, -1.0)
    with pytest.raises(ValueError, match=r"residual is torch.bfloat16 but x is torch.float32"):
        mk.rms_norm(x, weight, residual=x.bfloat16())
    with pytest.raises(ValueError, match=r"residual has shape \[3, 16\]"):
        mk.layer_norm(x, weight, residual=x[:3])
    with pytest.raises(ValueError, match=r"bias has shape \[4\]"):
        mk.layer_norm(x, weight, weight[:4])
