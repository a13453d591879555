from __future__ import annotations

import pytest
import torch

from megalite.config import ModelConfig
from megalite.models.transformer import Transformer
from megalite.parallel.data import ALIGNMENT, PADDING, FlatBuffers
from megalite.parallel.mesh import Axis
from megalite.parallel.pieces import iter_pieces
from megalite.parallel.random import initialize

CONFIG = ModelConfig(
    vocab_size=301, num_layers=2, hidden_size=32, ffn_hidden_size=40, num_attention_heads=4, qk_norm=True,
    family="qwen3", max_position_embeddings=64,
)  # fmt: skip


def make(dtype: torch.dtype = torch.float32) -> tuple[Transformer, FlatBuffers]:
    model = Transformer(CONFIG)
    initialize(model, 0)
    return model, FlatBuffers(model, Axis(), dtype)


def test_layout_is_reversed_aligned_padded_and_complete():
    model, buffers = make()
    order = {name: i for i, (name, _) in enumerate(model.named_parameters())}
    for group in buffers.groups:
        numbers = [order[slot.name] for slot in group.slots]
        assert numbers == sorted(numbers, reverse=True)
        assert all(slot.start % ALIGNMENT == 0 for slot in group.slots)
        assert group.weights.numel() % PADDING == 0
        ends = [slot.start + slot.parameter.numel() for slot in group.slots]
        assert all(end <= slot.start for end, slot in zip(ends, group.slots[1:], strict=False))
    assert sum(len(group.slots) for group in buffers.groups) == len(order)


def test_values_are_kept_and_parameters_are_views():
    reference = Transformer(CONFIG)
    initialize(reference, 0)
    model, buffers = make()
    for (name, parameter), (_, expected) in zip(
        model.named_parameters(), reference.named_parameters(), strict=True
    ):
        assert torch.equal(parameter, expected), name
    group = buffers.groups[0]
    group.weights.fill_(2.0)
    assert all((slot.parameter == 2.0).all() for slot in group.slots)


def test_decay_follows_the_pieces():
    model, buffers = make()
    decayed = {slot.name for group in buffers.groups if group.decay for slot in group.slots}
    assert decayed == {name for _, name, piece in iter_pieces(model) if piece.decay}
    assert {name for name, p in model.named_parameters() if p.dim() < 2}.isdisjoint(decayed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_add_up_in_fp32_over_micro_batches(dtype):
    model, buffers = make(dtype)
    tokens = torch.randint(0, 301, (3, 2, 16), generator=torch.Generator().manual_seed(0))
    singles = []
    for batch in tokens:
        buffers.zero_grad()
        model.loss(batch[:, :-1], batch[:, 1:]).backward()
        singles.append([view.clone() for view in buffers.grad_views()])
    buffers.zero_grad()
    for batch in tokens:
        model.loss(batch[:, :-1], batch[:, 1:]).backward()
    for name, total, *parts in zip(buffers.names(), buffers.grad_views(), *singles, strict=True):
        assert total.dtype == torch.float32
        assert torch.equal(total, (parts[0] + parts[1]) + parts[2]), name
        assert total.abs().max() > 0, name
    if dtype == torch.bfloat16:
        assert all(p.grad is None for p in model.parameters())


def test_masters_keep_what_bf16_rounds_away():
    model, buffers = make(torch.bfloat16)
    reference = Transformer(CONFIG)
    initialize(reference, 0)
    expected = {piece.name: p[piece.rows[0] : piece.rows[1]] for p, _, piece in iter_pieces(reference)}
    for piece, master in buffers.piece_tensors("master"):
        assert torch.equal(master, expected[piece.name])
    assert next(model.parameters()).dtype == torch.bfloat16
    buffers.groups[0].master.add_(1.0)
    buffers.copy_master_to_weights()
    group = buffers.groups[0]
    assert torch.equal(group.weights, group.master.bfloat16())


def test_padding_rows_never_get_a_gradient_or_a_value():
    model, buffers = make()
    tokens = torch.randint(0, 301, (2, 17))
    model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
    embedding = next(
        view for name, view in zip(buffers.names(), buffers.grad_views(), strict=True) if "head" in name
    )
    assert embedding.shape[0] == 384
    assert (embedding[301:] == 0).all()
