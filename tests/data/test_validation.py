"""Validation windows: every token scored once, with its context, the same for every layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalite.config import IGNORE_INDEX, DatasetSpec
from megalite.data.validation import ValidationSet, load_validation
from megalite.errors import UserError
from tests.data.build import EOD, prepared_dataset, random_documents

DOCUMENTS = random_documents(30, 40, seed=2)


def validation_of(folder: Path, documents: list[list[int]] = DOCUMENTS) -> ValidationSet:
    return ValidationSet([prepared_dataset(folder, [[1, EOD]], documents)])


@settings(max_examples=60, deadline=None)
@given(length=st.integers(1, 40), seq_length=st.integers(1, 50), overlap=st.floats(0, 0.99))
def test_every_token_is_scored_once(
    tmp_path_factory: pytest.TempPathFactory, length: int, seq_length: int, overlap: float
):
    document = [*range(1, length), EOD]
    validation = validation_of(tmp_path_factory.mktemp("v") / "d", [document])
    scored = []
    for window in validation.windows(seq_length, overlap):
        assert len(window.tokens) == len(window.labels) <= seq_length
        assert window.positions.tolist() == list(range(len(window.tokens)))
        keep = window.labels != IGNORE_INDEX
        assert keep[-1], "no window is without a score"
        # Each scored label follows its input in [EOD] + document.
        stream = [EOD, *document]
        for token, label in zip(window.tokens[keep].tolist(), window.labels[keep].tolist(), strict=True):
            place = len(scored)
            assert (token, label) == (stream[place], stream[place + 1])
            scored.append(label)
    assert scored == document


def test_windows_overlap_as_asked(tmp_path: Path):
    document = [*range(1, 100), EOD]
    windows = list(validation_of(tmp_path / "d", [document]).windows(40, 0.5))
    assert [window.tokens[0] for window in windows] == [EOD, 20, 40, 60]
    assert [int((window.labels == IGNORE_INDEX).sum()) for window in windows] == [0, 20, 20, 20]
    assert [len(window.tokens) for window in windows] == [40, 40, 40, 40]


def test_micro_batches_are_the_windows_packed(tmp_path: Path):
    validation = validation_of(tmp_path / "d")
    windows = list(validation.windows(16, 0.5))
    batches = list(validation.micro_batches(16, 0.5, tokens_per_batch=64))
    tokens = np.concatenate([batch.tokens.numpy() for batch, _ in batches])
    assert tokens.tolist() == np.concatenate([w.tokens for w in windows]).tolist()
    labels = np.concatenate([batch.labels.numpy() for batch, _ in batches])
    assert labels.tolist() == np.concatenate([w.labels for w in windows]).tolist()
    assert (labels != IGNORE_INDEX).sum() == validation.tokens == sum(map(len, DOCUMENTS))
    assert max(batch.tokens.numel() for batch, _ in batches) <= 64
    for batch, sources in batches:
        assert len(sources) == batch.cu_seqlens.numel() - 1
        assert batch.max_seqlen <= 16


@pytest.mark.parametrize("dp_size", [2, 3])
def test_ranks_share_the_same_batches(tmp_path: Path, dp_size: int):
    validation = validation_of(tmp_path / "d")
    alone = [batch.tokens.tolist() for batch, _ in validation.micro_batches(16, 0.5, tokens_per_batch=64)]
    shared = [
        [
            batch.tokens.tolist()
            for batch, _ in validation.micro_batches(
                16, 0.5, tokens_per_batch=64, dp_rank=rank, dp_size=dp_size
            )
        ]
        for rank in range(dp_size)
    ]
    assert alone == [shared[number % dp_size][number // dp_size] for number in range(len(alone))]


def test_a_subset_is_fixed_and_whole_documents(tmp_path: Path):
    validation = validation_of(tmp_path / "d")
    whole, part, smaller = validation.select(), validation.select(200), validation.select(100)
    assert whole.complete
    assert whole.tokens.sum() == validation.tokens
    assert whole.bytes.sum() == validation.bytes
    assert not part.complete
    assert 0 < part.tokens.sum() <= 200
    assert part.documents[: len(smaller.documents)].tolist() == smaller.documents.tolist()
    assert part.bytes.sum() == 3 * part.tokens.sum()
    scored = sum((w.labels != IGNORE_INDEX).sum() for w in validation.windows(16, 0.5, selection=part))
    assert scored == part.tokens.sum()
    by_limit = [
        b.tokens.tolist() for b, _ in validation.micro_batches(16, tokens_per_batch=64, max_tokens=200)
    ]
    by_selection = [
        b.tokens.tolist() for b, _ in validation.micro_batches(16, tokens_per_batch=64, selection=part)
    ]
    assert by_limit == by_selection
    assert len(validation.select(1).documents) == 1, "at least one document"
    assert validation.select(10**9).complete


def test_sources_are_kept_apart(tmp_path: Path):
    documents = random_documents(6, 10, seed=3)
    sources = [0, 1, 0, 1, 1, 0]
    prepared_dataset(
        tmp_path / "a", [[1, EOD]], documents, sources=["code", "prose"], validation_sources=sources
    )
    prepared_dataset(tmp_path / "b", [[1, EOD]], [[7, 8, EOD]], sources=["code"])
    validation = load_validation([DatasetSpec(path=str(tmp_path / name)) for name in "ab"])
    assert validation.sources == ["a/code", "prose", "b/code"]
    expected = [
        sum(len(d) for d, s in zip(documents, sources, strict=True) if s == which) for which in (0, 1)
    ]
    assert validation.tokens_per_source.tolist() == [*expected, 3]
    assert validation.bytes_per_source.tolist() == [3 * expected[0], 3 * expected[1], 9]
    tokens = np.zeros(3, dtype=np.int64)
    for batch, source_of_segment in validation.micro_batches(8, tokens_per_batch=32):
        per_token = np.repeat(source_of_segment, np.diff(batch.cu_seqlens.numpy()))
        tokens += np.bincount(per_token[batch.labels.numpy() != IGNORE_INDEX], minlength=3)
    assert tokens.tolist() == validation.tokens_per_source.tolist()


def test_nothing_held_out(tmp_path: Path):
    validation = validation_of(tmp_path / "d", [])
    assert len(validation) == validation.tokens == validation.bytes == 0
    assert (
        list(validation.windows(8))
        == list(validation.micro_batches(8, tokens_per_batch=8, max_tokens=5))
        == []
    )


def test_impossible_windows(tmp_path: Path):
    validation = validation_of(tmp_path / "d")
    with pytest.raises(UserError, match=r"eval.overlap=1.0 must be in \[0, 1\)"):
        next(validation.windows(8, 1.0))
    with pytest.raises(UserError, match="seq_length=0 must be at least 1"):
        next(validation.windows(0))
    with pytest.raises(UserError, match="tokens_per_batch=7 must be at least seq_length=8"):
        next(validation.micro_batches(8, tokens_per_batch=7))
