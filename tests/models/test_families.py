"""The map between canonical pieces and the tensors of Hugging Face files."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megalite.models.families import hf_tensors, piece_shapes
from megalite.models.presets import PRESETS

SMALL = {
    "num_layers": 2,
    "hidden_size": 24,
    "ffn_hidden_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 0,
    "vocab_size": 11,
    "max_position_embeddings": 9,
}
CONFIGS = {
    PRESETS[name].family: dataclasses.replace(PRESETS[name], **SMALL)
    for name in ("llama3-8b", "qwen2.5-0.5b", "qwen3-8b", "mistral-7b")
}
CONFIGS["gpt2"] = dataclasses.replace(PRESETS["gpt2-124m"], **{**SMALL, "num_key_value_heads": 4})


def numbered_pieces(config) -> dict[str, torch.Tensor]:
    """Every element of every piece is another number."""
    pieces, start = {}, 0
    for name, shape in piece_shapes(config).items():
        count = torch.Size(shape).numel()
        pieces[name] = torch.arange(start, start + count).view(shape)
        start += count
    return pieces


@pytest.mark.parametrize("family", CONFIGS)
def test_every_element_of_the_files_is_one_element_of_a_piece(family):
    pieces = numbered_pieces(CONFIGS[family])
    tensors = hf_tensors(CONFIGS[family])
    values = torch.cat([t.assemble(pieces.__getitem__).flatten() for t in tensors])
    assert torch.equal(values.sort().values, torch.arange(values.numel()))


@pytest.mark.parametrize("family", CONFIGS)
def test_taking_apart_undoes_assembling(family):
    pieces = numbered_pieces(CONFIGS[family])
    again = {}
    for tensor in hf_tensors(CONFIGS[family]):
        value = tensor.assemble(pieces.__getitem__)
        assert tuple(value.shape) == tensor.shape
        assert value.is_contiguous()
        again |= dict(tensor.take_apart(value))
    assert again.keys() == pieces.keys()
    assert all(torch.equal(again[name], pieces[name]) for name in pieces)


def test_gpt2_lays_q_k_and_v_side_by_side_transposed():
    pieces = numbered_pieces(CONFIGS["gpt2"])
    tensors = {t.name: t.assemble(pieces.__getitem__) for t in hf_tensors(CONFIGS["gpt2"])}
    fused = tensors["transformer.h.1.attn.c_attn.weight"]
    q, k, v = (pieces[f"layers.1.attention.{x}_proj.weight"] for x in "qkv")
    assert torch.equal(fused, torch.cat((q, k, v)).t())
    biases = [pieces[f"layers.1.attention.{x}_proj.bias"] for x in "qkv"]
    assert torch.equal(tensors["transformer.h.1.attn.c_attn.bias"], torch.cat(biases))
    down = pieces["layers.0.mlp.down_proj.weight"]
    assert torch.equal(tensors["transformer.h.0.mlp.c_proj.weight"], down.t())
