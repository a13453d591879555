"""Back-end "apex": the fused norms of NVIDIA apex, where its CUDA extension `fused_layer_norm_cuda` is built.

PyPI's `apex` is an unrelated package and has no such extension. Not run on a GPU here. Its FusedAdam is no back-end
of `adamw_`: it wants gradients in the parameters' dtype, and no clipping or skipping decided on the device.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

MODULE = "fused_layer_norm_cuda"
"""The extension that NVIDIA's apex builds, and nothing else."""

UNUSED_EPS = 1e-5
"""apex's backward reads eps only when it saves memory by keeping the output, which this doesn't do."""


def supports(*args: Any) -> str | None:
    """None if all tensors are of one dtype on a GPU and there is a row, else the reason."""
    tensors = [value for value in args if isinstance(value, Tensor)]
    for tensor in tensors:
        if tensor.device.type != "cuda":
            return f"runs on GPUs, a tensor is on {tensor.device}"
    if tensors[0].dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"takes bfloat16, float16 and float32, not {tensors[0].dtype}"
    return None if tensors[0].numel() else "takes no empty tensors"


def supports_rms(x: Tensor, weight: Tensor, eps: float, zero_centered: bool) -> str | None:
    """For `rms_norm_fwd`."""
    return _plain(x, weight, zero_centered) or supports(x, weight)


def supports_rms_backward(
    dy: Tensor, dresidual: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor, zero_centered: bool
) -> str | None:
    """For `rms_norm_bwd`."""
    if dresidual is not None:
        return "has no fused residual"
    return _plain(x, weight, zero_centered) or supports(x, weight)


def supports_layer(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> str | None:
    """For `layer_norm_fwd`."""
    if bias is None:
        return "needs a bias"
    return _plain(x, weight, False) or supports(x, weight, bias)


def supports_layer_backward(
    dy: Tensor, dresidual: Tensor | None, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> str | None:
    """For `layer_norm_bwd`."""
    if dresidual is not None:
        return "has no fused residual"
    return _plain(x, weight, False) or supports(x, weight)


def _plain(x: Tensor, weight: Tensor, zero_centered: bool) -> str | None:
    if zero_centered:
        return "has no zero-centred weight"
    if weight.dtype != x.dtype:
        return f"takes weights in the dtype of x, {x.dtype}, not {weight.dtype}"
    return None


def rms_forward(x: Tensor, weight: Tensor, eps: float, zero_centered: bool) -> tuple[Tensor, Tensor]:
    """`rms_norm_fwd`."""
    y, rstd = importlib.import_module(MODULE).rms_forward_affine(x, tuple(weight.shape), weight, eps)
    return y, rstd.flatten()


def rms_backward(
    dy: Tensor, dresidual: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor, zero_centered: bool
) -> tuple[Tensor, Tensor]:
    """`rms_norm_bwd`."""
    dx, dweight = importlib.import_module(MODULE).rms_backward_affine(
        dy, rstd, x, tuple(weight.shape), weight, UNUSED_EPS, False
    )
    return dx, dweight


def layer_forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """`layer_norm_fwd`."""
    module = importlib.import_module(MODULE)
    y, mean, rstd = module.forward_affine(x, tuple(weight.shape), weight, bias, eps)
    return y, mean.flatten(), rstd.flatten()


def layer_backward(
    dy: Tensor, dresidual: Tensor | None, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`layer_norm_bwd`; apex reads the bias only when it saves memory, so the weight stands in for it."""
    dx, dweight, dbias = importlib.import_module(MODULE).backward_affine(
        dy, mean, rstd, x, tuple(weight.shape), weight, weight, UNUSED_EPS, False
    )
    return dx, dweight, dbias
