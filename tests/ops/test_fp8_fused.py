"""Norms and activations that quantise what they write: the bits of doing one after the other, and its gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import megalite_kernels as mk
from megalite_kernels import backend
from megalite_kernels.ops import fp8
from megalite_kernels.ops.fp8_linear import quantize_weight
from megalite_kernels.ops.quantized import QuantizedTensor
from tests.ops.catalogue import BACKENDS, DTYPES, cpu_only, random

ROWS, COLUMNS = 13, 48
X, RESIDUAL, WEIGHT, BIAS = (
    random(ROWS, COLUMNS),
    random(ROWS, COLUMNS, seed=1),
    random(COLUMNS, seed=2),
    random(COLUMNS),
)
Both = tuple[Callable[..., Any], Callable[..., Any], list[Tensor]]
OPS: dict[str, Both] = {
    "rms_norm": (mk.fp8_rms_norm, mk.rms_norm, [X, WEIGHT]),
    "rms_norm_centered": (
        lambda x, w: mk.fp8_rms_norm(x, w, 1e-3, zero_centered=True),
        lambda x, w: mk.rms_norm(x, w, 1e-3, zero_centered=True),
        [X, WEIGHT],
    ),
    "rms_norm_residual": (
        lambda x, r, w: mk.fp8_rms_norm(x, w, residual=r),
        lambda x, r, w: mk.rms_norm(x, w, residual=r),
        [X, RESIDUAL, WEIGHT],
    ),
    "layer_norm": (mk.fp8_layer_norm, mk.layer_norm, [X, WEIGHT, BIAS]),
    "layer_norm_residual": (
        lambda x, r, w: mk.fp8_layer_norm(x, w, None, 1e-3, residual=r),
        lambda x, r, w: mk.layer_norm(x, w, None, 1e-3, residual=r),
        [X, RESIDUAL, WEIGHT],
    ),
    "swiglu": (lambda x: mk.fp8_activation(x, "swiglu"), mk.swiglu, [X]),
    "geglu": (lambda x: mk.fp8_activation(x, "geglu"), mk.geglu, [X]),
    "gelu": (lambda x: mk.fp8_activation(x, "gelu"), mk.gelu, [X]),
    "relu_squared": (lambda x: mk.fp8_activation(x, "relu_squared"), mk.relu_squared, [X]),
}


def leaves_of(inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [x.to(dtype).requires_grad_() for x in inputs]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPS)
def test_the_bits_of_one_after_the_other(name: str, dtype: torch.dtype, backend: str) -> None:
    """Outputs, their FP8, and gradients, through the output and through the new residual."""
    fused, plain, inputs = OPS[name]
    ours, theirs = leaves_of(inputs, dtype), leaves_of(inputs, dtype)
    with mk.use_backend(backend, "reference"):
        got, expected = fused(*ours), plain(*theirs)
        quantized, *total = got if not isinstance(got, QuantizedTensor) else (got,)
        y, *expected_total = expected if isinstance(expected, tuple) else (expected,)
        data, scale = fp8.quantize_rows(y.detach(), fp8.E4M3)
        gradients = []
        for outputs, leaves in (((quantized.value, *total), ours), ((y, *expected_total), theirs)):
            loss = sum((o.float() * (i + 2)).square().sum() for i, o in enumerate(outputs))
            gradients.append(torch.autograd.grad(loss, leaves))  # type: ignore[arg-type]
    assert torch.equal(quantized.value, y)
    assert torch.equal(quantized.data.float(), data.float())
    assert torch.equal(quantized.scale, scale)
    assert all(torch.equal(a, b) for a, b in zip(total, expected_total, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert not quantized.data.requires_grad
    assert not quantized.scale.requires_grad


@pytest.mark.parametrize("name", ["rms_norm_residual", "layer_norm_residual"])
def test_one_output_may_go_unused(name: str) -> None:
    fused, plain, inputs = OPS[name]
    for place in (0, 1):
        found = []
        for function in (fused, plain):
            leaves = leaves_of(inputs, torch.float32)
            out = function(*leaves)[place]
            value = out.value if isinstance(out, QuantizedTensor) else out
            found.append(torch.autograd.grad(value.square().sum(), leaves, allow_unused=True))
        for ours, theirs in zip(*found, strict=True):
            assert torch.equal(ours, theirs)


def test_leading_dims() -> None:
    x = random(2, 3, COLUMNS).bfloat16()
    for got in (mk.fp8_rms_norm(x, WEIGHT.bfloat16()), mk.fp8_activation(x, "gelu")):
        assert got.value.shape == x.shape
        assert (got.data.shape, got.scale.shape) == ((6, COLUMNS), (6,))
        out = mk.fp8_linear(got, random(32, COLUMNS).bfloat16())
        assert out.shape == (2, 3, 32)
        assert torch.equal(out, mk.fp8_linear(got.value, random(32, COLUMNS).bfloat16()))


@pytest.mark.parametrize("scaling", ["rowwise", "tensorwise"])
def test_a_weight_quantised_once_serves_both_products(scaling: Any) -> None:
    x, weight = random(16, 32).requires_grad_(), random(48, 32, seed=1).requires_grad_()
    copies = quantize_weight(weight.detach(), scaling)
    results = []
    for given in (None, copies):
        out = mk.fp8_linear(x, weight, scaling=scaling, quantized_weight=given)
        results.append([out, *torch.autograd.grad(out.square().sum(), [x, weight])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    # It is these that are multiplied with.
    doubled = copies._replace(rows=(copies.rows[0], copies.rows[1] * 2))
    assert torch.equal(mk.fp8_linear(x, weight, scaling=scaling, quantized_weight=doubled), 2 * results[0][0])


@cpu_only
@pytest.mark.parametrize("op", ["fp8_quantize_rows", "fp8_rms_norm_fwd", "fp8_activation_fwd"])
def test_gpus_without_fp8_are_passed_over(monkeypatch: pytest.MonkeyPatch, op: str) -> None:
    """Triton converts to e4m3fn from sm_89 on; plain torch does everywhere."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    supports = backend._implementations[op]["triton"].supports
    assert supports is not None
    with FakeTensorMode():
        x = torch.empty(2, 16, device="cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert "NVIDIA A100 has compute capability 8.0" in str(supports(x))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert supports(x) is None


def test_errors_name_value_and_limit() -> None:
    quantized = mk.fp8_rms_norm(X, WEIGHT)
    with pytest.raises(
        ValueError, match=r"x has a scale for each row: scaling='tensorwise' takes a plain tensor"
    ):
        mk.fp8_linear(quantized, random(16, COLUMNS), scaling="tensorwise")
    with pytest.raises(ValueError, match=r"weight has shape \[48, 31\]"):
        mk.fp8_linear(quantized, random(48, 31))
    with pytest.raises(ValueError, match=r"activation='silu' is not known: use one of 'swiglu', 'geglu'"):
        mk.fp8_activation(X, "silu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="x has 47 features: a packed"):
        mk.fp8_activation(X[:, :47], "swiglu")
    with pytest.raises(ValueError, match=r"residual has shape \[12, 48\]"):
        mk.fp8_rms_norm(X, WEIGHT, residual=X[:12])
    with pytest.raises(ValueError, match=r"bias has shape \[47\]"):
        mk.fp8_layer_norm(X, WEIGHT, BIAS[:47])
