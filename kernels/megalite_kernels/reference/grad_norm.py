"""Global gradient norm in plain torch, with a fixed order of summation, and norms of each."""

from __future__ import annotations

import torch
from torch import Tensor

RUN = 4096
"""Elements whose squares are added in their own type."""
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


def norms(grads: list[Tensor]) -> Tensor:
    """Euclidean norm of each tensor: [n] float32, or float64 for float64."""
    result = torch.promote_types(grads[0].dtype, torch.float32)
    if grads[0].device.type != "cpu":
        return torch.stack(torch._foreach_norm(grads, 2, None if grads[0].dtype == result else result))
    parts = [_norms_of_runs(grad.to(result)) for grad in grads]
    return torch.stack(torch._foreach_norm(parts, 2, torch.float64)).to(result)


def _norms_of_runs(tensor: Tensor) -> Tensor:
    """Numbers with the same norm, few enough to be added one after another.

    On CPUs torch adds the squares of a whole tensor in fp32: at 2^24 elements the norm is off by 7e-4, at 2^26 by
    5e-3. Of runs of 4096 it is right to 3e-9, in the same time.
    """
    if tensor.numel() <= RUN:
        return tensor
    flat = tensor.reshape(-1)
    end = flat.numel() // RUN * RUN
    norms = torch.linalg.vector_norm(flat[:end].view(-1, RUN), dim=1)
    return torch.cat([norms, torch.linalg.vector_norm(flat[end:]).unsqueeze(0)])
