"""swiglu, geglu, gelu, relu²."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import megalite_kernels as mk
from tests.ops.catalogue import BACKENDS, DTYPES, check, needs_native, random

SIZES = [1, 13, 64, 704]


def plain_swiglu(packed: Tensor) -> Tensor:
    gate, up = packed.chunk(2, dim=-1)
    return F.silu(gate) * up


def plain_gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
class TestAccuracy:
    def test_swiglu_packed(self, size: int, dtype: torch.dtype, backend: str) -> None:
        inputs = [random(9, 2 * size, scale=3)]
        check(mk.swiglu, plain_swiglu, inputs, dtype=dtype, backend=backend)

    def test_swiglu_pair(self, size: int, dtype: torch.dtype, backend: str) -> None:
        inputs = [random(9, size, scale=3), random(9, size, seed=1)]
        check(mk.swiglu, lambda g, u: F.silu(g) * u, inputs, dtype=dtype, backend=backend)

    def test_geglu(self, size: int, dtype: torch.dtype, backend: str) -> None:
        inputs = [random(9, size, scale=3), random(9, size, seed=1)]
        check(mk.geglu, lambda g, u: plain_gelu(g) * u, inputs, dtype=dtype, backend=backend)

    def test_gelu_tanh(self, size: int, dtype: torch.dtype, backend: str) -> None:
        check(mk.gelu, plain_gelu, [random(9, size, scale=3)], dtype=dtype, backend=backend)

    def test_relu_squared(self, size: int, dtype: torch.dtype, backend: str) -> None:
        inputs = [random(9, size)]
        check(mk.relu_squared, lambda x: torch.relu(x).square(), inputs, dtype=dtype, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
class TestExactGelu:
    def test_gelu_accuracy(self, size: int, dtype: torch.dtype, backend: str) -> None:
        inputs = [random(9, size, scale=3)]
        check(lambda x: mk.gelu(x, approximate="none"), F.gelu, inputs, dtype=dtype, backend=backend, floor=2)

    def test_geglu_accuracy(self, size: int, dtype: torch.dtype, backend: str) -> None:
        inputs = [random(9, size, scale=3), random(9, size, seed=1)]
        check(
            lambda g, u: mk.geglu(g, u, approximate="none"),
            lambda g, u: F.gelu(g) * u,
            inputs,
            dtype=dtype,
            backend=backend,
        )


@needs_native
def test_exact_gelu_accuracy_near_and_far_from_zero() -> None:
    """Relative to the value itself: no cancellation in the negative tail."""
    x = torch.linspace(-12, 12, 100_001).requires_grad_()
    wide = x.detach().double().requires_grad_()
    with mk.use_backend("cpu"):
        y = mk.gelu(x, approximate="none")
        (dx,) = torch.autograd.grad(y.sum(), x)
    truth = 0.5 * wide * torch.erfc(-wide / 2**0.5)
    (slope,) = torch.autograd.grad(truth.sum(), wide)
    torch.testing.assert_close(
        y.double(), truth, rtol=1e-5, atol=0
    )  # the exponential of -72 has an error of 4e-6
    inner = x.detach().abs() < 3
    torch.testing.assert_close(y.double()[inner], truth[inner], rtol=8e-7, atol=0)
    torch.testing.assert_close(dx.double(), slope, rtol=1e-6, atol=5e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_biases(backend: str) -> None:
    inputs = [random(5, 24), random(24, seed=1)]
    for ours, plain in (
        (lambda x, b: mk.swiglu(x, bias=b), lambda x, b: plain_swiglu(x + b)),
        (lambda x, b: mk.gelu(x, bias=b), lambda x, b: plain_gelu(x + b)),
        (lambda x, b: mk.relu_squared(x, bias=b), lambda x, b: torch.relu(x + b).square()),
        (lambda x, b: mk.swiglu(x[:, :12], x[:, 12:], bias=b), lambda x, b: plain_swiglu(x + b)),
    ):
        check(ours, plain, inputs, dtype=torch.float32, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", [mk.swiglu, mk.geglu, lambda g, u: mk.geglu(g, u, approximate="none")])
def test_extremes_saturate(op: object, backend: str) -> None:
    gate = torch.tensor([-1e30, -1e4, -100.0, -0.0, 0.0, 100.0, 1e4, 1e18], requires_grad=True)
    up = torch.ones(8)
    with mk.use_backend(backend):
        y = op(gate, up)  # type: ignore[operator]
        (dgate,) = torch.autograd.grad(y.sum(), gate)
    torch.testing.assert_close(y, torch.tensor([0, 0, 0, 0, 0, 100.0, 1e4, 1e18]), atol=1e-30, rtol=1e-6)
    torch.testing.assert_close(dgate, torch.tensor([0, 0, 0, 0.5, 0.5, 1, 1, 1]), atol=1e-30, rtol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_passes_through(backend: str) -> None:
    x = torch.tensor([1.0, torch.nan, -2.0])
    with mk.use_backend(backend):
        for op in (
            mk.gelu,
            lambda x: mk.gelu(x, approximate="none"),
            mk.relu_squared,
            lambda x: mk.swiglu(x, torch.ones(3)),
        ):
            assert torch.equal(torch.isnan(op(x)), torch.isnan(x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous_and_empty(backend: str) -> None:
    inputs = [random(24, 10)]
    check(
        lambda x: mk.swiglu(x.t()),
        lambda x: plain_swiglu(x.t()),
        inputs,
        dtype=torch.float32,
        backend=backend,
    )
    with mk.use_backend(backend):
        assert mk.swiglu(torch.empty(0, 8)).shape == (0, 4)
        assert mk.gelu(torch.empty(3, 0)).shape == (3, 0)


def test_inputs_are_not_written() -> None:
    x = random(5, 16).requires_grad_()
    mk.swiglu(x).sum().backward()
    assert x._version == 0


def test_errors_name_value_and_limit() -> None:
    x = random(4, 7)
    with pytest.raises(ValueError, match=r"gate has 7 features: a packed"):
        mk.swiglu(x)
    with pytest.raises(ValueError, match=r"up has shape \[4, 6\], but the shape of gate needs \[4, 7\]"):
        mk.swiglu(x, x[:, :6])
    with pytest.raises(ValueError, match=r"bias has shape \[7\], but gate and up with 14 features together"):
        mk.swiglu(x, x, bias=torch.ones(7))
    with pytest.raises(ValueError, match=r"approximate='erf' is not known: use one of 'tanh', 'none'"):
        mk.gelu(x, approximate="erf")
    with pytest.raises(ValueError, match=r"bias is torch.bfloat16 but x is torch.float32"):
        mk.gelu(x, bias=torch.ones(7, dtype=torch.bfloat16))
