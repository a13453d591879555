"""Gradient norms on the native library: all tensors in one call."""

from __future__ import annotations

import torch
from torch import Tensor

from megalite_kernels import _C
from megalite_kernels.native.common import DTYPES, address, threads


def norm(grads: list[Tensor]) -> Tensor:
    """Backend "cpu" of `grad_norm`."""
    by_dtype = [[grad for grad in grads if grad.dtype == dtype] for dtype in DTYPES]
    sums = [_sums_of_squares(some).sum() for some in by_dtype if some]
    return torch.stack(sums).sum().sqrt().to(torch.float32)


def norms(grads: list[Tensor]) -> Tensor:
    """Backend "cpu" of `grad_norms`."""
    return _sums_of_squares(grads).sqrt_().to(torch.float32)


def _sums_of_squares(grads: list[Tensor]) -> Tensor:
    """Of each of some tensors of one dtype: float64 [n]."""
    flat = [grad.contiguous() for grad in grads]
    sums = torch.empty(len(flat), dtype=torch.float64)
    addresses, sizes = [address(x) for x in flat], [x.numel() for x in flat]
    _C.sums_of_squares(DTYPES[flat[0].dtype], addresses, sizes, address(sums), threads())
    return sums
