"""Baselines against hand-computed numbers, the tools' own output, and a slow dictionary count."""

from __future__ import annotations

import gzip
import itertools
import lzma
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from megalite.errors import UserError
from megalite.train.baselines import (
    Document,
    compressed_size,
    compute_baselines,
    count_tokens,
    measure,
    spread_blocks,
)
from tests.helpers.tiny import make_dataset


def test_compressors_agree_with_the_tools_whatever_the_pieces():
    text = b"".join(b"line %d of a text that repeats itself\n" % (i % 37) for i in range(3000))
    size = compressed_size(text[i : i + 1009] for i in range(0, len(text), 1009))
    assert size.raw == len(text)
    assert size.gzip == len(gzip.compress(text, 9))
    assert size.xz == len(lzma.compress(text, preset=9))
    assert size.gzip_bits_per_byte == 8 * size.gzip / len(text)


def test_nothing_compressed_has_no_rate():
    assert math.isnan(compressed_size([]).xz_bits_per_byte)


def test_unigram_and_bigram_by_hand():
    # Tokens 0 1 0 1 0 2 over a vocabulary of 4, k = 0.5: counts 3 2 1 0, so p = (3.5, 2.5, 1.5, 0.5) / 8.
    model = count_tokens([np.array([0, 1, 0, 1, 0, 2], dtype=np.uint16)], vocab_size=4)
    np.testing.assert_allclose(model.unigram, np.array([3.5, 2.5, 1.5, 0.5]) / 8)
    # Pairs 01 twice, 10 twice, 02 once: c(0) = 3 with t(0) = 2 successors, c(1) = 2 with t(1) = 1.
    assert model.bigram_bits(np.array([0]), np.array([1])) == pytest.approx(-math.log2((2 + 2 * 2.5 / 8) / 5))
    assert model.bigram_bits(np.array([1]), np.array([3])) == pytest.approx(-math.log2((0 + 1 * 0.5 / 8) / 3))
    # 2 was never followed by anything: the unigram decides.
    assert model.bigram_bits(np.array([2]), np.array([0])) == pytest.approx(-math.log2(3.5 / 8))


def test_bigram_probabilities_sum_to_one_after_every_token():
    tokens = np.random.default_rng(0).integers(0, 20, 500)
    model = count_tokens([tokens], vocab_size=23)
    for context in range(23):
        bits = [model.bigram_bits(np.array([context]), np.array([b])) for b in range(23)]
        assert sum(2.0**-b for b in bits) == pytest.approx(1.0, abs=1e-12)


def test_counts_merged_in_parts_equal_a_plain_count(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("megalite.train.baselines.PENDING_PAIRS", 50)
    rng = np.random.default_rng(1)
    blocks = [rng.zipf(1.5, 40) % 30 for _ in range(20)]
    model = count_tokens(blocks, vocab_size=30)
    expected = Counter((int(a), int(b)) for block in blocks for a, b in itertools.pairwise(block))
    got = {divmod(int(k), 30): int(c) for k, c in zip(model.pairs, model.pair_counts, strict=True)}
    assert got == expected
    assert int(model.context_counts.sum()) == sum(expected.values())


def test_blocks_cover_a_small_stream_and_sample_a_large_one_throughout():
    stream = np.arange(100_000)
    assert np.array_equal(np.concatenate(list(spread_blocks([stream], 100_000, block=999))), stream)
    blocks = list(spread_blocks([stream], 10_000, block=1000))
    assert sum(map(len, blocks)) == 10_000
    assert blocks[0][0] == 0
    assert blocks[-1][-1] == 99_999


def test_measure_scores_each_token_and_the_end_of_each_document():
    eod = 0
    train = np.array([eod, 1, 2, 1, 2, eod, 1, 2, eod], dtype=np.uint16)
    documents = [Document("a", b"xy" * 50, np.array([1, 2])), Document("b", b"zz" * 10, np.array([2]))]
    got = measure(lambda: documents, [train], vocab_size=3, eod_id=eod)
    model = count_tokens([train], 3)
    pairs = [(0, 1), (1, 2), (2, 0), (0, 2), (2, 0)]
    bigram = sum(model.bigram_bits(np.array([a]), np.array([b])) for a, b in pairs)
    unigram = -math.log2(model.unigram[1]) - 2 * math.log2(model.unigram[2]) - 2 * math.log2(model.unigram[0])
    assert got["val_tokens"] == 5
    assert got["val_bytes"] == 120
    assert got["bigram_bits_per_byte"] == pytest.approx(bigram / 120)
    assert got["unigram_bits_per_byte"] == pytest.approx(unigram / 120)
    assert got["gzip_bits_per_byte"] == 8 * len(gzip.compress(b"xy" * 50 + b"zz" * 10, 9)) / 120
    assert got["sources"]["b"] == {
        "gzip_bits_per_byte": 8 * len(gzip.compress(b"zz" * 10, 9)) / 20,
        "xz_bits_per_byte": 8 * len(lzma.compress(b"zz" * 10, preset=9)) / 20,
        "bytes": 20,
    }


def test_a_uniform_text_costs_log2_of_the_vocabulary():
    train = np.tile(np.arange(16), 1000)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 16, 400)
    got = measure(lambda: [Document("", b"u" * 100, tokens)], [train], vocab_size=16, eod_id=0)
    assert got["unigram_bits_per_byte"] == pytest.approx(401 * 4 / 100, rel=1e-3)


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([np.array([0, 7])], "training token 7 is outside the vocabulary of 5"),
        ([np.array([0, -1])], "training token -1 is outside the vocabulary of 5"),
        ([np.array([], dtype=np.int64)], "the training split holds no tokens"),
        ([], "the training split holds no tokens"),
    ],
)
def test_unusable_training_tokens_are_named(blocks: list[np.ndarray], message: str):
    with pytest.raises(UserError, match=message):
        count_tokens(blocks, 5)


def test_no_held_out_text_is_an_error():
    with pytest.raises(UserError, match="no held-out bytes to compress"):
        measure(list, [np.arange(4)], vocab_size=4, eod_id=0)


def test_prepared_folders(tmp_path: Path):
    got = compute_baselines([make_dataset(tmp_path / "data")])
    assert set(got["sources"]) == {"even", "odd"}
    assert got["val_bytes"] == sum(source["bytes"] for source in got["sources"].values())
    assert 0 < got["bigram_bits_per_byte"] < got["unigram_bits_per_byte"] < 8


def test_sources_of_one_name_in_two_folders_stay_apart(tmp_path: Path):
    first = make_dataset(tmp_path / "first")
    second = make_dataset(tmp_path / "second")
    got = compute_baselines([first, second])
    assert set(got["sources"]) == {"first/even", "first/odd", "second/even", "second/odd"}


def test_a_folder_that_is_no_dataset(tmp_path: Path):
    with pytest.raises(UserError, match="is not a prepared dataset"):
        compute_baselines([tmp_path])
