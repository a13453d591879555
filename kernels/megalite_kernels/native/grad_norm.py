"""Gradient norm on the native library."""

from __future__ import annotations

import torch
from torch import Tensor

from megalite_kernels import _C
from megalite_kernels.native.common import DTYPES, address, threads


def norm(grads: list[Tensor]) -> Tensor:
    """Backend "cpu" of `grad_norm`."""
    total = 0.0
    for grad in grads:
        flat = grad.contiguous()
        total += _C.sum_of_squares(DTYPES[flat.dtype], address(flat), flat.numel(), threads())
    return torch.tensor(total, dtype=torch.float64).sqrt().to(torch.float32)
