"""RMSNorm on Triton: the raw ops, on the kernels that it shares with LayerNorm."""

from __future__ import annotations

from torch import Tensor

from megalite_kernels.triton.norm_backward import norm_backward
from megalite_kernels.triton.norm_forward import norm_forward


def forward(x: Tensor, weight: Tensor, eps: float, zero_centered: bool) -> tuple[Tensor, Tensor]:
    """Backend "triton" of `rms_norm_fwd`."""
    y, _, _, rstd = norm_forward(x, None, weight, None, eps, zero_centered=zero_centered, centered=False)
    return y, rstd


def residual_forward(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, zero_centered: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Backend "triton" of `rms_norm_residual_fwd`."""
    y, total, _, rstd = norm_forward(
        x, residual, weight, None, eps, zero_centered=zero_centered, centered=False
    )
    assert total is not None
    return y, total, rstd


def backward(
    dy: Tensor, dresidual: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor, zero_centered: bool
) -> tuple[Tensor, Tensor]:
    """Backend "triton" of `rms_norm_bwd`."""
    dx, dweight, _ = norm_backward(dy, dresidual, x, weight, None, rstd, zero_centered=zero_centered)
    return dx, dweight
