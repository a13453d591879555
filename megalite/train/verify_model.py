"""A small model with the structure of a large one, and packed batches that show mistakes.

What a parallel layout can get wrong does not depend on sizes but on structure: which norms, biases and positions
there are, whether key heads are fewer than ranks, whether a weight is tied, what divides what. All of that is kept.
What makes mistakes visible is added: an odd vocabulary, more layers than stages, documents of unequal length and
labels masked unequally.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from megalite.config import IGNORE_INDEX, ModelConfig, ParallelConfig
from megalite.data.loader import MicroBatch, pack
from megalite.errors import UserError

VOCABULARY = 301
"""Odd, and 83 rows short of the next multiple of 128: the last of 4 or 8 ranks holds mostly padding."""
WINDOW = 7
"""Sliding window: shorter than most documents, and across the chunks of a ring."""
TOKENS = 48
"""Tokens of a micro-batch, where the layout divides them."""
POSITIONS = 64
_FFN_PER_RANK = 11
_SHARD = 48
"""Every vocabulary shard of 2, 4 or 8 ranks starts at a multiple of 384 / 8."""


def shrink_model(model: ModelConfig, layouts: Sequence[ParallelConfig]) -> ModelConfig:
    """The smallest model of the same structure that as many of `layouts` as possible can cut.

    Args:
        model: of any size; its vocabulary may be unknown (0).
        layouts: ways of cutting that `model` itself can take.
    """
    ffn = _FFN_PER_RANK * math.lcm(*(layout.tp for layout in layouts))
    candidates = [_with_heads(model, heads, kv_heads, ffn) for heads, kv_heads in _head_counts(model)]
    taken = [sum(takes(candidate, layout) for layout in layouts) for candidate in candidates]
    stages = max((layout.num_stages for layout in layouts), default=1)
    return with_layers(candidates[taken.index(max(taken))], model, stages)


def with_layers(small: ModelConfig, model: ModelConfig, stages: int) -> ModelConfig:
    """`small` with enough layers for a pipeline of so many stages, and one more where `model` has it: uneven."""
    layers = min(model.num_layers, max(3, stages + 1))
    start = model.sliding_window_start_layer
    scaled = 0 if start == 0 else layers if start >= model.num_layers else 1
    return dataclasses.replace(small, num_layers=layers, sliding_window_start_layer=scaled)


def takes(model: ModelConfig, layout: ParallelConfig) -> bool:
    """Whether heads and widths of `model` can be cut this way, however many layers it has."""
    try:
        layout.validate_model(dataclasses.replace(model, num_layers=max(model.num_layers, layout.num_stages)))
    except UserError:
        return False
    return True


def _head_counts(model: ModelConfig) -> list[tuple[int, int]]:
    """(query heads, key heads) of small models, smallest first: sizes that divide `model`'s."""
    kv, group = model.kv_heads, model.num_attention_heads // model.kv_heads
    # One head of several would hide every mistake in their order, and one query head for a key head is not GQA.
    kv_counts = [d for d in range(min(2, kv), kv + 1) if kv % d == 0]
    groups = [d for d in range(min(2, group), group + 1) if group % d == 0]
    if group % 2 and group > 3:
        groups.insert(0, 3)  # stands for any odd group, such as the 7 query heads for a key head of Qwen 2.5
    return sorted((k * g, k) for k in kv_counts for g in groups)


def _with_heads(model: ModelConfig, heads: int, kv_heads: int, ffn: int) -> ModelConfig:
    natural = model.size_per_head * model.num_attention_heads
    head, hidden = 8, 8 * heads
    if natural > model.hidden_size:
        head = 16
    elif natural < model.hidden_size:
        hidden = 16 * heads
    return dataclasses.replace(
        model,
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_key_value_heads=0 if model.num_key_value_heads == 0 else kv_heads,
        head_dim=head if model.head_dim else 0,
        max_position_embeddings=POSITIONS,
        sliding_window=WINDOW if model.sliding_window else 0,
        # The variance of every product stays what it is in the large model, so attention is not nearly uniform.
        init_std=model.init_std * math.sqrt(max(1.0, model.hidden_size / hidden)),
    )


def tokens_for(layout: ParallelConfig) -> int:
    """Tokens of a micro-batch that the layout divides: two chunks for each rank of a ring, a shard for each of tp."""
    unit = math.lcm(2 * layout.cp, layout.cp * layout.tp)
    return -(-TOKENS // unit) * unit


def packed_batches(count: int, tokens: int = TOKENS, seed: int = 0) -> list[MicroBatch]:
    """Micro-batches of documents of unequal length, each batch with another share of valid labels.

    One document in each has no valid label and one a single token; the first batch has the rows at both ends of
    every vocabulary shard. No batch resembles another, so none can be taken for another.
    """
    return [_packed_batch(number, tokens, seed) for number in range(count)]


def _packed_batch(number: int, tokens: int, seed: int) -> MicroBatch:
    random = np.random.default_rng((seed, number))
    ids, labels = random.integers(0, VOCABULARY, (2, tokens))
    if number == 0:
        edges = np.array(sorted({x for k in range(0, VOCABULARY, _SHARD) for x in (max(0, k - 1), k)}))
        ids[-edges.size :], labels[-edges.size :] = edges, edges[::-1]
        ids[0] = labels[0] = VOCABULARY - 1
    masked = random.random(tokens) < (0.1, 0.8, 0.3)[number % 3]
    masked[-14:] &= number != 0
    starts = [0, 5, 6, tokens // 2 - 4 + number % 7]
    masked[starts[1] : starts[2]] = True
    masked[0] = False
    labels[masked] = IGNORE_INDEX
    return pack([ids], [labels], [np.array(starts)])


def describe(model: ModelConfig) -> str:
    """The structure in a few words: ``qwen3, rms norm, swiglu, rope, 4 heads over 2, tied``."""
    heads = f"{model.num_attention_heads} heads"
    if model.kv_heads != model.num_attention_heads:
        heads += f" over {model.kv_heads} key heads"
    position: str = model.position
    if model.rope_scaling is not None:
        position += f" ({model.rope_scaling.kind} scaling)"
    biased = [name for name in ("qkv", "output", "mlp") if getattr(model, f"{name}_bias")]
    extras = [
        "qk-norm" if model.qk_norm else "",
        f"biases: {'+'.join(biased)}" if biased else "",
        f"window {model.sliding_window}" if model.sliding_window else "",
        "tied head" if model.tie_word_embeddings else "",
    ]
    parts = [model.family, f"{model.norm} norm", model.activation, position, heads, *filter(None, extras)]
    return ", ".join(parts)


def valid_labels(batches: Sequence[MicroBatch]) -> int:
    """Labels that carry loss."""
    return sum(int((batch.labels != IGNORE_INDEX).sum()) for batch in batches)
