"""Cross-entropy on the native library, alone and behind the output projection."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megalite_kernels import _C
from megalite_kernels.native.common import DTYPES, address, threads
from megalite_kernels.reference import linear_cross_entropy as plan


def forward(logits: Tensor, target: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """Backend "cpu" of `cross_entropy_fwd`."""
    logits, target = logits.contiguous(), target.contiguous()
    rows, cols = logits.shape
    loss, lse = torch.empty(rows, dtype=torch.float32), torch.empty(rows, dtype=torch.float32)
    pointers = (address(logits), address(target), address(loss), address(lse))
    bad = _C.cross_entropy_forward(DTYPES[logits.dtype], *pointers, rows, cols, *options, threads())
    _refuse(bad, target, cols)
    return loss, lse


def backward(dloss: Tensor, logits: Tensor, target: Tensor, lse: Tensor, *options: Any) -> Tensor:
    """Backend "cpu" of `cross_entropy_bwd`; the targets are those that the forward has checked."""
    dloss, logits, target = dloss.to(torch.float32).contiguous(), logits.contiguous(), target.contiguous()
    dlogits = torch.empty_like(logits)
    pointers = (address(logits), address(target), address(lse), address(dlogits))
    codes = (DTYPES[logits.dtype], address(dloss), 1 if dloss.dim() else 0)
    _C.cross_entropy_backward(*codes, *pointers, *logits.shape, *options, threads())
    return dlogits


def grad_(logits: Tensor, target: Tensor, scale: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """Backend "cpu" of `cross_entropy_grad_`; logits must be contiguous, they are written."""
    if not logits.is_contiguous():
        raise ValueError(f"logits have stride {logits.stride()}: pass contiguous rows, they are overwritten")
    target, scale = target.contiguous(), scale.to(torch.float32).contiguous()
    rows, cols = logits.shape
    loss, lse = torch.empty(rows, dtype=torch.float32), torch.empty(rows, dtype=torch.float32)
    pointers = (
        address(logits),
        address(target),
        address(scale),
        1 if scale.dim() else 0,
        address(loss),
        address(lse),
    )
    bad = _C.cross_entropy_grad(DTYPES[logits.dtype], *pointers, rows, cols, *options, threads())
    _refuse(bad, target, cols)
    return loss, lse


def linear_losses(x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *options: Any) -> Tensor:
    """Backend "cpu" of `linear_cross_entropy_fwd`."""
    return plan.losses(x, weight, bias, target, *options, row_kernel=forward)


def linear_grads(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, scale: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Backend "cpu" of `linear_cross_entropy_grad`."""
    return plan.grads(x, weight, bias, target, scale, *options, row_kernel=grad_)


def _refuse(bad: int, target: Tensor, cols: int) -> None:
    if bad >= 0:
        raise ValueError(
            f"target[{bad}]={int(target[bad])} must be at least 0 and less than the {cols} classes"
        )
