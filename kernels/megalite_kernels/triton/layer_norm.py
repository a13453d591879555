"""LayerNorm on Triton: the raw ops, on the kernels that it shares with RMSNorm."""

from __future__ import annotations

from torch import Tensor

from megalite_kernels.triton.norm_backward import norm_backward
from megalite_kernels.triton.norm_forward import norm_forward


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Backend "triton" of `layer_norm_fwd`."""
    y, _, mean, rstd = norm_forward(x, None, weight, bias, eps, zero_centered=False, centered=True)
    assert mean is not None
    return y, mean, rstd


def residual_forward(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Backend "triton" of `layer_norm_residual_fwd`."""
    y, total, mean, rstd = norm_forward(x, residual, weight, bias, eps, zero_centered=False, centered=True)
    assert total is not None
    assert mean is not None
    return y, total, mean, rstd


def backward(
    dy: Tensor, dresidual: Tensor | None, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Backend "triton" of `layer_norm_bwd`."""
    dx, dweight, dbias = norm_backward(dy, dresidual, x, weight, mean, rstd, zero_centered=False)
    assert dbias is not None
    return dx, dweight, dbias
