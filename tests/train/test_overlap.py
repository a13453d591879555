"""Repetition and copying measured against brute force."""

from __future__ import annotations

import numpy as np
import pytest

from megalite.train import overlap
from megalite.train.overlap import (
    SharedRun,
    analyse_samples,
    distinct_n,
    longest_shared_run,
    repetition_rate,
    spread_pieces,
    tokens_seen,
)


def brute_force(samples: list[np.ndarray], training: list[np.ndarray]) -> int:
    """Length of the longest common run by dynamic programming."""
    best = 0
    for text in samples:
        for stream in training:
            row = np.zeros(len(stream) + 1, dtype=int)
            for token in text:
                row[1:] = np.where(stream == token, row[:-1] + 1, 0)
                best = max(best, int(row.max()))
    return best


def test_repetition_by_hand():
    tokens = np.array([1, 2, 3, 4, 1, 2, 3, 4, 5])  # 6 windows of 4, of which 1234 comes twice
    assert repetition_rate(tokens, 4) == pytest.approx(1 / 6)
    assert distinct_n(tokens, 1) == pytest.approx(5 / 9)
    assert repetition_rate(np.full(10, 7), 4) == pytest.approx(6 / 7)
    assert np.isnan(repetition_rate(np.array([1, 2]), 4))


def test_distinct_of_nothing_is_refused():
    with pytest.raises(ValueError, match="n=0 must be at least 1"):
        distinct_n(np.arange(5), 0)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("chunk", [7, 64, 1 << 20])
def test_longest_run_equals_brute_force(seed: int, chunk: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(overlap, "CHUNK_TOKENS", chunk)
    rng = np.random.default_rng(seed)
    training = [rng.integers(0, 4, size) for size in (300, 1, 170)]
    samples = [rng.integers(0, 4, size) for size in (40, 3, 60)]
    run = longest_shared_run(samples, training)
    assert run.length == brute_force(samples, training)
    text = samples[run.sample][run.sample_start :][: run.length]
    assert np.array_equal(text, training[run.stream][run.stream_start :][: run.length])


def test_planted_run_is_found_across_a_chunk_boundary(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(overlap, "CHUNK_TOKENS", 1000)
    rng = np.random.default_rng(0)
    train = rng.integers(0, 50_000, 5000).astype(np.uint16)
    sample = rng.integers(0, 50_000, 128)
    sample[10:70] = train[1970:2030]
    assert longest_shared_run([sample], [train]) == SharedRun(60, 0, 10, 0, 1970)


def test_nothing_shared_and_nothing_given():
    assert longest_shared_run([np.array([1, 2])], [np.array([3, 4])]).length == 0
    assert longest_shared_run([], [np.array([3, 4])]).length == 0
    assert longest_shared_run([np.array([], dtype=np.int64)], [np.array([3])]).length == 0


def test_colliding_hashes_are_not_believed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(overlap, "_code", lambda tokens: np.zeros(len(tokens), dtype=np.uint64))
    assert longest_shared_run([np.array([1, 2, 3])], [np.array([4, 5, 6, 7])]).length == 0


def test_shared_run_is_found_among_colliding_hashes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(overlap, "_code", lambda tokens: np.zeros(len(tokens), dtype=np.uint64))
    assert longest_shared_run([np.array([9, 1, 2, 3])], [np.array([4, 1, 2, 3, 7])]).length == 3


def test_tokens_seen():
    assert tokens_seen([np.array([0, 3]), np.array([3])], 5).tolist() == [True, False, False, True, False]


def test_pieces_of_a_large_stream_reach_its_end():
    stream = np.arange(1000)
    assert spread_pieces([stream], 1000) == [stream]
    pieces = spread_pieces([stream], 300, piece=100)
    assert [int(p[0]) for p in pieces] == [0, 450, 900]


def test_analysis_of_samples():
    rng = np.random.default_rng(0)
    train = rng.integers(0, 100, 4000)
    copied = train[500:532].copy()
    held_out = [rng.integers(0, 100, 32) for _ in range(3)]
    got = analyse_samples([copied, np.full(32, 5)], [train], held_out, vocab_size=103)
    assert got["longest_shared"] == 32
    assert got["longest_shared_tokens"] == copied.tolist()
    assert got["natural_longest_shared"] == brute_force(held_out, [train])
    assert got["repetition_rate"] == pytest.approx((1 - 1 / 29) / 2, abs=0.02)
    assert got["unseen_tokens"] == 3
    assert got["complete"]


def test_analysis_without_samples_or_held_out_text():
    got = analyse_samples([], [np.arange(10)], [], vocab_size=10)
    assert got["longest_shared"] is None
    assert got["repetition_rate"] is None
    assert got["unseen_tokens"] == 0
