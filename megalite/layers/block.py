"""One pre-norm transformer block."""

from __future__ import annotations

from collections.abc import Callable

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
            return self._mlp_again(lambda x, total: (x, total), context, x, total)
        given = self.mlp.first.handover(context.split) if recompute.norm else None
        again = recompute.norm and given is None
        normed, residual = run_marked(again, self.mlp_norm, x, total, given)
        with made_again(again, tensors_of(normed), lambda: tensors_of(self.mlp_norm(residual)[0])):
            return self.mlp(normed, context.split, recompute.activation, given), residual

    def _all_again(self, normed: Operand, total: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        def attend(total: Tensor, *parts: Tensor) -> tuple[Tensor, Tensor]:
            return self.attention(from_tensors(*parts), context), total

        return self._mlp_again(attend, context, total, *tensors_of(normed))

    def _mlp_again(
        self, start: Callable[..., tuple[Tensor, Tensor]], context: Context, *arguments: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The block from `start(*arguments)`, its (branch, residual), to its end; run again except for `down_proj`.

        The second run comes in time for the backward pass of what reads its result: the activation's, which brings
        its own output, or (without a handover) that of `down_proj`, with the activation run again too.
        """
        given = self.mlp.down_proj.handover(context.split)

        def until_down(*arguments: Tensor) -> tuple[Operand, Tensor]:
            normed, residual = self.mlp_norm(*start(*arguments))
            inner = self.mlp.first(normed, context.split)
            value, *copies = (inner,) if given is not None else tensors_of(self.mlp.activation(inner))
            return from_tensors(tap(value), *copies), residual

        last, residual = run_again(until_down, *arguments)
        value = value_of(last)
        with made_again(True, (value,), tapped(value)):
            if given is None:
                return self.mlp.down_proj(last, context.split), residual
            active = self.mlp.activation(value, given)
        # A layer's widest tensor, which nothing keeps: not here either while the product runs.
        del last, value
        return self.mlp.down_proj(active, context.split, given), residual
