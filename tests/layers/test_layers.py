"""Each layer against the same formula in plain float64 torch, and fused against separate projections."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from megalite.layers.attention import Attention, Context
from megalite.layers.embedding import VocabParallelEmbedding
from megalite.layers.linear import ColumnParallelLinear, RowParallelLinear
from megalite.layers.mlp import MLP, GatedMLP
from megalite.layers.norm import LayerNorm, RMSNorm
from megalite.layers.rope import rope_frequencies, rope_tables, stretch_linear, stretch_llama3
from megalite.parallel.pieces import iter_pieces, piece_view
from megalite.parallel.tensor import UNSPLIT, Shard, TensorSplit

WIDE = {"dtype": torch.float64}


def randomize(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), **WIDE)


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def pieces_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {piece.name: piece_view(parameter, piece).detach() for parameter, _, piece in iter_pieces(module)}


@pytest.mark.parametrize("residual", [None, random(3, 5, 16) * 2])
def test_rms_norm(residual):
    norm = randomize(RMSNorm(16, 1e-3, **WIDE))
    x = random(3, 5, 16)
    total = x if residual is None else x + residual
    expected = total / (total.square().mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight
    y, stream = norm(x, residual)
    close(y, expected)
    close(stream, total)


@pytest.mark.parametrize("residual", [None, random(3, 5, 16) * 2])
def test_layer_norm(residual):
    norm = randomize(LayerNorm(16, 1e-3, **WIDE))
    x = random(3, 5, 16)
    total = x if residual is None else x + residual
    y, stream = norm(x, residual)
    close(y, F.layer_norm(total, (16,), norm.weight, norm.bias, 1e-3))
    close(stream, total)


def test_fused_projections_equal_separate_ones():
    class Parent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            outputs = {"first": Shard.whole(3), "second": Shard.whole(5)}
            self.fused = ColumnParallelLinear(4, outputs, UNSPLIT, bias=True, std=0.1, **WIDE)

    parent = randomize(Parent())
    pieces = pieces_of(parent)
    assert {name: tuple(p.shape) for name, p in pieces.items()} == {
        "first.weight": (3, 4),
        "first.bias": (3,),
        "second.weight": (5, 4),
        "second.bias": (5,),
    }
    x = random(7, 4)
    first, second = parent.fused(x).split((3, 5), dim=-1)
    close(first, F.linear(x, pieces["first.weight"], pieces["first.bias"]))
    close(second, F.linear(x, pieces["second.weight"], pieces["second.bias"]))


@pytest.mark.parametrize("sequence", [False, True])
def test_biases_say_how_they_live_under_tensor_parallelism(sequence):
    split, shard = TensorSplit(sequence=sequence), Shard.whole(4)
    column = nn.ModuleDict({"x": ColumnParallelLinear(4, {"o": shard}, split, bias=True, std=0.1)})
    row = nn.ModuleDict({"x": RowParallelLinear(shard, 3, split, name="o", bias=True, std=0.1)})
    expected = "partial" if sequence else "replicated"
    for layer, bias in ((column, "sharded"), (row, expected)):
        assert {p.name: p.tp for _, _, p in iter_pieces(layer)} == {"o.weight": "sharded", "o.bias": bias}


ACTIVATIONS = {
    "swiglu": F.silu,
    "geglu": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu2": lambda x: F.relu(x).square(),
}


@pytest.mark.parametrize("activation", ["swiglu", "geglu"])
def test_gated_mlp(activation):
    mlp = GatedMLP(8, 12, activation=activation, bias=True, std=0.1, down_std=0.1, **WIDE)
    pieces = pieces_of(randomize(mlp))

    def project(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, pieces[f"{name}_proj.weight"], pieces[f"{name}_proj.bias"])

    x = random(5, 8)
    hidden = ACTIVATIONS[activation](project(x, "gate")) * project(x, "up")
    close(mlp(x), project(hidden, "down"))


@pytest.mark.parametrize("activation", ["gelu_tanh", "relu2"])
def test_plain_mlp(activation):
    mlp = MLP(8, 12, activation=activation, bias=False, std=0.1, down_std=0.1, **WIDE)
    pieces = pieces_of(randomize(mlp))
    x = random(5, 8)
    hidden = ACTIVATIONS[activation](F.linear(x, pieces["up_proj.weight"]))
    close(mlp(x), F.linear(hidden, pieces["down_proj.weight"]))


def test_embedding_rows_leave_out_the_padding():
    embedding = randomize(VocabParallelEmbedding(5, 3, std=0.1, padded_rows=128, **WIDE))
    assert embedding.rows.shape == (5, 3)
    indices = torch.tensor([[4, 0], [1, 1]])
    assert torch.equal(embedding(indices), embedding.weight[indices])


def test_grouped_attention_with_head_norms_and_window():
    heads, kv_heads, dim, length, window = 6, 2, 4, 9, 3
    layer = Attention(
        10,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=dim,
        window=window,
        qkv_bias=True,
        qk_norm_eps=1e-3,
        std=0.1,
        output_std=0.1,
        **WIDE,
    )
    p = pieces_of(randomize(layer))
    x = random(2, length, 10)
    frequencies = rope_frequencies(dim, 100.0)
    context = Context(rope_tables(torch.arange(length), frequencies, torch.float64))

    def project(name: str, count: int) -> torch.Tensor:
        out = F.linear(x, p[f"{name}_proj.weight"], p[f"{name}_proj.bias"]).unflatten(-1, (count, dim))
        return out.transpose(1, 2)  # [B, heads, S, D]

    def normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight

    def rotated(x: torch.Tensor) -> torch.Tensor:
        angles = torch.arange(length, **WIDE)[:, None] * frequencies.double()
        pairs = torch.complex(x[..., : dim // 2], x[..., dim // 2 :]) * torch.polar(
            torch.ones_like(angles), angles
        )
        return torch.cat((pairs.real, pairs.imag), dim=-1)

    q = rotated(normed(project("q", heads), p["q_norm.weight"]))
    k = rotated(normed(project("k", kv_heads), p["k_norm.weight"])).repeat_interleave(
        heads // kv_heads, dim=1
    )
    v = project("v", kv_heads).repeat_interleave(heads // kv_heads, dim=1)
    distance = torch.arange(length)[:, None] - torch.arange(length)
    hidden = (distance < 0) | (distance >= window)
    scores = (q @ k.mT / math.sqrt(dim)).masked_fill(hidden, -torch.inf)
    out = (scores.softmax(-1) @ v).transpose(1, 2).flatten(-2)
    close(layer(x, context), F.linear(out, p["o_proj.weight"]))


def test_rope_frequencies_and_tables():
    frequencies = rope_frequencies(8, 10000.0)
    assert frequencies.dtype == torch.float32
    torch.testing.assert_close(frequencies, torch.tensor([1.0, 0.1, 0.01, 0.001]))
    cos, sin = rope_tables(torch.tensor([[0, 3], [7, 1]]), frequencies, torch.bfloat16)
    assert cos.shape == sin.shape == (2, 2, 4)
    assert cos.dtype == torch.float32
    torch.testing.assert_close(cos[1, 0], (7 * frequencies).cos())
    assert rope_tables(torch.arange(2), frequencies, torch.float64)[0].dtype == torch.float64


def test_rope_stretches():
    frequencies = rope_frequencies(64, 10000.0)
    assert torch.equal(stretch_linear(frequencies, 4.0), frequencies / 4)
    stretched = stretch_llama3(
        frequencies, 8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_length=1024
    )
    turns = 1024 * frequencies / (2 * math.pi)
    assert torch.equal(stretched[turns > 4.01], frequencies[turns > 4.01])
    assert torch.equal(stretched[turns < 0.99], frequencies[turns < 0.99] / 8)
    between = (turns > 1.01) & (turns < 3.99)
    assert between.sum() >= 3
    assert (stretched[between] < frequencies[between]).all()
    assert (stretched[between] > frequencies[between] / 8).all()
    assert (stretched.diff() < 0).all()
