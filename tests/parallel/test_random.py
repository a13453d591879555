"""Initial weights are a pure function of (seed, name, global index), with a normal's moments."""

from __future__ import annotations

import hashlib
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megalite.config import ModelConfig
from megalite.models.transformer import Transformer
from megalite.parallel.pieces import iter_pieces, piece_view
from megalite.parallel.random import initialize, normal_slice


def whole(seed: int, name: str, shape: tuple[int, ...], std: float = 1.0) -> np.ndarray:
    return normal_slice(seed, name, shape, (0,) * len(shape), shape, std)


def test_golden_bits():
    """These never change: a seed in an old configuration must give the old weights."""
    values = whole(1234, "layers.0.attention.q_proj.weight", (2, 3), 0.02)
    golden = [
        [-0.011803588829934597, 0.0048910523764789104, 0.026992492377758026],
        [0.024349670857191086, 0.005244140513241291, 0.02858581580221653],
    ]
    assert values.dtype == np.float32
    assert values.tolist() == golden
    assert whole(0, "embedding.weight", (100003,)).tolist()[-1] == -0.4487457275390625


def test_matches_the_definition_in_plain_integers():
    def value(seed: int, name: str, index: int, std: float) -> np.float32:
        digest = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
        first, key = (int.from_bytes(digest[i : i + 8], "little") for i in (0, 8))
        total = 0
        for draw in range(3):
            z = (first + (3 * index + draw) * 0x9E3779B97F4A7C15) % 2**64
            z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64 ^ key
            z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
            z ^= z >> 31
            total += sum(z >> shift & 0xFFFF for shift in (0, 16, 32, 48))
        return np.float32((total - 6 * 65535) * (std / math.sqrt(2**32 - 1)))

    values = whole(42, "head.weight", (37, 1009), 0.02).ravel()
    for index in (0, 1, 2, 1009, 16383, 16384, 37332):
        assert values[index] == value(42, "head.weight", index, 0.02)
    huge = normal_slice(1, "w", (2**20, 2**20), (2**20 - 1, 2**20 - 2), (1, 2), 1.0)
    assert huge[0, 1] == value(1, "w", 2**40 - 1, 1.0)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_block_is_a_slice_of_the_whole(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=4)))
    bounds = [sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in shape]
    offset = tuple(a for a, _ in bounds)
    local = tuple(b - a for a, b in bounds)
    block = normal_slice(7, "w", shape, offset, local, 0.5)
    expected = whole(7, "w", shape, 0.5)[tuple(slice(a, b) for a, b in bounds)]
    assert block.tobytes() == np.ascontiguousarray(expected).tobytes()


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_shards_of_every_dim_have_the_bits_of_the_whole(dim):
    shape = (12, 66, 254)  # larger than one chunk of draws, and not a multiple of it
    full = whole(3, "w", shape)
    size = shape[dim] // 2
    for rank in range(2):
        offset = tuple(rank * size if d == dim else 0 for d in range(3))
        local = tuple(size if d == dim else n for d, n in enumerate(shape))
        block = normal_slice(3, "w", shape, offset, local, 1.0)
        assert np.array_equal(block, full.take(range(rank * size, (rank + 1) * size), axis=dim))


def test_a_generator_that_counts_locally_would_be_noticed():
    """What a stateful generator would do: the second shard starts again at its own first element."""
    second = normal_slice(3, "w", (8, 64), (4, 0), (4, 64), 1.0)
    counted_locally = normal_slice(3, "w", (4, 64), (0, 0), (4, 64), 1.0)
    assert not np.isin(second, counted_locally).all()
    assert not np.array_equal(second, counted_locally)


def test_moments_are_a_normals():
    values = whole(5, "w", (2000, 1000), 0.02).astype(np.float64).ravel() / 0.02
    n = values.size
    assert abs(values.mean()) < 4 / n**0.5
    assert abs(values.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs((values**3).mean()) < 4 * (15 / n) ** 0.5
    # Twelve uniforms have an excess kurtosis of -6 / (5 * 12).
    assert abs((values**4).mean() / values.var() ** 2 - 2.9) < 4 * (96 / n) ** 0.5
    assert 4.5 < np.abs(values).max() < 6


def test_neighbours_names_and_seeds_are_uncorrelated():
    a = whole(5, "a", (1_000_000,)).astype(np.float64)
    others = {
        "next element": np.roll(a, 1),
        "next row of 768": np.roll(a, 768),
        "power-of-two distance": np.roll(a, 4096),
        "another name": whole(5, "b", (1_000_000,)),
        "another seed": whole(6, "a", (1_000_000,)),
    }
    for what, b in others.items():
        assert abs(np.dot(a, b) / a.size) < 4 / a.size**0.5, what
        assert abs(np.dot(a**2 - 1, b**2 - 1) / a.size / 2) < 4 / a.size**0.5, what


def test_bits_are_balanced_in_each_of_the_low_positions():
    """A linear dependence in the hash would show in the low bits of the sums."""
    sums = (whole(9, "w", (400_000,)).astype(np.float64) * np.sqrt(2.0**32 - 1)).round().astype(np.int64)
    for bit, lag in itertools.product(range(10), (0, 1, 2)):
        bits = (sums >> bit & 1).astype(np.float64)
        mixed = bits if lag == 0 else np.abs(bits - np.roll(bits, lag))
        assert abs(mixed.mean() - 0.5) < 2.5 / sums.size**0.5, (bit, lag)


def test_block_outside_the_tensor_is_refused():
    with pytest.raises(ValueError, match=r"block of shape \(2, 3\) at \(3, 0\) does not lie inside w"):
        normal_slice(1, "w", (4, 3), (3, 0), (2, 3), 1.0)


CONFIG = ModelConfig(
    vocab_size=130, num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, qk_norm=True
)


def test_initialize_fills_pieces_and_zeroes_padding():
    model = Transformer(CONFIG)
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    initialize(model, seed=11)
    for parameter, _, piece in iter_pieces(model):
        values = piece_view(parameter, piece)
        if piece.init.kind == "normal":
            expected = whole(11, piece.name, piece.global_shape, piece.init.std)
            assert torch.equal(values, torch.from_numpy(expected)), piece.name
        else:
            assert (values == {"ones": 1.0, "zeros": 0.0}[piece.init.kind]).all(), piece.name
    assert (model.embedding.weight[130:] == 0).all()


def test_output_projections_start_smaller_by_the_root_of_their_number():
    stds = {piece.name: piece.init.std for _, _, piece in iter_pieces(Transformer(CONFIG))}
    assert stds["layers.1.attention.o_proj.weight"] == pytest.approx(0.02 / 2)
    assert stds["layers.0.mlp.down_proj.weight"] == pytest.approx(0.02 / 2)
    assert stds["layers.0.mlp.up_proj.weight"] == 0.02
