"""Weight gradient of a linear layer on the native library, and on torch's product where that is faster."""

from __future__ import annotations

import torch
from torch import Tensor

from megalite_kernels import _C
from megalite_kernels.native.common import DTYPES, address, threads


def accumulate_(dy: Tensor, x: Tensor, main_grad: Tensor) -> None:
    """Backend "cpu" of `linear_weight_grad_`."""
    if dy.dtype == torch.float32:
        main_grad.addmm_(dy.t(), x)  # in place already, at the rate of torch's forward
        return
    if dy.dtype == torch.bfloat16 and _C.has_matrix_unit():
        main_grad.add_(torch.mm(dy.t(), x))  # AMX has eight times the rate of the instructions that ours uses
        return
    dy, x = (t if t.stride(1) == 1 else t.contiguous() for t in (dy, x))
    _C.linear_weight_grad(
        DTYPES[dy.dtype], address(dy), dy.stride(0), address(x), x.stride(0), address(main_grad), dy.shape[0],
        *main_grad.shape, threads(),
    )  # fmt: skip
