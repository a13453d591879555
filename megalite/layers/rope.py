"""Rotary positions: the angle tables. The rotation itself is `megalite_kernels.rope`.

Source: Su et al., arXiv 2104.09864; "llama3" stretching as published with Llama 3.1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megalite.config import RopeScaling


def rope_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None, device: torch.device | None = None
) -> Tensor:
    """Angle per position of each rotated pair: theta ** (-2i / D), stretched by `scaling`.

    Computed in float32 even where the model is wider, because published models were trained with the
    float32 values.

    Returns:
        [D/2] float32.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    frequencies = 1.0 / theta**exponents
    if scaling is None:
        return frequencies
    stretched = frequencies / scaling.factor
    if scaling.kind == "linear":
        return stretched
    # Wavelengths that fit many times into the original length are kept, those that don't fit are
    # stretched, and the ones between go smoothly from one to the other.
    turns = scaling.original_max_position_embeddings / (2 * math.pi / frequencies)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = (turns - low) / (high - low)
    blended = (1 - kept) * frequencies / scaling.factor + kept * frequencies
    return torch.where(turns < low, stretched, torch.where(turns > high, frequencies, blended))


def rope_tables(positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position: two [..., D/2], float32 or, for a float64 model, float64."""
    wide = torch.promote_types(dtype, torch.float32)
    angles = positions.to(wide)[..., None] * frequencies.to(wide)
    return angles.cos(), angles.sin()
