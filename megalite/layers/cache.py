"""Keys and values of the tokens seen so far, so that generation computes only the new ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class LayerCache:
    """Room for `capacity` tokens of one layer, filled from the front.

    Args:
        batch_size, capacity, num_key_value_heads, head_dim: shape [B, capacity, K, D] of each buffer.
        factory: `dtype` and `device`.
    """

    def __init__(
        self, batch_size: int, capacity: int, num_key_value_heads: int, head_dim: int, **factory: Any
    ) -> None:
        shape = (batch_size, capacity, num_key_value_heads, head_dim)
        self.keys = torch.empty(shape, **factory)
        self.values = torch.empty(shape, **factory)
        self.length = 0

    def append(self, k_BSKD: Tensor, v_BSKD: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new tokens; return the keys and values of all tokens so far, [B, length, K, D].

        Raises:
            ValueError: there is no room left.
        """
        start, self.length = self.length, self.length + k_BSKD.shape[1]
        if self.length > self.keys.shape[1]:
            raise ValueError(
                f"{self.length} tokens do not fit a cache of capacity {self.keys.shape[1]}: make it larger"
            )
        self.keys[:, start : self.length] = k_BSKD
        self.values[:, start : self.length] = v_BSKD
        return self.keys[:, : self.length], self.values[:, : self.length]
