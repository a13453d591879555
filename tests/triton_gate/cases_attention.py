"""Causal attention of 16,384 tokens with 2,048 features in 4 times fewer key heads, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megalite_kernels.triton import attention
from tests.triton_gate.gate import Case

BATCH, LENGTH = 4, 4096
OPTIONS = (None, None, None, True, 0, 0, 0, 0.0, 0.125)


def _inputs(dim: int, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.empty(BATCH, LENGTH, 2048 // dim, dim, dtype=torch.bfloat16, device="meta")
    k = torch.empty(BATCH, LENGTH, max(1, 512 // dim), dim, dtype=torch.bfloat16, device="meta")
    return q, k, k


def _forward(dim: int) -> Callable[[], object]:
    return lambda: attention.forward(*_inputs(dim), *OPTIONS)


def _by_heads() -> None:
    """q, k, v as views of [B, N, S, D]: no one array of tokens, so no descriptors."""
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in _inputs(128))
    attention.forward(q, k, v, *OPTIONS)


def _backward(dim: int) -> Callable[[], object]:
    def run() -> None:
        q, k, v = _inputs(dim)
        lse = torch.empty(BATCH, q.shape[2], LENGTH, device="meta")
        attention.backward(q, None, q, k, v, q, lse, *OPTIONS)

    return run


FORWARD = ("attention_forward_kernel", "attention_forward_tma_kernel")
BACKWARD = ("attention_dk_dv_kernel", "attention_dq_kernel")
# Specialised warps take their registers when they start, and so the compiler keeps what it knows of the thread's number
# across the start in local memory: two to four words, read once per loop.
STARTING = {"sm_100": 16}

CASES = [
    Case("attention_fwd 4x4096x32x64 bf16", _forward(64), FORWARD, local_bytes=STARTING),
    Case("attention_fwd 4x4096x16x128 bf16", _forward(128), FORWARD, local_bytes=STARTING),
    Case("attention_fwd 4x4096x8x256 bf16", _forward(256), FORWARD),
    Case("attention_fwd 4x16x4096x128 bf16", _by_heads, FORWARD[:1], ("sm_90", "sm_100")),
    Case("attention_bwd 4x4096x32x64 bf16", _backward(64), BACKWARD),
    Case("attention_bwd 4x4096x16x128 bf16", _backward(128), BACKWARD),
    Case("attention_bwd 4x4096x8x256 bf16", _backward(256), BACKWARD[1:]),
]
