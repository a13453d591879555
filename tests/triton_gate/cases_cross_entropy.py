"""The losses at the vocabularies of training: 32,000, GPT-2's 50,257, Llama 3's 128,256, Gemma's 262,144."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megalite_kernels.triton import cross_entropy, linear_cross_entropy
from tests.triton_gate.gate import Case

PLAIN: tuple[Any, ...] = (-100, 0.0, 0.0, 0.0)
EVERYTHING: tuple[Any, ...] = (-100, 0.1, 1e-4, 30.0)


def _rows(classes: int, dtype: torch.dtype, stride: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, targets and something in fp32 for each row."""
    rows = 2048
    logits = torch.empty(rows, stride or classes, dtype=dtype, device="meta")[:, :classes]
    target = torch.empty(rows, dtype=torch.int64, device="meta")
    return logits, target, torch.empty(rows, device="meta")


def _all_of(classes: int, dtype: torch.dtype, options: tuple[Any, ...], stride: int = 0) -> None:
    """Forward, backward, and both in one."""
    logits, target, row = _rows(classes, dtype, stride)
    cross_entropy.forward(logits, target, *options)
    cross_entropy.backward(row, logits, target, row, *options)
    cross_entropy.grad_(logits, target, row[0], *options)


def _shard(classes: int, dtype: torch.dtype, options: tuple[Any, ...]) -> None:
    logits, target, row = _rows(classes, dtype)
    cross_entropy.local(logits, target, classes, classes - 64, *options)
    cross_entropy.local_backward_(logits, target, row, row[0], classes, classes - 64, 8 * classes, *options)


def _scaled_copy() -> None:
    gradient = torch.empty(128256, 4096, device="meta")
    linear_cross_entropy.scaled_copy(gradient, gradient[0, 0], torch.bfloat16)


BF16, FP32 = torch.bfloat16, torch.float32
CASES = [
    Case("cross_entropy 32000 bf16", lambda: _all_of(32000, BF16, PLAIN)),
    Case("cross_entropy 50257 bf16", lambda: _all_of(50257, BF16, PLAIN)),
    Case("cross_entropy 50257 in rows of 50304 bf16", lambda: _all_of(50257, BF16, PLAIN, 50304)),
    Case("cross_entropy 128256 bf16, all options", lambda: _all_of(128256, BF16, EVERYTHING)),
    Case("cross_entropy 262144 fp32, all options", lambda: _all_of(262144, FP32, EVERYTHING)),
    Case("cross_entropy shard 16032 bf16", lambda: _shard(16032, BF16, PLAIN)),
    Case("scaled_copy 128256x4096 bf16", _scaled_copy),
]
