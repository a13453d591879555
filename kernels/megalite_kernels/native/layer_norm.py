"""LayerNorm on the native library."""

from __future__ import annotations

import torch
from torch import Tensor

from megalite_kernels import _C
from megalite_kernels.native.common import DTYPES, address, float_weights, threads


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Backend "cpu" of `layer_norm_fwd`."""
    y, _, mean, rstd = _forward(x, None, weight, bias, eps)
    return y, mean, rstd


def residual_forward(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Backend "cpu" of `layer_norm_residual_fwd`."""
    y, total, mean, rstd = _forward(x, residual.contiguous(), weight, bias, eps)
    assert total is not None
    return y, total, mean, rstd


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    x, gain, offset = x.contiguous(), float_weights(weight), None if bias is None else float_weights(bias)
    rows, cols = x.numel() // max(1, x.shape[-1]), x.shape[-1]
    y, total = torch.empty_like(x), None if residual is None else torch.empty_like(x)
    mean, rstd = torch.empty(rows, dtype=torch.float32), torch.empty(rows, dtype=torch.float32)
    _C.layer_norm_forward(
        DTYPES[x.dtype], address(x), address(residual), address(gain), address(offset), address(y), address(total),
        address(mean), address(rstd), rows, cols, eps, threads(),
    )  # fmt: skip
    return y, total, mean, rstd


def backward(
    dy: Tensor, dresidual: Tensor | None, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Backend "cpu" of `layer_norm_bwd`."""
    return _backward(dy, dresidual, x, weight, None, mean, rstd, None)


def backward_again(
    dy: Tensor,
    dresidual: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Backend "cpu" of `layer_norm_bwd_again`."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return *_backward(dy, dresidual, x, weight, bias, mean, rstd, y), y


def _backward(
    dy: Tensor,
    dresidual: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    y: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    dy, x, gain = dy.contiguous(), x.contiguous(), float_weights(weight)
    offset = None if bias is None else float_weights(bias)
    dresidual = None if dresidual is None else dresidual.contiguous()
    dx, dweight, dbias = torch.empty_like(x), torch.empty_like(gain), torch.empty_like(gain)
    _C.layer_norm_backward(
        DTYPES[x.dtype], address(dy), address(dresidual), address(x), address(gain), address(offset), address(mean),
        address(rstd), address(dx), address(dweight), address(dbias), address(y), rstd.numel(), x.shape[-1],
        threads(),
    )  # fmt: skip
    return dx, dweight.to(weight.dtype), dbias.to(weight.dtype)
