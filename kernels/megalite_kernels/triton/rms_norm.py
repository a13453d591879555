"""RMSNorm forward; one program per row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megalite_kernels.triton.launch import Launch, Table, launch

FORWARD = Table("rms_norm_fwd", {"default": Launch({"BLOCK_H": 1024}, num_warps=4)})


@triton.jit
def forward_kernel(
    x_ptr, weight_ptr, y_ptr, rstd_ptr, hidden,
    EPS: tl.constexpr, ZERO_CENTERED: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Grid [rows]; a program owns a row."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK_H,), tl.float32)
    for start in range(0, hidden, BLOCK_H):
        cols = start + tl.arange(0, BLOCK_H)
        x = tl.load(x_ptr + row * hidden + cols, mask=cols < hidden, other=0.0).to(tl.float32)
        total += x * x
    rstd = tl.rsqrt(tl.sum(total, 0) / hidden + EPS)
    tl.store(rstd_ptr + row, rstd)
    for start in range(0, hidden, BLOCK_H):
        cols = start + tl.arange(0, BLOCK_H)
        x = tl.load(x_ptr + row * hidden + cols, mask=cols < hidden, other=0.0).to(tl.float32)
        gain = tl.load(weight_ptr + cols, mask=cols < hidden, other=0.0).to(tl.float32)
        if ZERO_CENTERED:
            gain += 1.0
        tl.store(y_ptr + row * hidden + cols, x * rstd * gain, mask=cols < hidden)


def forward(x: Tensor, weight: Tensor, eps: float, zero_centered: bool) -> tuple[Tensor, Tensor]:
    """Backend "triton" of `rms_norm_fwd`."""
    hidden = x.shape[-1]
    rows = x.shape[:-1].numel()
    y, rstd = torch.empty_like(x), x.new_empty(rows, dtype=torch.float32)
    launch(
        forward_kernel,
        (rows,),
        FORWARD.pick(),
        x,
        weight,
        y,
        rstd,
        hidden,
        EPS=eps,
        ZERO_CENTERED=zero_centered,
    )
    return y, rstd
