"""Causal self-attention with grouped key/value heads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import megalite_kernels as kernels
from megalite.layers.cache import LayerCache
from megalite.layers.linear import ColumnParallelLinear, RowParallelLinear
from megalite.layers.recompute import made_again, run_marked
from megalite.parallel.context import ContextSplit, context_attention
from megalite.parallel.handover import Handover
from megalite.parallel.pieces import Init, Piece, whole
from megalite.parallel.tensor import UNSPLIT, Shard, TensorSplit
from megalite_kernels.ops.quantized import Operand


@dataclass(frozen=True, slots=True)
class Context:
    """Where the tokens stand, the same for all layers."""

    rotary: tuple[Tensor, Tensor] | None = None
    """Cosines and sines of the angles, each [S or T, D/2] or [B, S, D/2]; None for learned positions."""
    cu_seqlens: Tensor | None = None
    """[segments + 1] int32: where each document of a packed batch starts; None for [B, S] batches."""
    max_seqlen: int | None = None
    """Longest document of a packed batch."""
    sequence: ContextSplit | None = None
    """With context parallelism: where this rank's tokens stand; the two above are then unused."""
    split: TensorSplit | None = None
    """How the tokens of the activations between the cut layers lie; None: as the layers were made."""


class HeadNorm(nn.Module):
    """RMSNorm of each head of the queries or keys (Qwen 3): [..., heads, D] → the same."""

    def __init__(self, head_dim: int, eps: float, **factory: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(head_dim, **factory))

    def declare_pieces(self, path: str) -> Iterator[tuple[str, Piece]]:
        # A rank sees only its own heads, so its gradient is a part of a sum over the ranks.
        shape = tuple(self.weight.shape)
        yield "weight", whole(f"{path}.weight", shape, Init.ones(), tp="partial", decay=False)

    def forward(self, x: Tensor) -> Tensor:
        return kernels.rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """o(softmax(q kᵀ / sqrt(D), causal) v), where K key/value heads serve N query heads.

    Args:
        hidden_size: H.
        num_attention_heads, num_key_value_heads, head_dim: N, K, D.
        window: tokens a query looks back at, itself included; 0 is no limit.
        qkv_bias, output_bias: biases of the projections.
        qk_norm_eps: normalise each query and key head with this eps; None does not.
        std, output_std: standard deviations of the initial weights.
        split: heads are divided over its axis; with fewer key/value heads than ranks, neighbours share one.

    Source: Vaswani et al., arXiv 1706.03762; Ainslie et al., arXiv 2305.13245 (grouped heads).
    """

    def __init__(
        self,
        hidden_size: int,
        split: TensorSplit = UNSPLIT,
        *,
        num_attention_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        window: int = 0,
        qkv_bias: bool = False,
        output_bias: bool = False,
        qk_norm_eps: float | None = None,
        std: float,
        output_std: float,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.window = window or None
        q = Shard.heads(num_attention_heads, head_dim, split.axis)
        kv = Shard.heads(num_key_value_heads, head_dim, split.axis)
        self.q_size, self.kv_size = q.size, kv.size
        qkv = {"q_proj": q, "k_proj": kv, "v_proj": kv}
        self.qkv_proj = ColumnParallelLinear(hidden_size, qkv, split, bias=qkv_bias, std=std, **factory)
        self.o_proj = RowParallelLinear(
            q, hidden_size, split, name="o_proj", bias=output_bias, std=output_std, **factory
        )
        self.q_norm = self.k_norm = None
        if qk_norm_eps is not None:
            self.q_norm = HeadNorm(head_dim, qk_norm_eps, **factory)
            self.k_norm = HeadNorm(head_dim, qk_norm_eps, **factory)

    def forward(
        self,
        x: Operand,
        context: Context,
        cache: LayerCache | None = None,
        again: bool = False,
        given: Handover | None = None,
    ) -> Tensor:
        """[B, S, H] → [B, S, H], or packed [T, H] → [T, H] (of this rank's tokens with `split.sequence`).

        With a cache the S tokens follow those already in it, and attend to them too. With `again` the backward
        pass makes head norms and rotation again; `given` brings it x again.
        """
        qkv = self.qkv_proj(x, context.split, given)
        if self.q_norm is None and cache is None and context.sequence is None:
            return self.o_proj(self._attend_packed(qkv, context).flatten(-2), context.split)
        parts = qkv.split((self.q_size, self.kv_size, self.kv_size), dim=-1)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in parts)
        del qkv, parts
        placed: tuple[Tensor, Tensor] = run_marked(again, self._place, q, k, context.rotary)
        with made_again(again and placed[0] is not q, placed, lambda: self._place(q, k, context.rotary)):
            out = self._attend(*placed, v, context, cache)
        return self.o_proj(out.flatten(-2), context.split)

    def _attend_packed(self, qkv: Tensor, context: Context) -> Tensor:
        """Where nothing stands between projection and attention but the rotation, which attention does itself."""
        return kernels.packed_attention(
            qkv,
            self.q_size // self.head_dim,
            self.kv_size // self.head_dim,
            rotary=context.rotary,
            window=self.window,
            cu_seqlens=context.cu_seqlens,
            max_seqlen=context.max_seqlen,
        )

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context, cache: LayerCache | None) -> Tensor:
        if cache is not None:
            k, v = cache.append(k, v)
        if context.sequence is not None:
            return context_attention(q, k, v, context.sequence, window=self.window)
        return kernels.attention(
            q, k, v, window=self.window, cu_seqlens=context.cu_seqlens, max_seqlen=context.max_seqlen
        )

    def _place(self, q: Tensor, k: Tensor, rotary: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """Head norms and rotation, both optional, in one pass where there are both."""
        if self.q_norm is None or self.k_norm is None:
            return (q, k) if rotary is None else kernels.rope(q, k, *rotary)
        if rotary is None:
            return self.q_norm(q), self.k_norm(k)
        q_weight, k_weight = self.q_norm.weight, self.k_norm.weight
        return kernels.rope(q, k, *rotary, q_norm=q_weight, k_norm=k_weight, norm_eps=self.q_norm.eps)
