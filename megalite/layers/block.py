"""One pre-norm transformer block."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megalite.layers.attention import Attention, Context
from megalite.layers.cache import LayerCache
from megalite.layers.mlp import MLP, GatedMLP
from megalite.layers.norm import LayerNorm, RMSNorm
from megalite.layers.recompute import KEEP, Recompute, made_again, run_again, run_marked, tap, tapped
from megalite_kernels.ops.quantized import Operand, from_tensors, tensors_of, value_of


class Block(nn.Module):
    """x += attention(norm(x)); x += mlp(norm(x)), with each addition done inside the norm after it.

    The residual stream therefore travels as two tensors: `residual`, and the branch `x` that the next norm
    adds to it while it reads both. That saves one read and one write of the stream per addition.
    """

    runs_whole = False
    """Its layers are never called as modules of their own: it is compiled, and waits for all its weights at once."""
    feeds_projections = ("attention_norm", "mlp_norm")

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
        self,
        x: Tensor,
        residual: Tensor | None,
        context: Context,
        cache: LayerCache | None = None,
        recompute: Recompute = KEEP,
    ) -> tuple[Tensor, Tensor]:
        """(branch [..., H], residual [..., H] or None before the first block) → the same after this block.

        `recompute` says what the backward pass makes again; the gradients have the same bits either way.
        """
        if recompute.full and torch.compiler.is_compiling():
            # Not self(...): a compiled block's own `forward` is the compiler's entry.
            return run_again(lambda x, residual: Block.forward(self, x, residual, context), x, residual)
        full = recompute.full and torch.is_grad_enabled()
        given = self.attention.qkv_proj.handover(context.split) if recompute.norm and not full else None
        again = recompute.norm and given is None
        normed, total = run_marked(again, self.attention_norm, x, residual, given)
        with made_again(again or full, tensors_of(normed), lambda: tensors_of(self.attention_norm(total)[0])):
            if full:
                return self._all_again(normed, total, context)
            x = self.attention(normed, context, cache, recompute.attention, given)
        if recompute.mlp and torch.is_grad_enabled():
            return self._mlp_again(x, total, context)
        given = self.mlp.first.handover(context.split) if recompute.norm else None
        again = recompute.norm and given is None
        normed, residual = run_marked(again, self.mlp_norm, x, total, given)
        with made_again(again, tensors_of(normed), lambda: tensors_of(self.mlp_norm(residual)[0])):
            return self.mlp(normed, context.split, recompute.activation, given), residual

    def _all_again(self, normed: Operand, total: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        def until_down(total: Tensor, *parts: Tensor) -> tuple[Operand, Tensor]:
            return self._until_down(self.attention(from_tensors(*parts), context), total, context)

        active, residual = run_again(until_down, total, *tensors_of(normed))
        return self._down(active, context), residual

    def _mlp_again(self, x: Tensor, total: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        active, residual = run_again(lambda x, total: self._until_down(x, total, context), x, total)
        return self._down(active, context), residual

    def _until_down(self, x: Tensor, total: Tensor, context: Context) -> tuple[Operand, Tensor]:
        normed, residual = self.mlp_norm(x, total)
        value, *copies = tensors_of(self.mlp.up(normed, context.split))
        return from_tensors(tap(value), *copies), residual

    def _down(self, active: Operand, context: Context) -> Tensor:
        """What `_until_down` gave is made again for the product's backward pass, in time for its own."""
        value = value_of(active)
        with made_again(True, (value,), tapped(value)):
            return self.mlp.down_proj(active, context.split)
