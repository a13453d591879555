"""Rotary positions: frequencies and angle tables. The rotation itself is `megalite_kernels.rope`.

Frequencies are computed in float32 even where the model is wider, because that is what published models
were trained with.

Source: Su et al., arXiv 2104.09864; the stretched forms: Chen et al., arXiv 2306.15595, and Llama 3.1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rope_frequencies(head_dim: int, theta: float, device: torch.device | None = None) -> Tensor:
    """Angle per position of each rotated pair, theta ** (-2i / D): [D/2] float32."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    return 1.0 / theta**exponents


def stretch_linear(frequencies: Tensor, factor: float) -> Tensor:
    """Frequencies of a model whose positions are squeezed by `factor`."""
    return frequencies / factor


def stretch_llama3(
    frequencies: Tensor,
    factor: float,
    *,
    low_freq_factor: float,
    high_freq_factor: float,
    original_length: int,
) -> Tensor:
    """Stretch the long wavelengths only.

    A pair that turns more than `high_freq_factor` times within `original_length` keeps its frequency, one
    that turns less than `low_freq_factor` times is stretched by `factor`, and those between go smoothly from
    one to the other.
    """
    turns = original_length / (2 * math.pi / frequencies)
    kept = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor)
    blended = (1 - kept) * frequencies / factor + kept * frequencies
    stretched = torch.where(turns < low_freq_factor, frequencies / factor, blended)
    return torch.where(turns > high_freq_factor, frequencies, stretched)


def rope_tables(positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position: two [..., D/2], float32 or, for a float64 model, float64."""
    wide = torch.promote_types(dtype, torch.float32)
    angles = positions.to(wide)[..., None] * frequencies.to(wide)
    return angles.cos(), angles.sin()
