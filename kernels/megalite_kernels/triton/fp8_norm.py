"""Norms that also write their output in FP8, on Triton: the raw ops, on the kernels of `norm_forward.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from megalite_kernels.triton.norm_forward import norm_forward


def _empty(x: Tensor) -> tuple[Tensor, Tensor]:
    """Data [rows, H] and scale [rows] to be written."""
    rows = x.shape[:-1].numel()
    data = x.new_empty((rows, x.shape[-1]), dtype=torch.float8_e4m3fn)
    return data, x.new_empty(rows, dtype=torch.float32)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, zero_centered: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Backend "triton" of `fp8_rms_norm_fwd`."""
    out = _empty(x)
    options = {"zero_centered": zero_centered, "centered": False}
    y, _, _, rstd = norm_forward(x, None, weight, None, eps, **options, quantized=out)
    return y, *out, rstd


def rms_norm_residual(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, zero_centered: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Backend "triton" of `fp8_rms_norm_residual_fwd`."""
    out = _empty(x)
    options = {"zero_centered": zero_centered, "centered": False}
    y, total, _, rstd = norm_forward(x, residual, weight, None, eps, **options, quantized=out)
    assert total is not None
    return y, *out, total, rstd


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Backend "triton" of `fp8_layer_norm_fwd`."""
    out = _empty(x)
    options = {"zero_centered": False, "centered": True}
    y, _, mean, rstd = norm_forward(x, None, weight, bias, eps, **options, quantized=out)
    assert mean is not None
    return y, *out, mean, rstd


def layer_norm_residual(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Backend "triton" of `fp8_layer_norm_residual_fwd`."""
    out = _empty(x)
    options = {"zero_centered": False, "centered": True}
    y, total, mean, rstd = norm_forward(x, residual, weight, bias, eps, **options, quantized=out)
    assert total is not None
    assert mean is not None
    return y, *out, total, mean, rstd
