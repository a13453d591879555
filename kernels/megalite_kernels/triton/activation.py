"""Activations on Triton: gelu, relu², and the gated swiglu and geglu. The backwards recompute them from the input."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megalite_kernels.triton.launch import Launch, Table, launch

# One tensor is read: 16 elements a thread are two 16-byte loads of bf16, 64 KB in flight in a full multiprocessor.
PLAIN = Table(
    "activation",
    {
        "default": Launch({"BLOCK": 2048}, num_warps=4),
        "sm_80": Launch({"BLOCK": 2048}, num_warps=4),
        "sm_90": Launch({"BLOCK": 2048}, num_warps=4),
        "sm_100": Launch({"BLOCK": 2048}, num_warps=4),  # 43 KB in flight are needed for 8 TB/s
        "gfx942": Launch({"BLOCK": 4096}, num_warps=4),  # a wave has 64 lanes
    },
)
# Two or three are read: 8 elements a thread give as many bytes, and a block of 1,024 leaves few lanes idle at the end
# of a row (11,008 features: 2 %).
GATED = Table(
    "glu",
    {
        "default": Launch({"BLOCK": 1024}, num_warps=4),
        "sm_80": Launch({"BLOCK": 1024}, num_warps=4),
        "sm_90": Launch({"BLOCK": 1024}, num_warps=4),
        "sm_100": Launch({"BLOCK": 1024}, num_warps=4),
        "gfx942": Launch({"BLOCK": 2048}, num_warps=4),  # a wave has 64 lanes
    },
)


@triton.jit
def value_and_slope(x, KIND: tl.constexpr):
    """(f(x), f'(x)) in fp32; what a caller does not use is not computed.

    gelu_tanh is x * sigmoid(2u), as (1 + tanh(u)) / 2 = sigmoid(2u); the sigmoid is taken from exp(-|2u|) <= 1, which
    neither overflows nor cancels.
    """
    if KIND == "relu2":
        positive = tl.where(x <= 0.0, 0.0, x)  # a NaN stays one
        value = positive * positive
        slope = 2.0 * positive
    elif KIND == "gelu":
        share = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        value = x * share
        slope = share + x * (0.3989422804014327 * tl.exp(-0.5 * x * x))
    else:
        inner, inner_slope = x, 1.0
        if KIND == "gelu_tanh":
            inner = 1.5957691216057308 * (x + 0.044715 * x * x * x)  # 2 sqrt(2 / pi)
            inner_slope = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        small = tl.exp(-tl.abs(inner))
        fraction = 1.0 / (1.0 + small)
        share = tl.where(inner < 0.0, small * fraction, fraction)
        value = x * share
        bend = x * inner_slope * (small * fraction * fraction)
        slope = share + tl.where(small == 0.0, 0.0, bend)  # inner_slope may be infinite there
    return value, slope


@triton.jit
def forward_kernel(x_ptr, y_ptr, size, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """Grid [cdiv(size, BLOCK)]; a program owns BLOCK elements. 2e bytes per element: x read, y written. fp32."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    mask = lane < size - start
    x = tl.load(x_ptr + start + lane, mask=mask, other=0.0).to(tl.float32)
    value, _ = value_and_slope(x, KIND)
    tl.store(y_ptr + start + lane, value, mask=mask)


@triton.jit
def backward_kernel(dy_ptr, x_ptr, dx_ptr, size, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """Grid [cdiv(size, BLOCK)]; a program owns BLOCK elements. 3e bytes per element: dy, x read, dx written. fp32."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    mask = lane < size - start
    x = tl.load(x_ptr + start + lane, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + start + lane, mask=mask, other=0.0).to(tl.float32)
    _, slope = value_and_slope(x, KIND)
    tl.store(dx_ptr + start + lane, dy * slope, mask=mask)


@triton.jit
def gated_tile(
    rows, FEATURES: tl.constexpr, STRIDE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr
):
    """A program's place: (first element of its rows in y, in gate, offsets in y, in gate, mask), with
    FEATURES elements from row to row of y and STRIDE of gate and up."""
    across = tl.cdiv(FEATURES, BLOCK_F)
    first = (tl.program_id(0) // across).to(tl.int64) * BLOCK_T
    row = tl.arange(0, BLOCK_T)[:, None]
    col = (tl.program_id(0) % across) * BLOCK_F + tl.arange(0, BLOCK_F)[None, :]
    mask = (row < rows - first) & (col < FEATURES)
    return first * FEATURES, first * STRIDE, row * FEATURES + col, row * STRIDE + col, mask


@triton.jit
def gated_forward_kernel(
    gate_ptr, up_ptr, y_ptr, rows, FEATURES: tl.constexpr, STRIDE: tl.constexpr, UP: tl.constexpr,
    KIND: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Grid [cdiv(FEATURES, BLOCK_F) * cdiv(rows, BLOCK_T)]; a program owns a tile of y.

    3e bytes per element of y: gate and up (UP elements behind up_ptr) read, y written. fp32.
    """
    y_base, base, y_offsets, offsets, mask = gated_tile(rows, FEATURES, STRIDE, BLOCK_T, BLOCK_F)
    gate = tl.load(gate_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + (base + UP) + offsets, mask=mask, other=0.0).to(tl.float32)
    value, _ = value_and_slope(gate, KIND)
    tl.store(y_ptr + y_base + y_offsets, value * up, mask=mask)


@triton.jit
def gated_backward_kernel(
    dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, rows, FEATURES: tl.constexpr, STRIDE: tl.constexpr,
    UP: tl.constexpr, KIND: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Grid as `gated_forward_kernel`; a program owns a tile of dgate and of dup.

    5e bytes per element of dy: dy, gate, up read, dgate, dup written. fp32.
    """
    y_base, base, y_offsets, offsets, mask = gated_tile(rows, FEATURES, STRIDE, BLOCK_T, BLOCK_F)
    gate = tl.load(gate_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + (base + UP) + offsets, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + y_base + y_offsets, mask=mask, other=0.0).to(tl.float32)
    value, slope = value_and_slope(gate, KIND)
    tl.store(dgate_ptr + base + offsets, dy * up * slope, mask=mask)
    tl.store(dup_ptr + (base + UP) + offsets, dy * value, mask=mask)


def forward(x: Tensor, kind: str) -> Tensor:
    """Backend "triton" of `activation_fwd`."""
    x = x.contiguous()
    y, config = torch.empty_like(x), PLAIN.pick()
    launch(
        forward_kernel, (triton.cdiv(x.numel(), config.blocks["BLOCK"]),), config, x, y, x.numel(), KIND=kind
    )
    return y


def backward(dy: Tensor, x: Tensor, kind: str) -> Tensor:
    """Backend "triton" of `activation_bwd`."""
    dy, x = dy.contiguous(), x.contiguous()
    dx, config = torch.empty_like(x), PLAIN.pick()
    grid = (triton.cdiv(x.numel(), config.blocks["BLOCK"]),)
    launch(backward_kernel, grid, config, dy, x, dx, x.numel(), KIND=kind)
    return dx


def packed_forward(packed: Tensor, kind: str) -> Tensor:
    """Backend "triton" of `glu_fwd`."""
    packed = packed.contiguous()
    y = packed.new_empty((*packed.shape[:-1], packed.shape[-1] // 2))
    _launch_gated(gated_forward_kernel, [packed, packed, y], like=y, packed=True, kind=kind)
    return y


def packed_backward(dy: Tensor, packed: Tensor, kind: str) -> Tensor:
    """Backend "triton" of `glu_bwd`."""
    dy, packed = dy.contiguous(), packed.contiguous()
    grad = torch.empty_like(packed)
    tensors = [dy, packed, packed, grad, grad]
    _launch_gated(gated_backward_kernel, tensors, like=dy, packed=True, kind=kind)
    return grad


def gated_forward(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """Backend "triton" of `glu_pair_fwd`."""
    gate, up = gate.contiguous(), up.contiguous()
    y = torch.empty_like(gate)
    _launch_gated(gated_forward_kernel, [gate, up, y], like=y, packed=False, kind=kind)
    return y


def gated_backward(dy: Tensor, gate: Tensor, up: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Backend "triton" of `glu_pair_bwd`."""
    dy, gate, up = dy.contiguous(), gate.contiguous(), up.contiguous()
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    _launch_gated(gated_backward_kernel, [dy, gate, up, dgate, dup], like=dy, packed=False, kind=kind)
    return dgate, dup


def gated_sizes(features: int, table: Launch) -> Launch:
    """Rows and columns of a program's tile: a part of a row, or several short ones."""
    block_f = min(table.blocks["BLOCK"], triton.next_power_of_2(features))
    blocks = {"BLOCK_T": table.blocks["BLOCK"] // block_f, "BLOCK_F": block_f}
    return Launch(blocks, table.num_warps, table.num_stages)


def _launch_gated(
    kernel: triton.JITFunction, tensors: list[Tensor], *, like: Tensor, packed: bool, kind: str
) -> None:
    """`like` has y's shape; packed: gate and up are one tensor, its rows twice as long."""
    if like.numel() == 0:
        return
    rows, features = like.shape[:-1].numel(), like.shape[-1]
    config = gated_sizes(features, GATED.pick())
    programs = triton.cdiv(features, config.blocks["BLOCK_F"]) * triton.cdiv(rows, config.blocks["BLOCK_T"])
    launch(
        kernel,
        (programs,),
        config,
        *tensors,
        rows,
        FEATURES=features,
        STRIDE=2 * features if packed else features,
        UP=features if packed else 0,
        KIND=kind,
    )
