"""The clipping coefficient, without a host synchronisation; the norm is in `megalite.parallel.partial`."""

from __future__ import annotations

import torch
from torch import Tensor


def clip_coefficient(grad_norm: Tensor, max_norm: float) -> Tensor:
    """Factor that brings `grad_norm` to at most `max_norm` (1 where max_norm is 0): fp32 scalar.

    A non-finite norm gives a non-finite or zero factor; such a step is skipped by selection, so the factor
    is never applied.
    """
    if max_norm == 0.0:
        return torch.ones_like(grad_norm)
    return (max_norm / (grad_norm + 1e-6)).clamp(max=1.0)
