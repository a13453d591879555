"""RMSNorm on the native library."""

from __future__ import annotations

import torch
from torch import Tensor

from megalite_kernels import _C
from megalite_kernels.native.common import DTYPES, address, threads


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
    x, weight = x.contiguous(), weight.contiguous()
    rows, cols = x.numel() // max(1, x.shape[-1]), x.shape[-1]
    y, total = x.new_empty(x.shape), None if residual is None else x.new_empty(x.shape)
    rstd = x.new_empty((rows,), dtype=torch.float32)
    _C.rms_norm_forward(
        DTYPES[x.dtype], address(x), address(residual), _gain(weight, zero_centered), address(y), address(total),
        address(rstd), rows, cols, eps, threads(),
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
    y = x.new_empty(x.shape)
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
    dy, x, weight = dy.contiguous(), x.contiguous(), weight.contiguous()
    dresidual = None if dresidual is None else dresidual.contiguous()
    dx, dweight = x.new_empty(x.shape), weight.new_empty(weight.shape)
    _C.rms_norm_backward(
        DTYPES[x.dtype], address(dy), address(dresidual), address(x), _gain(weight, zero_centered), address(rstd),
        address(dx), address(dweight), address(y), rstd.numel(), x.shape[-1], threads(),
    )  # fmt: skip
    return dx, dweight


def _gain(weight: Tensor, zero_centered: bool) -> tuple[int, int, bool]:
    """`Gain` of csrc/api.h."""
    return DTYPES[weight.dtype], address(weight), zero_centered
