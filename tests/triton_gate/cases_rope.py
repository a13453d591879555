"""Rotary embedding of 8,192 tokens with 32 query heads and 8 key heads of 128, slices of one projection."""

from __future__ import annotations

import torch
from torch import Tensor

from megalite_kernels.triton import rope
from tests.triton_gate.gate import Case


def _heads() -> tuple[Tensor, Tensor]:
    qkv = torch.empty(2, 4096, 48, 128, dtype=torch.bfloat16, device="meta")
    return qkv[:, :, :32], qkv[:, :, 32:40]


def _table(half: int) -> tuple[Tensor, Tensor]:
    table = torch.empty(4096, half, device="meta")
    return table, table


def _norm_backward(half: int) -> None:
    q, k = _heads()
    weight = torch.empty(128, dtype=torch.bfloat16, device="meta")
    rstd = torch.empty(8192 * 32, device="meta")
    dq, dk = torch.empty_like(q).contiguous(), torch.empty_like(k).contiguous()
    rope.norm_backward(dq, dk, q, k, weight, weight, rstd, rstd, *_table(half), False)


def _norm_forward(half: int) -> None:
    weight = torch.empty(128, dtype=torch.bfloat16, device="meta")
    rope.norm_forward(*_heads(), weight, weight, *_table(half), 1e-6, False)


CASES = [
    Case("rope_fwd 8192x32/8x128 bf16", lambda: rope.forward(*_heads(), *_table(64), False, False)),
    Case("rope_fwd interleaved", lambda: rope.forward(*_heads(), *_table(64), True, True)),
    Case("rope_ partial", lambda: rope.forward_(*_heads(), *_table(32), False, False)),
    Case("rope_norm_fwd 8192x32/8x128 bf16", lambda: _norm_forward(64)),
    Case("rope_norm_bwd 8192x32/8x128 bf16", lambda: _norm_backward(64)),
    Case("rope_norm_bwd partial", lambda: _norm_backward(32)),
]
