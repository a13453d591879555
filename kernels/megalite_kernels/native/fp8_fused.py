"""Norms and activations with their output in FP8 beside it, on the native library: its own kernels, then plain torch.

FP8 is emulated on CPUs to try its numerics, so the values must be those of the norms there, and speed is no aim.
"""

from __future__ import annotations

from torch import Tensor

from megalite_kernels.native import activation
from megalite_kernels.native import layer_norm as layer
from megalite_kernels.native import rms_norm as rms
from megalite_kernels.reference.fp8_fused import rows_of


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, zero_centered: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Backend "cpu" of `fp8_rms_norm_fwd`."""
    y, rstd = rms.forward(x, weight, eps, zero_centered)
    return y, *rows_of(y), rstd


def rms_norm_residual(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, zero_centered: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Backend "cpu" of `fp8_rms_norm_residual_fwd`."""
    y, total, rstd = rms.residual_forward(x, residual, weight, eps, zero_centered)
    return y, *rows_of(y), total, rstd


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Backend "cpu" of `fp8_layer_norm_fwd`."""
    y, mean, rstd = layer.forward(x, weight, bias, eps)
    return y, *rows_of(y), mean, rstd


def layer_norm_residual(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Backend "cpu" of `fp8_layer_norm_residual_fwd`."""
    y, total, mean, rstd = layer.residual_forward(x, residual, weight, bias, eps)
    return y, *rows_of(y), total, mean, rstd


def forward(x: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Backend "cpu" of `fp8_activation_fwd`."""
    y = activation.forward(x, kind)
    return y, *rows_of(y)


def packed_forward(packed: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Backend "cpu" of `fp8_glu_fwd`."""
    y = activation.packed_forward(packed, kind)
    return y, *rows_of(y)
