"""The loss head on matrix tiles: logits that are never stored, by csrc/cpu/head.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megalite_kernels import _C
from megalite_kernels.native.common import address, threads
from megalite_kernels.reference import linear_cross_entropy as plan

MOST_FEATURES = 1024
"""Beyond, a block of the weight that stays in the second cache has too few rows: ms of 2048 tokens on 2 threads, beside
those of the chunk plan: 93 and 155 with 512 features and 32,000 classes, 227 and 223 with 1024 (in a fifth of its
memory), 341 and 231 with 2048 and 16,000."""

SQUARE = 32
"""Tokens that are multiplied at once."""


def runs(x: Tensor, valid_rows: int) -> bool:
    """Whether these functions take a head; the others go by the chunk plan of reference/linear_cross_entropy.py.

    Making the logits twice is a third more multiplications, worth it where those are cheap beside storing logits and
    reading them back: with matrix tiles. Elsewhere they take most of the time.
    """
    tiles = _C.isa_name() in ("amx", "amx_emulated") and x.dtype == torch.bfloat16
    return tiles and 0 < x.shape[1] <= MOST_FEATURES and x.shape[0] * valid_rows > 0


def losses(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, valid_rows: int, *options: Any
) -> tuple[Tensor, Tensor, int]:
    """(loss, lse, first token whose target is out of range, or -1), as `losses` of the plan."""
    tensors = _contiguous(x, weight, bias, target)
    loss, lse = (torch.empty(x.shape[0], dtype=torch.float32) for _ in range(2))
    bad = _C.head_forward(_described(*tensors, valid_rows), address(loss), address(lse), options, threads())
    return loss, lse, bad


def stats(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, start: int, valid_rows: int, *options: Any
) -> Tensor:
    """As `shard_stats` of the plan."""
    tensors = _contiguous(x, weight, bias, target)
    out = torch.empty(4, x.shape[0], dtype=torch.float32)
    _C.head_stats(_described(*tensors, valid_rows), start, address(out), options, threads())
    return out


def grads(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    lse: Tensor,
    scale: Tensor,
    start: int,
    valid_rows: int,
    vocabulary: int,
    *options: Any,
    main_grad: Tensor | None = None,
    add: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias) as `shard_grads` of the plan; `main_grad`, if given, is added into or overwritten."""
    tensors = _contiguous(x, weight, bias, target)
    lse, scale = (t.to(torch.float32).contiguous() for t in (lse, scale))
    dweight = main_grad
    if dweight is None or dweight.dtype != torch.float32 or not dweight.is_contiguous():
        dweight = torch.empty(weight.shape, dtype=torch.float32)
    keep = add and dweight is main_grad
    if not keep:
        dweight[valid_rows:] = 0
    dx = torch.empty(x.shape, dtype=x.dtype)
    dbias = torch.zeros(0 if bias is None else weight.shape[0], dtype=torch.float32)
    _C.head_backward(
        _described(*tensors, valid_rows), start, vocabulary, address(lse), address(scale), scale.dim(), address(dx),
        address(dweight), keep, address(None if bias is None else dbias), options, threads(),
    )  # fmt: skip
    if main_grad is not None and dweight is not main_grad:
        main_grad.add_(dweight) if add else main_grad.copy_(dweight)
    return dx, dweight, dbias


def _contiguous(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """What is read, to be held as long as its addresses are in use."""
    return (
        x.contiguous(),
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
        target.contiguous(),
    )


def _described(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, classes: int
) -> tuple[int, ...]:
    """`HeadInputs` of csrc/api.h."""
    tokens, features = x.shape
    addresses = address(x), address(weight), address(bias), address(target)
    return *addresses, tokens, classes, features, chunk_tokens(features)


def chunk_tokens(features: int) -> int:
    """Tokens taken at once: x packed twice, and float sums of dx per thread, are what they need memory for."""
    limits = plan.CPU_LIMITS
    fitting = limits.workspace_bytes // (4 * features * (1 + threads()))
    return max(1, max(limits.least_rows, fitting) // SQUARE) * SQUARE
