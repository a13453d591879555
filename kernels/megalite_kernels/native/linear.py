"""Products of a linear layer on the native library, and on torch where that is faster."""

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
    multiply_(main_grad, dy.t(), x, add=True)


def multiply_(
    out: Tensor, left: Tensor, right: Tensor, *, bias: Tensor | None = None, add: bool = False
) -> None:
    """out = left @ right + bias, or with `add` out += left @ right, by the native library.

    Args:
        out: [M, N] with rows side by side: float32, or like the factors if it is not added to.
        left: [M, K], right: [K, N], any strides: what has neither dim side by side is copied.
        bias: [N] like out, or None.
    """
    (rows, inner), cols = left.shape, right.shape[1]
    if inner == 0:  # an empty sum
        if not add:
            out.copy_(out.new_zeros(()) if bias is None else bias)
        return
    left, right = (t if 1 in t.stride() else t.contiguous() for t in (left, right))
    _C.gemm(
        DTYPES[left.dtype], _factor(left), _factor(right.t()), address(bias), DTYPES[out.dtype], address(out),
        out.stride(0), add, rows, cols, inner, threads(),
    )  # fmt: skip


def _factor(t: Tensor) -> tuple[int, int, bool]:
    """`Factor` of csrc/api.h for t [rows, inner]."""
    inner_last = t.stride(1) == 1
    return address(t), t.stride(0 if inner_last else 1), inner_last
