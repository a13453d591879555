"""One pre-norm transformer block."""

from __future__ import annotations

from torch import Tensor, nn

from megalite.layers.attention import Attention, Context
from megalite.layers.cache import LayerCache
from megalite.layers.mlp import MLP, GatedMLP
from megalite.layers.norm import LayerNorm, RMSNorm


class Block(nn.Module):
    """x += attention(norm(x)); x += mlp(norm(x)), with each addition done inside the norm after it.

    The residual stream therefore travels as two tensors: `residual`, and the branch `x` that the next norm
    adds to it while it reads both. That saves one read and one write of the stream per addition.
    """

    def __init__(
        self,
        attention_norm: RMSNorm | LayerNorm,
        attention: Attention,
        mlp_norm: RMSNorm | LayerNorm,
        mlp: MLP | GatedMLP,
    ) -> None:
        super().__init__()
        self.attention_norm = attention_norm
        self.attention = attention
        self.mlp_norm = mlp_norm
        self.mlp = mlp

    def forward(
        self, x: Tensor, residual: Tensor | None, context: Context, cache: LayerCache | None = None
    ) -> tuple[Tensor, Tensor]:
        """(branch [..., H], residual [..., H] or None before the first block) → the same after this block."""
        x, residual = self.attention_norm(x, residual)
        x = self.attention(x, context, cache)
        x, residual = self.mlp_norm(x, residual)
        return self.mlp(x, context.split), residual
