"""Global gradient norm in plain torch, with a fixed order of summation."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 1 << 16  # elements summed together; fixed, so that the order never depends on the number of threads


def sum_of_squares(grads: Tensor) -> Tensor:
    """Sum of squares of a flat tensor, float64 scalar (float32 would overflow from 1.8e19 on)."""
    flat = grads.reshape(-1)
    blocks, tail = flat.split([flat.numel() // BLOCK * BLOCK, flat.numel() % BLOCK])
    partial = [b.to(torch.float64).square().sum() for b in blocks.split(BLOCK)] if blocks.numel() else []
    if tail.numel():
        partial.append(tail.to(torch.float64).square().sum())
    return torch.stack(partial).sum() if partial else grads.new_zeros((), dtype=torch.float64)


def norm(grads: list[Tensor]) -> Tensor:
    """Euclidean norm over every element of every tensor, float32 scalar."""
    return torch.stack([sum_of_squares(g) for g in grads]).sum().sqrt().to(torch.float32)
