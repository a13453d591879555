"""What the references share."""

from __future__ import annotations

import torch
from torch import Tensor


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype a reference computes in: float32, or `x`'s own if that is wider (float64 stays float64)."""
    return torch.promote_types(x.dtype, torch.float32)


def widen(x: Tensor) -> Tensor:
    """`x` in the dtype references compute in."""
    return x.to(wide_dtype(x))
