"""RMSNorm on the native library."""

from __future__ import annotations

import torch
from torch import Tensor

from megalite_kernels import _C
from megalite_kernels.native.common import DTYPES, address, float_weights, threads


def forward(x: Tensor, weight: Tensor, eps: float, zero_centered: bool) -> tuple[Tensor, Tensor]:
    """Backend "cpu" of `rms_norm_fwd`."""
    y, _, rstd = _forward(x, None, weight, eps, zero_centered)
    return y, rstd


def residual_forward(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, zero_centered: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Backend "cpu" of `rms_norm_residual_fwd`."""
    y, total, rstd = _forward(x, residual.contiguous(), weight, eps, zero_centered)
    assert total is not None
    return y, total, rstd


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, zero_centered: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    x, gain = x.contiguous(), _gain(weight, zero_centered)
    rows, cols = x.numel() // max(1, x.shape[-1]), x.shape[-1]
    y, total = torch.empty_like(x), None if residual is None else torch.empty_like(x)
    rstd = torch.empty(rows, dtype=torch.float32)
    _C.rms_norm_forward(
        DTYPES[x.dtype], address(x), address(residual), address(gain), address(y), address(total), address(rstd),
        rows, cols, eps, threads(),
    )  # fmt: skip
    return y, total, rstd


def backward(
    dy: Tensor, dresidual: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor, zero_centered: bool
) -> tuple[Tensor, Tensor]:
    """Backend "cpu" of `rms_norm_bwd`."""
    return _backward(dy, dresidual, x, weight, rstd, zero_centered, None)


def backward_again(
    dy: Tensor, dresidual: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor, zero_centered: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Backend "cpu" of `rms_norm_bwd_again`."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return *_backward(dy, dresidual, x, weight, rstd, zero_centered, y), y


def _backward(
    dy: Tensor,
    dresidual: Tensor | None,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    zero_centered: bool,
    y: Tensor | None,
) -> tuple[Tensor, Tensor]:
    dy, x, gain = dy.contiguous(), x.contiguous(), _gain(weight, zero_centered)
    dresidual = None if dresidual is None else dresidual.contiguous()
    dx, dweight = torch.empty_like(x), torch.empty_like(gain)
    _C.rms_norm_backward(
        DTYPES[x.dtype], address(dy), address(dresidual), address(x), address(gain), address(rstd), address(dx),
        address(dweight), address(y), rstd.numel(), x.shape[-1], threads(),
    )  # fmt: skip
    return dx, dweight.to(weight.dtype)


def _gain(weight: Tensor, zero_centered: bool) -> Tensor:
    gain = float_weights(weight)
    return gain + 1 if zero_centered else gain
