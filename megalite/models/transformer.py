"""The decoder-only transformer: GPT-2, Llama, Qwen and Mistral are settings of this one class."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import megalite_kernels as kernels
from megalite.config import IGNORE_INDEX, ModelConfig
from megalite.errors import UserError
from megalite.layers.attention import Context
from megalite.layers.cache import LayerCache
from megalite.layers.embedding import PositionEmbedding, VocabParallelEmbedding
from megalite.layers.norm import NORMS
from megalite.layers.recompute import KEEP, Recompute
from megalite.layers.rope import rope_frequencies, rope_tables, stretch_linear, stretch_llama3
from megalite.models.blocks import Blocks, ModelPart, build_block
from megalite.parallel.collectives import all_gather
from megalite.parallel.context import ContextSplit
from megalite.parallel.loss import head_loss, vocab_parallel_losses
from megalite.parallel.tensor import UNSPLIT, TensorSplit, own_tokens
from megalite_kernels.ops.quantized import value_of


class Transformer(nn.Module):
    """Token ids → final hidden states, logits or loss.

    Tokens come as [B, S], or packed as [T] with `cu_seqlens`: documents laid end to end, each attending only
    to itself, positions restarting at 0 in each. "..." below is [B, S] or [T].

    The weights are uninitialised: fill them with `megalite.parallel.random.initialize` or from a file.

    Args:
        config: shape and ingredients; `vocab_size` must be set.
        split: how the layers are cut over tensor-parallel ranks; the default cuts nothing.
        part: which layers this process holds; the default is all of them.
        dtype: of the parameters and so of the computation; norms, softmax and loss accumulate in float32.
        device: where the parameters are; "meta" allocates nothing.
    """

    def __init__(
        self,
        config: ModelConfig,
        split: TensorSplit = UNSPLIT,
        *,
        part: ModelPart | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if config.vocab_size <= 0:
            raise UserError(
                f"model.vocab_size={config.vocab_size} must be greater than 0: set it, or let the data's "
                "tokenizer set it"
            )
        factory: dict[str, Any] = {"dtype": dtype, "device": device}
        self.config = config
        self.split = split
        self.part = part = part or ModelPart(tuple(range(config.num_layers)))
        tied = config.tie_word_embeddings
        copied = tied and part.embedding != part.head  # the other end of a pipeline has the same matrix
        self.embedding = self._vocabulary(tied=copied, **factory) if part.embedding else None
        self.position_embedding = None
        if config.position == "learned" and part.embedding:
            positions, std = config.max_position_embeddings, config.init_std
            self.position_embedding = PositionEmbedding(
                positions, config.hidden_size, split, std=std, **factory
            )
        self.recompute: dict[int, Recompute] = {}
        """What the backward pass of each layer makes again; those not named keep everything."""
        self.layers = Blocks({i: build_block(config, i, split, **factory) for i in part.layers})
        self.final_norm = self.head = None
        if part.head:
            self.final_norm = NORMS[config.norm](config.hidden_size, config.norm_eps, split, **factory)
            if not tied or copied:
                self.head = self._vocabulary(tied=copied, **factory)

    def _vocabulary(self, *, tied: bool, **factory: Any) -> VocabParallelEmbedding:
        config, tp = self.config, self.split.axis.size
        padded = -(-config.padded_vocab_size // tp) * tp
        return VocabParallelEmbedding(
            config.vocab_size,
            config.hidden_size,
            self.split,
            padded_rows=padded,
            std=config.init_std,
            copy_of="embedding" if tied else None,
            **factory,
        )

    @property
    def output(self) -> VocabParallelEmbedding:
        """What holds the output head's matrix: the embedding where the weights are tied."""
        output = self.embedding if self.head is None else self.head
        assert output is not None, "this part of the model has no head"
        return output

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    def forward(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        sequence: ContextSplit | None = None,
        cache: list[LayerCache] | None = None,
    ) -> Tensor:
        """Final-normed hidden states.

        Args:
            tokens: [...] int64.
            positions: [...] or [S] int64; by default they count up from what `cache` holds, or from 0 in
                each document.
            cu_seqlens: [segments + 1] int32, first 0 and last T; only for packed tokens.
            max_seqlen: longest segment.
            sequence: where this rank's part of a packed batch stands (context parallel); `tokens` and
                `positions` are those of the part, and `cu_seqlens` is not needed.
            cache: from `new_cache`; the tokens continue those in it, and are added to it.

        Returns:
            [..., H] in the parameters' dtype; with sequence parallelism this rank's tokens [T / tp, H].

        Raises:
            ValueError: packed tokens without `cu_seqlens` or with a cache; [B, S] tokens with `cu_seqlens`;
                more tokens in a row than there are learned positions.
        """
        _check_layout(tokens, positions, cu_seqlens, sequence, cache)
        start = cache[0].length if cache else 0
        packed = cu_seqlens is not None or sequence is not None
        self._check_length(max_seqlen if packed else start + tokens.shape[-1])
        if positions is None:
            positions = _count_up(tokens, cu_seqlens, start)
        where: dict[str, Any] = {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen, "sequence": sequence}
        return self.run(tokens, range(self.config.num_layers), positions=positions, cache=cache, **where)

    def run(
        self,
        x: Tensor,
        layers: range,
        *,
        positions: Tensor,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        sequence: ContextSplit | None = None,
        cache: list[LayerCache] | None = None,
    ) -> Tensor:
        """Some consecutive layers: what one stage of a pipeline computes.

        Args:
            x: token ids [...] where `layers` begins with the first one, else the residual stream [..., H] as
                the stage before returned it.
            layers: numbers of the layers; this process holds them.
            positions, cu_seqlens, max_seqlen, sequence: as in `forward`.
            cache: of the layers that this process holds, in their order.

        Returns:
            [..., H]: final-normed after the last layer, else the residual stream.
        """
        packed = (cu_seqlens is not None or sequence is not None) and not cache
        split = self._token_split(positions.shape[0] if packed else None)
        if layers.start == 0:
            x = self._embed(x, positions, split)
        context = Context(self._rotary(positions, x.dtype), cu_seqlens, max_seqlen, sequence, split)
        caches = dict(zip(self.part.layers, cache, strict=True)) if cache else {}
        residual = None
        for number in layers:
            again = self.recompute.get(number, KEEP)
            x, residual = self.layers[number](x, residual, context, caches.get(number), again)
        if layers.stop < self.config.num_layers:
            # One tensor travels to the next stage, not two: the sum that its first norm would make.
            return x if residual is None else x + residual
        assert self.final_norm is not None, "this part of the model has no head"
        return value_of(self.final_norm(x, residual)[0])

    def _embed(self, tokens: Tensor, positions: Tensor, split: TensorSplit) -> Tensor:
        assert self.embedding is not None, "this part of the model has no embedding"
        x = self.embedding(tokens, split)
        if self.position_embedding is not None:
            x = x + self.position_embedding(own_tokens(positions, split))
        return x

    def _token_split(self, tokens: int | None) -> TensorSplit:
        """How the activations lie of a packed batch of so many tokens, or (None) of an unpacked one or with a cache.

        Those that cannot be split evenly stay whole where no gradient is needed.
        """
        split = self.split
        if not split.sequence or (tokens is not None and tokens % split.axis.size == 0):
            return split
        if torch.is_grad_enabled():
            raise ValueError(
                f"sequence parallelism trains on packed tokens [T] with T a multiple of tp={split.axis.size}, "
                f"not on {f'{tokens} tokens' if tokens else '[B, S]'}: pack them, or set "
                "parallel.sequence_parallel=false"
            )
        return split.whole_tokens()

    def _check_length(self, length: int | None) -> None:
        limit = self.config.max_position_embeddings
        if self.config.position == "learned" and length is not None and length > limit:
            raise ValueError(
                f"{length} tokens in a row need more than the {limit} learned positions: shorten them, or "
                "raise model.max_position_embeddings"
            )

    def _rotary(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """Angle tables of this pass: a cosine and a sine per token and pair cost less than keeping them."""
        if self.config.position != "rope":
            return None
        return rope_tables(positions, _frequencies(self.config, positions.device), dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., H] → [..., V] over the true vocabulary; `hidden` as `forward` gives it, without sequence shards."""
        output = self.output
        local = kernels.linear(hidden, output.weight)
        if self.split.axis.group is not None:
            local = all_gather(local.movedim(-1, 0), self.split.axis).movedim(0, -1)
        return local[..., : self.config.vocab_size]

    def loss(
        self,
        tokens: Tensor,
        labels: Tensor,
        *,
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        sequence: ContextSplit | None = None,
        grad_scale: Tensor | None = None,
    ) -> Tensor:
        """Sum of the cross-entropies (nats) at all labels that are not IGNORE_INDEX: a float32 scalar.

        A sum, because only the caller knows how many valid labels the whole step has. Who says by `grad_scale` what
        gradient the sum is going to get, must run its backward pass: see `megalite.parallel.loss.head_loss`.
        """
        where = {
            "positions": positions,
            "cu_seqlens": cu_seqlens,
            "max_seqlen": max_seqlen,
            "sequence": sequence,
        }
        return self.hidden_losses(self(tokens, **where), labels, "sum", grad_scale)

    def token_losses(
        self,
        tokens: Tensor,
        labels: Tensor,
        *,
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        sequence: ContextSplit | None = None,
    ) -> Tensor:
        """Cross-entropy (nats) of every token: fp32 [B * S] or [T], 0 where the label is IGNORE_INDEX."""
        where = {
            "positions": positions,
            "cu_seqlens": cu_seqlens,
            "max_seqlen": max_seqlen,
            "sequence": sequence,
        }
        return self.hidden_losses(self(tokens, **where), labels, "none")

    def hidden_losses(
        self, hidden: Tensor, labels: Tensor, reduction: str, grad_scale: Tensor | None = None
    ) -> Tensor:
        """Cross-entropies (nats) of final hidden states [..., H]: their sum ("sum") or all of them ("none", [T]).

        `grad_scale` as in `loss`.
        """
        packed = labels.dim() == 1
        hidden, labels = hidden.flatten(0, -2), labels.flatten()
        output = self.output
        if self.split.axis.group is None:
            place: dict[str, Any] = {"ignore_index": IGNORE_INDEX, "valid_rows": output.valid_rows}
            if reduction == "sum":
                return head_loss(hidden, output.weight, labels, grad_scale=grad_scale, **place)
            return kernels.linear_cross_entropy(hidden, output.weight, labels, reduction=reduction, **place)
        losses = vocab_parallel_losses(
            hidden,
            output.weight,
            labels,
            self._token_split(labels.shape[0] if packed else None),
            first_row=output.first_row,
            valid_rows=output.valid_rows,
            vocab_size=self.config.vocab_size,
            ignore_index=IGNORE_INDEX,
        )
        return losses if reduction == "none" else losses.sum()

    def next_logits(self, tokens: Tensor, cache: list[LayerCache] | None) -> Tensor:
        """Logits [V] of what follows `tokens` [1, S]."""
        return self.logits(self(tokens, cache=cache)[0, -1])

    def new_cache(self, batch_size: int, capacity: int, dtype: torch.dtype | None = None) -> list[LayerCache]:
        """An empty key/value cache for `capacity` tokens of each of `batch_size` sequences.

        `dtype` is that of the computation, where the parameters are kept in another.
        """
        config, weight = self.config, next(self.parameters())
        heads = max(1, config.kv_heads // self.split.axis.size)
        shape = (batch_size, capacity, heads, config.size_per_head)
        return [
            LayerCache(*shape, dtype=dtype or weight.dtype, device=weight.device) for _ in self.part.layers
        ]


def _frequencies(config: ModelConfig, device: torch.device) -> Tensor:
    frequencies = rope_frequencies(config.size_per_head, config.rope_theta, device)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return stretch_linear(frequencies, scaling.factor)
    return stretch_llama3(
        frequencies,
        scaling.factor,
        low_freq_factor=scaling.low_freq_factor,
        high_freq_factor=scaling.high_freq_factor,
        original_length=scaling.original_max_position_embeddings,
    )


def _count_up(tokens: Tensor, cu_seqlens: Tensor | None, start: int) -> Tensor:
    """Positions [S] from `start`, or [T] from 0 in each document."""
    positions = torch.arange(start, start + tokens.shape[-1], device=tokens.device)
    if cu_seqlens is None:
        return positions
    document = torch.searchsorted(cu_seqlens, positions, right=True) - 1
    return positions - cu_seqlens[document]


def _check_layout(
    tokens: Tensor,
    positions: Tensor | None,
    cu_seqlens: Tensor | None,
    sequence: ContextSplit | None,
    cache: list[LayerCache] | None,
) -> None:
    packed = tokens.dim() == 1
    if sequence is not None and (not packed or positions is None):
        raise ValueError("a part of a sequence is packed tokens [T] with their positions")
    if packed and cu_seqlens is None and sequence is None:
        raise ValueError("packed tokens [T] need cu_seqlens; unpacked sequences are [B, S]")
    if not packed and cu_seqlens is not None:
        raise ValueError(f"cu_seqlens describes packed tokens [T], but the tokens are {list(tokens.shape)}")
    if packed and cache is not None:
        raise ValueError("a key/value cache needs tokens as [B, S], not packed [T]")
