"""What `torch.autocast` does to the factors of a product, for products that torch does not see."""

from __future__ import annotations

import torch
from torch import Tensor

CAST = (torch.bfloat16, torch.float16, torch.float32)
"""Dtypes that it changes; float64 stays."""


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype where autocast is on, as torch does for its own products."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t.dtype in CAST else t for t in tensors)
