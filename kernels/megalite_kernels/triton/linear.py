"""Weight gradient of a linear layer added straight into an fp32 buffer: `main_grad += dy.T @ x` without a temporary.

On NVIDIA GPUs torch's own product does it: `addmm` with `out_dtype` (torch >= 2.8) multiplies 16-bit operands,
accumulates in fp32 and adds to an fp32 `out` that is its own input: cuBLAS gets beta = 1, no copy is made, and its
kernels are chosen for each architecture and shape. Torch has no such product on ROCm, and refuses one while it tunes
GEMMs: there, and in the interpreter, the kernel below is used.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megalite_kernels.triton.launch import Launch, Table, launch

_TILE = {"BLOCK_O": 128, "BLOCK_I": 128, "BLOCK_T": 64, "GROUP": 8}
# 128 x 128 fp32 sums are 64 registers of each of 256 threads (128 x 256 spilled 200 bytes on sm_90, 472 on sm_100).
# Stages of 32 KiB: 3 of them take 64 of the 99 KiB of sm_86 and sm_120, 4 take 128 of the 227 of sm_90 and sm_100; the
# default's 16 KiB fit the 64 of gfx942.
SIXTEEN_BITS = Table(
    "linear_weight_grad_",
    {
        "default": Launch({**_TILE, "BLOCK_T": 32}, num_warps=8, num_stages=2),
        "sm_80": Launch(_TILE, num_warps=8, num_stages=3),
        "sm_90": Launch(_TILE, num_warps=8, num_stages=4),
        "sm_120": Launch(_TILE, num_warps=8, num_stages=3),
    },
)
# Products of fp32 are made without tensor cores, so as not to round the operands to TF32.
FULL = Table(
    "linear_weight_grad_fp32",
    {"default": Launch({"BLOCK_O": 64, "BLOCK_I": 64, "BLOCK_T": 16, "GROUP": 8}, num_warps=8, num_stages=2)},
)


@triton.jit
def weight_grad_kernel(
    dy_ptr, x_ptr, main_grad_ptr, tokens, outputs, inputs, dy_stride_t, x_stride_t, stride_o, stride_i,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_T: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Grid [outputs / BLOCK_O * inputs / BLOCK_I]; a program owns a tile of main_grad, over all tokens.

    Reads and writes 4 bytes of main_grad an element; reads dy inputs / BLOCK_I times and x outputs / BLOCK_O times,
    out of the L2 cache for programs of a group (GROUP tiles of outputs run with the same inputs). Accumulates in fp32,
    tokens in order: no part of a sum is left to another program.
    """
    program = tl.program_id(0)
    tiles_o, tiles_i = tl.cdiv(outputs, BLOCK_O), tl.cdiv(inputs, BLOCK_I)
    group = program // (GROUP * tiles_i)
    height = tl.minimum(tiles_o - group * GROUP, GROUP)
    inside = program % (GROUP * tiles_i)
    o = (group * GROUP + inside % height) * BLOCK_O + tl.arange(0, BLOCK_O)
    i = (inside // height) * BLOCK_I + tl.arange(0, BLOCK_I)
    t = tl.arange(0, BLOCK_T)
    dy_at = dy_ptr + o[:, None] + t[None, :] * dy_stride_t
    x_at = x_ptr + t[:, None] * x_stride_t + i[None, :]
    total = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    for start in range(0, tokens, BLOCK_T):
        within = start + t < tokens
        dy = tl.load(dy_at, mask=(o < outputs)[:, None] & within[None, :], other=0.0)
        x = tl.load(x_at, mask=within[:, None] & (i < inputs)[None, :], other=0.0)
        total = tl.dot(dy, x, total, input_precision="ieee")
        dy_at += BLOCK_T * dy_stride_t
        x_at += BLOCK_T * x_stride_t
    at = main_grad_ptr + o[:, None].to(tl.int64) * stride_o + i[None, :].to(tl.int64) * stride_i
    mask = (o < outputs)[:, None] & (i < inputs)[None, :]
    tl.store(at, tl.load(at, mask=mask, other=0.0) + total, mask=mask)


def library_accumulates(device_type: str, dtype: torch.dtype) -> bool:
    """Whether torch adds a product of this dtype to an fp32 buffer on this kind of device."""
    if device_type != "cuda" or torch.version.hip is not None:
        return False
    return dtype == torch.float32 or not torch.cuda.tunable.is_enabled()


def accumulate_(dy: Tensor, x: Tensor, main_grad: Tensor, add: bool = True) -> None:
    """Backend "triton" of `linear_weight_grad_`: torch's product where it can accumulate, else the kernel."""
    if not library_accumulates(dy.device.type, dy.dtype):
        accumulate_by_kernel_(dy, x, main_grad if add else main_grad.zero_())
    elif dy.dtype == torch.float32:
        main_grad.addmm_(dy.t(), x, beta=float(add))  # 0 * NaN is 0 there
    elif add:
        torch.addmm(main_grad, dy.t(), x, out_dtype=torch.float32, out=main_grad)
    else:
        torch.mm(dy.t(), x, out_dtype=torch.float32, out=main_grad)


def accumulate_by_kernel_(dy: Tensor, x: Tensor, main_grad: Tensor) -> None:
    """`main_grad += dy.T @ x` in one launch."""
    dy, x = (a if a.stride(1) == 1 or a.shape[1] == 1 else a.contiguous() for a in (dy, x))
    outputs, inputs = main_grad.shape
    config = (FULL if dy.dtype == torch.float32 else SIXTEEN_BITS).pick()
    tiles = triton.cdiv(outputs, config.blocks["BLOCK_O"]) * triton.cdiv(inputs, config.blocks["BLOCK_I"])
    launch(
        weight_grad_kernel,
        (tiles,),
        config,
        dy, x, main_grad, dy.shape[0], outputs, inputs, dy.stride(0), x.stride(0), *main_grad.stride(),
    )  # fmt: skip
