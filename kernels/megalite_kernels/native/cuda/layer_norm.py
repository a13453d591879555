"""LayerNorm on the CUDA kernels of csrc/cuda/layer_norm.cuh: the raw ops."""

from __future__ import annotations

import torch
from torch import Tensor

from megalite_kernels.native.cuda.kernels.layer_norm import backward_kernels, forward_kernel
from megalite_kernels.native.cuda.rows import ELEMENTS, aligned, backward_blocks, readable, sum_partials
from megalite_kernels.native.cuda.runtime import launch


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Backend "cuda" of `layer_norm_fwd`."""
    y, _, mean, rstd = _forward(x, None, weight, bias, eps)
    return y, mean, rstd


def residual_forward(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Backend "cuda" of `layer_norm_residual_fwd`."""
    y, total, mean, rstd = _forward(x, residual, weight, bias, eps)
    assert total is not None
    return y, total, mean, rstd


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    x, residual = x.contiguous(), None if residual is None else residual.contiguous()
    rows, hidden = x.shape[:-1].numel(), x.shape[-1]
    y, total = torch.empty_like(x), None if residual is None else torch.empty_like(x)
    mean, rstd = (x.new_empty(rows, dtype=torch.float32) for _ in range(2))
    if hidden == 0:  # the mean of no numbers
        return y, total, mean.fill_(torch.nan), rstd.fill_(torch.nan)
    gain, shift = readable(weight, x), readable(bias, x)
    assert gain is not None
    wide = aligned(hidden, x, residual, gain, shift, y, total)
    kernel, layout = forward_kernel(ELEMENTS[x.dtype], ELEMENTS[gain.dtype], hidden=hidden, aligned=wide)
    args = (x, residual, gain, shift, y, total, mean, rstd, rows, hidden, eps)
    launch(kernel, (-(-rows // layout.groups), 1, 1), args, x.device)
    return y, total, mean, rstd


def backward(
    dy: Tensor, dresidual: Tensor | None, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Backend "cuda" of `layer_norm_bwd`."""
    dy, x = dy.contiguous(), x.contiguous()
    dresidual = None if dresidual is None else dresidual.contiguous()
    rows, hidden = rstd.numel(), x.shape[-1]
    dx, gain = torch.empty_like(x), readable(weight, x)
    assert gain is not None
    if x.numel() == 0:
        return dx, torch.zeros_like(weight), torch.zeros_like(weight)
    wide = aligned(hidden, x, dy, dresidual, gain, dx)
    kernel, layout, means_kernel = backward_kernels(
        ELEMENTS[x.dtype], ELEMENTS[gain.dtype], hidden=hidden, aligned=wide
    )
    means = None
    if means_kernel is not None:
        means = rstd.new_empty((2, rows))
        launch(means_kernel, (rows, 1, 1), (dy, x, gain, mean, rstd, means, rows, hidden), x.device)
    stripes = -(-hidden // layout.columns)
    blocks = backward_blocks(rows, layout, stripes, x.device)
    partial = rstd.new_empty((2, blocks, hidden))
    args = (dy, dresidual, x, gain, mean, rstd, means, dx, partial, rows, hidden)
    launch(kernel, (blocks, stripes, 1), args, x.device)
    dweight, dbias = sum_partials(partial, weight.dtype)
    return dx, dweight, dbias
