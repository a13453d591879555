"""Samples: document boundaries against a naive Python stream, blending, and what prepared folders hold."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalite.config import IGNORE_INDEX, DatasetSpec
from megalite.data.dataset import BlendedDataset, PreparedDataset, load_datasets
from megalite.errors import UserError
from tests.data.build import EOD, VOCAB, prepared_dataset, random_documents, stream_of

DOCUMENT = st.lists(st.integers(1, VOCAB - 1), min_size=0, max_size=7)


def naive_piece(
    documents: list[list[int]], start: int, seq_length: int
) -> tuple[list[int], list[int], list[int]]:
    """(tokens, labels, boundaries) by walking the circular stream token by token."""
    stream = [
        (token, number, place) for number, doc in enumerate(documents) for place, token in enumerate(doc)
    ]
    ring = [stream[(start + i) % len(stream)] for i in range(seq_length + 1)]
    tokens, labels, boundaries = [], [], [0]
    for i in range(seq_length):
        token, number, place = ring[i]
        tokens.append(token)
        is_last = place == len(documents[number]) - 1
        labels.append(IGNORE_INDEX if is_last and token != EOD else ring[i + 1][0])
        if is_last and token == EOD:
            boundaries.append(i)  # this EOD begins the next document's segment
        if is_last and token != EOD:
            boundaries.append(i + 1)  # the next document's first token begins its segment
    return tokens, labels, sorted({b for b in boundaries if b < seq_length})


@settings(max_examples=150, deadline=None)
@given(
    bodies=st.lists(st.tuples(DOCUMENT, st.booleans()), min_size=1, max_size=6),
    seq_length=st.integers(1, 12),
    position=st.floats(0, 1, exclude_max=True),
)
def test_pieces_against_a_naive_stream(
    tmp_path_factory: pytest.TempPathFactory,
    bodies: list[tuple[list[int], bool]],
    seq_length: int,
    position: float,
):
    """Documents with and without a closing EOD, empty ones, and pieces around the end of the stream."""
    documents = [[*body, EOD] if closed else body for body, closed in bodies]
    total = sum(map(len, documents))
    if total < seq_length:
        documents = [*documents, [1] * seq_length]
        total += seq_length
    stream = stream_of(tmp_path_factory.mktemp("stream") / "d", documents)
    start = int(position * total)
    tokens, labels, boundaries, first, last = stream.cut(start, seq_length)
    expected = naive_piece(documents, start, seq_length)
    assert (tokens.tolist(), labels.tolist(), boundaries.tolist()) == expected
    owner = [number for number, document in enumerate(documents) for _ in document]
    assert (first, last) == (owner[start], owner[(start + seq_length - 1) % total])


def test_labels_at_boundaries(tmp_path: Path):
    """The EOD before a document predicts its first token, within that document's segment."""
    stream = stream_of(tmp_path / "d", [[11, 12, EOD], [21, EOD], [31, 32, 33, EOD]])
    tokens, labels, boundaries, _, _ = stream.cut(0, 8)
    assert tokens.tolist() == [11, 12, EOD, 21, EOD, 31, 32, 33]
    assert labels.tolist() == [12, EOD, 21, EOD, 31, 32, 33, EOD]
    assert boundaries.tolist() == [0, 2, 4]


def test_foreign_documents_without_eod(tmp_path: Path):
    """No label crosses from one document to the next."""
    stream = stream_of(tmp_path / "d", [[11, 12], [21, 22, 23]])
    _, labels, boundaries, _, _ = stream.cut(0, 5)
    assert labels.tolist() == [12, IGNORE_INDEX, 22, 23, IGNORE_INDEX]
    assert boundaries.tolist() == [0, 2]


def test_tokens_of_another_vocabulary(tmp_path: Path):
    stream = stream_of(tmp_path / "d", [[1, 2, VOCAB, 3]])
    with pytest.raises(
        UserError, match=r"d\.bin: token 1000 at byte 4 is not below the vocabulary size 1000"
    ):
        stream.cut(0, 4)


def test_an_epoch_reads_every_token_once(tmp_path: Path):
    documents = random_documents(40, 30, seed=1)
    dataset = BlendedDataset([stream_of(tmp_path / "d", documents)], [1.0], seq_length=8, seed=3)
    size = dataset.orders[0].samples_per_epoch
    for epoch in range(2):
        starts = [dataset.sample(epoch * size + i).start for i in range(size)]
        total = sum(map(len, documents))
        assert len({(start + i) % total for start in starts for i in range(8)}) == size * 8


def test_blend_gives_each_dataset_its_share_in_its_own_order(tmp_path: Path):
    streams = [stream_of(tmp_path / name, random_documents(50, 30, seed=i)) for i, name in enumerate("ab")]
    blended = BlendedDataset(streams, [3.0, 1.0], seq_length=16, seed=9)
    samples = [blended.sample(n) for n in range(400)]
    assert abs(sum(s.dataset == 0 for s in samples) - 300) <= 2
    for number in range(2):
        own = [s for s in samples if s.dataset == number]
        assert [s.index for s in own] == list(range(len(own)))
        assert [s.start for s in own] == [blended.orders[number].start(i) for i in range(len(own))]
    assert blended.epochs(400)[1] == pytest.approx(100 / blended.orders[1].samples_per_epoch, rel=0.03)


def test_sample_is_a_function_of_seed_and_number(tmp_path: Path):
    stream = stream_of(tmp_path / "d", random_documents(50, 30, seed=1))
    one, two = (BlendedDataset([stream], [1.0], seq_length=16, seed=4) for _ in range(2))
    order = [5, 3, 10**9, 5, 0]
    assert [one.sample(n).start for n in order] == [two.sample(n).start for n in reversed(order)][::-1]
    other = BlendedDataset([stream], [1.0], seq_length=16, seed=5)
    assert [one.sample(n).start for n in range(9)] != [other.sample(n).start for n in range(9)]


def test_load_datasets(tmp_path: Path):
    prepared_dataset(tmp_path / "a", random_documents(20, 20, seed=1))
    prepared_dataset(tmp_path / "b", random_documents(20, 20, seed=2))
    specs = [DatasetSpec(path=str(tmp_path / "a")), DatasetSpec(path=str(tmp_path / "b"), weight=0.5)]
    dataset = load_datasets(specs, seq_length=8, seed=1)
    assert {dataset.sample(n).dataset for n in range(20)} == {0, 1}
    with pytest.raises(UserError, match=r"cannot fill one sample of train\.seq_length=100000"):
        load_datasets(specs, seq_length=100_000, seed=1)
    with pytest.raises(UserError, match=r"data.datasets is empty"):
        load_datasets([], seq_length=8, seed=1)


def test_datasets_must_share_their_tokenizer(tmp_path: Path):
    prepared_dataset(tmp_path / "a", [[1, 2, 0]])
    prepared_dataset(tmp_path / "b", [[1, 2, 0]], fingerprint="e" * 64)
    with pytest.raises(UserError, match=r"b was encoded with tokenizer eeeeeeeeeeee.*ffffffffffff"):
        load_datasets([DatasetSpec(path=str(tmp_path / n)) for n in "ab"], seq_length=2, seed=1)


def test_unusable_folders(tmp_path: Path):
    with pytest.raises(UserError, match=r"nowhere is not a prepared dataset \(no dataset.json\)"):
        PreparedDataset(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="file is not a prepared dataset"):
        PreparedDataset(tmp_path / "file")
    prepared_dataset(tmp_path / "a", [[1, 2, 0]])
    info = tmp_path / "a" / "dataset.json"
    good = json.loads(info.read_text())
    for change, message in (
        ({"format": "other"}, "does not describe a megalite dataset"),
        ({"version": 99}, "has version 99, this program reads 1"),
        ({"eod_id": None, "splits": None}, "lacks eod_id, splits"),
    ):
        info.write_text(json.dumps({k: v for k, v in {**good, **change}.items() if v is not None}))
        with pytest.raises(UserError, match=message):
            PreparedDataset(tmp_path / "a")
    info.write_text('{"format": "mega')
    with pytest.raises(UserError, match=r"dataset\.json is not JSON"):
        PreparedDataset(tmp_path / "a")


def test_files_that_disagree_with_the_description(tmp_path: Path):
    folder = prepared_dataset(tmp_path / "a", [[1, 2, 0], [3, 0]])
    other = prepared_dataset(tmp_path / "b", [[1, 2, 0]])
    for suffix in ("bin", "idx"):
        (tmp_path / "a" / f"train.{suffix}").write_bytes((tmp_path / "b" / f"train.{suffix}").read_bytes())
    with pytest.raises(UserError, match=r"holds 1 documents and 3 tokens, but .* says 2 and 5"):
        folder.reader("train")
    np.save(tmp_path / "b" / "train.documents.npy", np.zeros(1))
    with pytest.raises(UserError, match="does not hold one record per document"):
        other.documents("train")
    (tmp_path / "b" / "train.documents.npy").unlink()
    with pytest.raises(UserError, match=r"train.documents.npy cannot be read"):
        other.documents("train")


def test_files_are_found_by_number(tmp_path: Path):
    folder = prepared_dataset(tmp_path / "a", [[1, 2, 0]])
    lines = [{"path": f"{i}.txt", "source": "text", "unit": "byte"} for i in range(5)]
    (tmp_path / "a" / "files.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert {n: entry["path"] for n, entry in folder.files([3, 0, 3]).items()} == {0: "0.txt", 3: "3.txt"}
    with pytest.raises(UserError, match=r"files.jsonl has no entry 5"):
        folder.files([5])
