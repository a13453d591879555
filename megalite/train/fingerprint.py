"""A checksum of live tensors, computed where they live, to be compared with what a file holds.

A hash of the file proves that the file is what was written; this proves that what was written is what the
model was. It is exact integer arithmetic modulo 2^64, so any device and any chunking give the same value.
"""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = 1 << 18
_MULTIPLIER = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64: odd, bits well mixed
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(tensor: Tensor) -> str:
    """16 hex digits: sum of (bits_i + 1) · m_i mod 2^64 over elements in row-major order.

    m_i = (2i + 1) · constant is odd and differs for every position, so a changed, moved or missing element
    changes the sum. `tensor` may be any strided view; only one chunk is copied at a time.
    """
    flat_rows = tensor.detach().reshape(1) if tensor.dim() == 0 else tensor.detach()
    row_elements = max(1, flat_rows[0].numel()) if flat_rows.shape[0] else 1
    rows_per_chunk = max(1, _CHUNK // row_elements)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    start = 0
    for chunk in flat_rows.split(rows_per_chunk):
        bits = chunk.contiguous().view(-1).view(_BITS[tensor.element_size()]).long()
        position = torch.arange(start, start + bits.numel(), dtype=torch.int64, device=tensor.device)
        total += ((bits + 1) * ((2 * position + 1) * _MULTIPLIER)).sum()
        start += bits.numel()
    return f"{int(total.item()) & (2**64 - 1):016x}"
