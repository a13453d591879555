"""Activations on the native library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megalite_kernels import _C
from megalite_kernels.native.common import ACTIVATIONS, DTYPES, address, threads


def forward(x: Tensor, kind: str) -> Tensor:
    """Backend "cpu" of `activation_fwd`."""
    x = x.contiguous()
    y = torch.empty_like(x)
    _C.activation_forward(DTYPES[x.dtype], ACTIVATIONS[kind], address(x), address(y), x.numel(), threads())
    return y


def backward(dy: Tensor, x: Tensor, kind: str) -> Tensor:
    """Backend "cpu" of `activation_bwd`."""
    return _apart(_backward, dy, x, kind)


def backward_again_(dy: Tensor, x: Tensor, kind: str) -> None:
    """Backend "cpu" of `activation_bwd_again_`."""
    _in_place(_backward, dy, x, kind)


def _backward(dy: Tensor, x: Tensor, dx: Tensor, y: Tensor | None, kind: str) -> None:
    codes = (DTYPES[x.dtype], ACTIVATIONS[kind])
    _C.activation_backward(*codes, address(dy), address(x), address(dx), address(y), x.numel(), threads())


def gated_forward(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """Backend "cpu" of `glu_pair_fwd`."""
    gate, up = gate.contiguous(), up.contiguous()
    y = torch.empty_like(gate)
    cols = gate.shape[-1]
    _gated_forward(gate, address(gate), address(up), y, kind, cols, cols)
    return y


def gated_backward(dy: Tensor, gate: Tensor, up: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Backend "cpu" of `glu_pair_bwd`."""
    dy, gate, up = dy.contiguous(), gate.contiguous(), up.contiguous()
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    cols = gate.shape[-1]
    pointers = (address(gate), address(up), address(dgate), address(dup))
    _gated_backward(dy, *pointers, None, kind, cols, cols)
    return dgate, dup


def packed_forward(packed: Tensor, kind: str) -> Tensor:
    """Backend "cpu" of `glu_fwd`."""
    packed = packed.contiguous()
    cols = packed.shape[-1] // 2
    y = packed.new_empty((*packed.shape[:-1], cols))
    start = address(packed)
    _gated_forward(packed, start, start + cols * packed.element_size(), y, kind, cols, 2 * cols)
    return y


def packed_backward(dy: Tensor, packed: Tensor, kind: str) -> Tensor:
    """Backend "cpu" of `glu_bwd`."""
    return _apart(_packed_backward, dy, packed, kind)


def packed_backward_again_(dy: Tensor, packed: Tensor, kind: str) -> None:
    """Backend "cpu" of `glu_bwd_again_`."""
    _in_place(_packed_backward, dy, packed, kind)


def _apart(backward: Callable[..., None], dy: Tensor, x: Tensor, kind: str) -> Tensor:
    """The gradient of x in a tensor of its own, and nothing else."""
    dy, x = dy.contiguous(), x.contiguous()
    dx = torch.empty_like(x)
    backward(dy, x, dx, None, kind)
    return dx


def _in_place(backward: Callable[..., None], dy: Tensor, x: Tensor, kind: str) -> None:
    """The output made again in dy, and the gradient of x in x: each kernel reads a place before it writes there."""
    y, dx = dy.contiguous(), x.contiguous()
    backward(y, dx, dx, y, kind)
    for given, made in ((dy, y), (x, dx)):
        if made is not given:
            given.copy_(made)


def _packed_backward(dy: Tensor, packed: Tensor, dpacked: Tensor, y: Tensor | None, kind: str) -> None:
    cols = dy.shape[-1]
    offset = cols * packed.element_size()
    start, grad_start = address(packed), address(dpacked)
    _gated_backward(dy, start, start + offset, grad_start, grad_start + offset, y, kind, cols, 2 * cols)


def _gated_forward(like: Tensor, gate: int, up: int, y: Tensor, kind: str, cols: int, stride: int) -> None:
    rows = y.numel() // max(1, cols)
    codes = (DTYPES[like.dtype], ACTIVATIONS[kind])
    _C.gated_forward(*codes, gate, up, address(y), rows, cols, stride, threads())


def _gated_backward(
    dy: Tensor, gate: int, up: int, dgate: int, dup: int, y: Tensor | None, kind: str, cols: int, stride: int
) -> None:
    rows = dy.numel() // max(1, cols)
    codes: tuple[Any, ...] = (DTYPES[dy.dtype], ACTIVATIONS[kind])
    _C.gated_backward(*codes, address(dy), gate, up, dgate, dup, address(y), rows, cols, stride, threads())
