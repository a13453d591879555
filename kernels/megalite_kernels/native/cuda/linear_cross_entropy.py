"""The fused output projection and cross-entropy: torch's products, and the rows of cross_entropy.cuh.

The chunks are those of `reference/linear_cross_entropy.py`. The product of the weight's gradient is added into fp32
where it lies, which torch does on NVIDIA GPUs unless it tunes its products.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megalite_kernels.native.cuda import cross_entropy as rows
from megalite_kernels.native.cuda import runtime
from megalite_kernels.native.cuda.kernels import scaled_copy as kernels
from megalite_kernels.reference import linear_cross_entropy as plan


def losses(*args: Any) -> tuple[Tensor, Tensor]:
    """Backend "cuda" of `linear_cross_entropy_fwd`."""
    return plan.losses(*args, row_kernel=rows.forward)


def grads(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Backend "cuda" of `linear_cross_entropy_grad`."""
    return plan.grads(*args, row_kernel=rows.grad_, add_product=add_product_)


def grads_(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Backend "cuda" of `linear_cross_entropy_grad_`."""
    return plan.grads_into(*args, row_kernel=rows.grad_, add_product=add_product_)


def shard_stats(*args: Any) -> Tensor:
    """Backend "cuda" of `linear_cross_entropy_local_fwd`."""
    return plan.shard_stats(*args, row_kernel=rows.stats)


def shard_grads(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Backend "cuda" of `linear_cross_entropy_bwd`."""
    return plan.shard_grads(*args, row_kernel=rows.grad, add_product=add_product_)


def shard_grads_(*args: Any) -> tuple[Tensor, Tensor]:
    """Backend "cuda" of `linear_cross_entropy_bwd_`."""
    return plan.shard_grads_into(*args, row_kernel=rows.grad, add_product=add_product_)


def add_product_(total: Tensor, dlogits: Tensor, x: Tensor, *, first: bool) -> None:
    """`add_product_` of the chunk plan, with 16-bit operands and an fp32 result in one product where torch can."""
    accumulates = x.device.type == "cuda" and total.dtype == torch.float32 and x.dtype != torch.float32
    if not accumulates or torch.cuda.tunable.is_enabled():
        plan.add_product_(total, dlogits, x, first=first)
    elif first:
        torch.mm(dlogits.t(), x, out_dtype=torch.float32, out=total)
    else:
        torch.addmm(total, dlogits.t(), x, out_dtype=torch.float32, out=total)


def scaled_copy(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Backend "cuda" of `scaled_copy`."""
    out = x.new_empty(x.shape, dtype=dtype)
    types = rows.ELEMENTS[x.dtype], rows.ELEMENTS[dtype]
    arguments = (x.contiguous(), scale.float(), out, x.numel())
    runtime.launch(kernels.copy(*types), (kernels.blocks(x.numel(), *types), 1, 1), arguments, x.device)
    return out
