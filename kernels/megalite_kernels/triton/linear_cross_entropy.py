"""The fused output projection and cross-entropy on GPUs.

The products are torch's, with that of the weight's gradient added into fp32 where it lies as in `linear`; the rows are
those of `cross_entropy`, the chunks those of `reference/linear_cross_entropy.py`: large enough that the products stay
at their peak.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megalite_kernels.reference import linear_cross_entropy as plan
from megalite_kernels.triton import cross_entropy as rows
from megalite_kernels.triton.launch import Launch, Table, launch
from megalite_kernels.triton.linear import accumulate_, library_accumulates

COPY = Table("scaled_copy", {"default": Launch({"BLOCK": 4096}, num_warps=8, num_stages=1)})


def losses(*args: Any) -> tuple[Tensor, Tensor]:
    """Backend "triton" of `linear_cross_entropy_fwd`."""
    return plan.losses(*args, row_kernel=rows.forward)


def grads(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Backend "triton" of `linear_cross_entropy_grad`."""
    return plan.grads(*args, row_kernel=rows.grad_, add_product=add_product_)


def grads_(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Backend "triton" of `linear_cross_entropy_grad_`."""
    return plan.grads_into(*args, row_kernel=rows.grad_, add_product=add_product_)


def shard_stats(*args: Any) -> Tensor:
    """Backend "triton" of `linear_cross_entropy_local_fwd`."""
    return plan.shard_stats(*args, row_kernel=rows.stats)


def shard_grads(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Backend "triton" of `linear_cross_entropy_bwd`."""
    return plan.shard_grads(*args, row_kernel=rows.grad, add_product=add_product_)


def shard_grads_(*args: Any) -> tuple[Tensor, Tensor]:
    """Backend "triton" of `linear_cross_entropy_bwd_`."""
    return plan.shard_grads_into(*args, row_kernel=rows.grad, add_product=add_product_)


def add_product_(total: Tensor, dlogits: Tensor, x: Tensor, *, first: bool) -> None:
    """`add_product_` of the chunk plan, with an fp32 result added where it lies."""
    if not first:
        accumulate_(dlogits, x, total)
    elif not library_accumulates(x.device.type, x.dtype):
        accumulate_(dlogits, x, total.zero_())
    elif x.dtype == torch.float32:
        torch.mm(dlogits.t(), x, out=total)
    else:
        torch.mm(dlogits.t(), x, out_dtype=torch.float32, out=total)


@triton.jit
def scaled_copy_kernel(x_ptr, scale_ptr, out_ptr, size, BLOCK: tl.constexpr):
    """Grid [size / BLOCK]; a program owns a block. Reads x once, writes out once, multiplies in fp32."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    scale = tl.load(scale_ptr).to(tl.float32)
    x = tl.load(x_ptr + at, mask=at < size, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, (x * scale).to(out_ptr.dtype.element_ty), mask=at < size)


def scaled_copy(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Backend "triton" of `scaled_copy`."""
    out = x.new_empty(x.shape, dtype=dtype)
    config = COPY.pick()
    grid = (triton.cdiv(x.numel(), config.blocks["BLOCK"]),)
    launch(scaled_copy_kernel, grid, config, x.contiguous(), scale, out, x.numel())
    return out
