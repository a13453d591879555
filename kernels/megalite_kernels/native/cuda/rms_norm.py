"""RMSNorm on the CUDA kernels of csrc/cuda/rms_norm.cuh: the raw ops."""

from __future__ import annotations

import torch
from torch import Tensor

from megalite_kernels.native.cuda.kernels.rms_norm import backward_kernels, forward_kernel
from megalite_kernels.native.cuda.rows import ELEMENTS, aligned, backward_blocks, readable, sum_partials
from megalite_kernels.native.cuda.runtime import launch


def forward(x: Tensor, weight: Tensor, eps: float, zero_centered: bool) -> tuple[Tensor, Tensor]:
    """Backend "cuda" of `rms_norm_fwd`."""
    y, _, rstd = _forward(x, None, weight, eps, zero_centered)
    return y, rstd


def residual_forward(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, zero_centered: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Backend "cuda" of `rms_norm_residual_fwd`."""
    y, total, rstd = _forward(x, residual, weight, eps, zero_centered)
    assert total is not None
    return y, total, rstd


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, zero_centered: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    x, residual = x.contiguous(), None if residual is None else residual.contiguous()
    rows, hidden = x.shape[:-1].numel(), x.shape[-1]
    y, total = torch.empty_like(x), None if residual is None else torch.empty_like(x)
    rstd = x.new_empty(rows, dtype=torch.float32)
    if hidden == 0:  # the mean of no numbers
        return y, total, rstd.fill_(torch.nan)
    gain = readable(weight, x)
    assert gain is not None
    wide = aligned(hidden, x, residual, gain, y, total)
    kernel, layout = forward_kernel(ELEMENTS[x.dtype], ELEMENTS[gain.dtype], hidden=hidden, aligned=wide)
    args = (x, residual, gain, y, total, rstd, rows, hidden, float(zero_centered), eps)
    launch(kernel, (-(-rows // layout.groups), 1, 1), args, x.device)
    return y, total, rstd


def backward(
    dy: Tensor, dresidual: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor, zero_centered: bool
) -> tuple[Tensor, Tensor]:
    """Backend "cuda" of `rms_norm_bwd`."""
    dy, x = dy.contiguous(), x.contiguous()
    dresidual = None if dresidual is None else dresidual.contiguous()
    rows, hidden = rstd.numel(), x.shape[-1]
    dx, gain, offset = torch.empty_like(x), readable(weight, x), float(zero_centered)
    assert gain is not None
    if x.numel() == 0:
        return dx, torch.zeros_like(weight)
    wide = aligned(hidden, x, dy, dresidual, gain, dx)
    kernel, layout, means_kernel = backward_kernels(
        ELEMENTS[x.dtype], ELEMENTS[gain.dtype], hidden=hidden, aligned=wide
    )
    means = None
    if means_kernel is not None:
        means = torch.empty_like(rstd)
        launch(means_kernel, (rows, 1, 1), (dy, x, gain, rstd, means, hidden, offset), x.device)
    stripes = -(-hidden // layout.columns)
    blocks = backward_blocks(rows, layout, stripes, x.device)
    partial = rstd.new_empty((1, blocks, hidden))
    args = (dy, dresidual, x, gain, rstd, means, dx, partial, rows, hidden, offset)
    launch(kernel, (blocks, stripes, 1), args, x.device)
    return dx, sum_partials(partial, weight.dtype)[0]
