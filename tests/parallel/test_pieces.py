"""Every element of every parameter belongs to exactly one piece."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from megalite.config import ModelConfig
from megalite.models.families import piece_shapes
from megalite.models.transformer import Transformer
from megalite.parallel.pieces import iter_pieces

CONFIGS = {
    "llama": ModelConfig(vocab_size=130, num_layers=2, hidden_size=64, num_key_value_heads=2),
    "tied": ModelConfig(vocab_size=128, num_layers=1, hidden_size=64, tie_word_embeddings=True),
    "qwen3": ModelConfig(
        family="qwen3", vocab_size=7, num_layers=1, hidden_size=64, qk_norm=True, head_dim=32
    ),
    "gpt2": ModelConfig(
        family="gpt2",
        vocab_size=300,
        num_layers=2,
        hidden_size=64,
        max_position_embeddings=33,
        norm="layer",
        activation="gelu_tanh",
        position="learned",
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_pieces_cover_every_row_once_but_the_padding(name):
    config = CONFIGS[name]
    model = Transformer(config, device="meta")
    covered = {own: torch.zeros(p.shape[0], dtype=torch.int) for own, p in model.named_parameters()}
    parameters = dict(model.named_parameters())
    for parameter, own, piece in iter_pieces(model):
        assert parameters[own] is parameter
        start, stop = piece.rows
        assert (stop - start, *parameter.shape[1:]) == piece.global_shape
        assert piece.offset == (0,) * len(piece.global_shape)
        covered[own][start:stop] += 1
    for own, count in covered.items():
        true_rows = config.vocab_size if own in ("embedding.weight", "head.weight") else len(count)
        assert (count[:true_rows] == 1).all(), own
        assert (count[true_rows:] == 0).all(), own


@pytest.mark.parametrize("name", CONFIGS)
def test_pieces_are_those_the_files_are_made_of(name):
    model = Transformer(CONFIGS[name], device="meta")
    pieces = {piece.name: piece.global_shape for _, _, piece in iter_pieces(model)}
    assert pieces == piece_shapes(CONFIGS[name])


@pytest.mark.parametrize("name", CONFIGS)
def test_only_matrices_and_embeddings_decay(name):
    for _, _, piece in iter_pieces(Transformer(CONFIGS[name], device="meta")):
        assert piece.decay == (len(piece.global_shape) == 2), piece.name


def test_a_parameter_without_a_piece_is_refused():
    model = nn.Sequential(nn.Linear(2, 3))
    with pytest.raises(ValueError, match=r"\['bias', 'weight'\] of 0 \(Linear\) belong to no piece"):
        list(iter_pieces(model))
