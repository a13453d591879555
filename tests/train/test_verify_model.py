"""The small model keeps the structure of the large one, and its data shows mistakes."""

from __future__ import annotations

import dataclasses
import re

import pytest

from megalite.config import IGNORE_INDEX, ModelConfig, ParallelConfig, RopeScaling
from megalite.models.presets import PRESETS
from megalite.models.transformer import Transformer
from megalite.parallel.pieces import iter_pieces
from megalite.train.verify import Verification
from megalite.train.verify_layouts import all_layouts, reason_against
from megalite.train.verify_model import (
    TOKENS,
    VOCABULARY,
    packed_batches,
    shrink_model,
    takes,
    tokens_for,
    valid_labels,
    with_layers,
)

ODD = {
    "one key head": ModelConfig(num_attention_heads=6, num_key_value_heads=1, hidden_size=96, qkv_bias=True),
    "odd heads": ModelConfig(num_attention_heads=25, hidden_size=1600, ffn_hidden_size=6400),
    "seven query heads for a key head": ModelConfig(
        num_attention_heads=28, num_key_value_heads=4, hidden_size=56
    ),
    "two layers": ModelConfig(num_layers=2, vocab_size=0),
    "narrow heads": ModelConfig(hidden_size=512, num_attention_heads=8, head_dim=32),
    "late window": ModelConfig(
        family="qwen2", num_layers=28, sliding_window=4096, sliding_window_start_layer=21
    ),
    "linear rope": ModelConfig(rope_scaling=RopeScaling(kind="linear", factor=2.0), activation="geglu"),
    "odd widths": ModelConfig(
        ffn_hidden_size=333, hidden_size=120, num_attention_heads=3, activation="relu2"
    ),
}
MODELS = {**PRESETS, **ODD}
SIZES = {
    "vocab_size", "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_key_value_heads",
    "head_dim", "max_position_embeddings", "sliding_window", "sliding_window_start_layer", "init_std",
}  # fmt: skip


def tensors(model: ModelConfig) -> set[str]:
    """Canonical names without the layer's number."""
    built = Transformer(dataclasses.replace(model, vocab_size=model.vocab_size or 8), device="meta")
    return {re.sub(r"\.\d+\.", ".*.", piece.name) for _, _, piece in iter_pieces(built)}


@pytest.mark.parametrize("name", MODELS)
def test_structure_is_kept(name: str) -> None:
    model = MODELS[name]
    small = Verification(model, all_layouts(8), "fp32").small
    for field in dataclasses.fields(model):
        if field.name not in SIZES:
            assert getattr(small, field.name) == getattr(model, field.name), field.name
    assert tensors(small) == tensors(model)
    assert small.vocab_size == VOCABULARY
    assert small.vocab_size % 2 == 1
    assert bool(small.sliding_window) is bool(model.sliding_window)
    assert bool(small.head_dim) is bool(model.head_dim)
    group = model.num_attention_heads // model.kv_heads
    small_group = small.num_attention_heads // small.kv_heads
    assert (small_group == 1) is (group == 1)
    assert group == 1 or group % 2 == small_group % 2
    wide = model.size_per_head * model.num_attention_heads
    narrow = small.size_per_head * small.num_attention_heads
    assert (narrow > small.hidden_size, narrow < small.hidden_size) == (
        wide > model.hidden_size,
        wide < model.hidden_size,
    )
    assert sum(p.numel() for p in Transformer(small, device="meta").parameters()) < 600_000


@pytest.mark.parametrize("name", MODELS)
def test_every_layout_that_the_model_can_take_fits_the_small_one(name: str) -> None:
    model, layouts = MODELS[name], all_layouts(8)
    verification = Verification(model, layouts, "fp32")
    reachable = [layout for layout in layouts if not reason_against(layout, model)]
    assert len(reachable) >= 16
    for layout in reachable:
        task = verification.task(layout, "fp32")
        layout.parallel.validate_model(task.model)
        assert task.tokens % (2 * layout.parallel.cp) == 0
        assert task.tokens // layout.parallel.cp % layout.parallel.tp == 0
        stages = layout.parallel.num_stages
        assert task.model.num_layers % stages or stages == 1 or task.model.num_layers == model.num_layers


def test_key_heads_are_fewer_than_ranks() -> None:
    verification = Verification(PRESETS["llama3-8b"], all_layouts(4), "fp32")
    assert verification.small.kv_heads == 2
    assert verification.small.num_attention_heads == 4
    # Ulysses needs a key head for each rank: such layouts get a model of their own.
    ulysses = next(layout for layout in all_layouts(4) if layout.name == "cp4-ulysses")
    assert not takes(verification.small, ulysses.parallel)
    assert verification.task(ulysses, "fp32").model.kv_heads == 4


def test_a_model_of_few_heads_is_not_given_more() -> None:
    small = shrink_model(PRESETS["tiny"], [ParallelConfig(tp=2)])
    assert small.num_attention_heads == 2


@pytest.mark.parametrize(("start", "scaled"), [(0, 0), (21, 1), (28, 3), (40, 3)])
def test_the_layer_where_the_window_begins(start: int, scaled: int) -> None:
    model = dataclasses.replace(ODD["late window"], sliding_window_start_layer=start)
    small = with_layers(shrink_model(model, [ParallelConfig()]), model, 1)
    assert small.num_layers == 3
    assert small.sliding_window_start_layer == scaled


def test_batches_are_unequal_in_every_way() -> None:
    batches = packed_batches(8)
    counts = [valid_labels([batch]) for batch in batches]
    assert max(counts) > 2 * min(counts) > 0
    assert len({batch.bounds for batch in batches}) > 4
    for batch in batches:
        lengths = [end - start for start, end in zip(batch.bounds, batch.bounds[1:], strict=False)]
        assert batch.bounds[-1] == TOKENS
        assert 1 in lengths
        assert len(set(lengths)) == len(lengths)
        documents = [
            batch.labels[start:end] for start, end in zip(batch.bounds, batch.bounds[1:], strict=False)
        ]
        assert any(bool((labels == IGNORE_INDEX).all()) for labels in documents)
        assert batch.tokens.max() < VOCABULARY
        assert batch.labels.max() < VOCABULARY
    for values in (batches[0].tokens, batches[0].labels):
        # 8 ranks hold 48 rows each of the 384 that are in memory
        assert {0, 47, 48, 95, 96, 191, 192, 287, 288, VOCABULARY - 1} <= set(values.tolist())


def test_tokens_divide_over_odd_degrees() -> None:
    assert tokens_for(ParallelConfig(tp=4, cp=2)) == TOKENS
    assert tokens_for(ParallelConfig(tp=5)) == 50
    assert tokens_for(ParallelConfig(cp=7, tp=3)) == 84
