"""Norms and activations with their output in FP8 beside it, in plain torch: their definition is one after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from megalite_kernels.reference import activation
from megalite_kernels.reference import layer_norm as layer
from megalite_kernels.reference import rms_norm as rms
from megalite_kernels.reference.fp8 import quantize_rows


def rows_of(y: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 [rows, C] and scale [rows] of y [..., C]."""
    return quantize_rows(y.reshape(y.shape[:-1].numel(), y.shape[-1]), torch.float8_e4m3fn)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, zero_centered: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, data, scale, rstd)."""
    y, rstd = rms.forward(x, weight, eps, zero_centered)
    return y, *rows_of(y), rstd


def rms_norm_residual(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, zero_centered: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y, data, scale, x + residual, rstd)."""
    y, total, rstd = rms.residual_forward(x, residual, weight, eps, zero_centered)
    return y, *rows_of(y), total, rstd


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y, data, scale, mean, rstd)."""
    y, mean, rstd = layer.forward(x, weight, bias, eps)
    return y, *rows_of(y), mean, rstd


def layer_norm_residual(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y, data, scale, x + residual, mean, rstd)."""
    y, total, mean, rstd = layer.residual_forward(x, residual, weight, bias, eps)
    return y, *rows_of(y), total, mean, rstd


def forward(x: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """(y, data, scale)."""
    y = activation.forward(x, kind)
    return y, *rows_of(y)


def packed_forward(packed: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """(y, data, scale)."""
    gate, up = packed.chunk(2, dim=-1)
    y = activation.gated_forward(gate, up, kind).contiguous()
    return y, *rows_of(y)
