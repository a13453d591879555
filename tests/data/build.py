"""Small prepared datasets for tests, written without the preparation: tests say exactly what is in them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megalite.data.dataset import DOCUMENT_RECORD, FORMAT_VERSION, PreparedDataset, TokenStream
from megalite.data.indexed import IndexedReader, IndexedWriter

EOD = 0
VOCAB = 1000


def write_pair(prefix: Path, documents: Sequence[Sequence[int]]) -> IndexedReader:
    """A token pair of these documents, exactly as given."""
    with IndexedWriter(prefix, np.uint16) as writer:
        for document in documents:
            writer.add_document(document)
    return IndexedReader(prefix)


def stream_of(prefix: Path, documents: Sequence[Sequence[int]]) -> TokenStream:
    """The token stream of these documents, exactly as given."""
    return TokenStream(write_pair(prefix, documents), eod_id=EOD, vocab_size=VOCAB)


def random_documents(count: int, longest: int, seed: int) -> list[list[int]]:
    """Documents of 1 … longest random tokens, none of them EOD, and a closing EOD."""
    random = np.random.default_rng(seed)
    lengths = random.integers(1, longest + 1, count)
    return [[*random.integers(1, VOCAB, length).tolist(), EOD] for length in lengths]


def prepared_dataset(
    folder: Path,
    train: Sequence[Sequence[int]],
    validation: Sequence[Sequence[int]] = (),
    *,
    sources: Sequence[str] = ("text",),
    validation_sources: Sequence[int] = (),
    fingerprint: str = "f" * 64,
) -> PreparedDataset:
    """A dataset folder (without a tokenizer); a document of n tokens is said to have 3 n bytes."""
    folder.mkdir()
    splits = {}
    for split, documents in (("train", train), ("validation", validation)):
        write_pair(folder / split, documents)
        records = np.zeros(len(documents), DOCUMENT_RECORD)
        records["bytes"] = [3 * len(document) for document in documents]
        if split == "validation" and len(validation_sources):
            records["source"] = validation_sources
        np.save(folder / f"{split}.documents.npy", records)
        counts = {
            "documents": len(documents),
            "tokens": sum(map(len, documents)),
            "bytes": int(records["bytes"].sum()),
        }
        splits[split] = {**counts, "sources": dict.fromkeys(sources, counts)}
    info = {
        "format": "megalite-dataset",
        "version": FORMAT_VERSION,
        "tokenizer_fingerprint": fingerprint,
        "vocab_size": VOCAB,
        "eod_id": EOD,
        "eod_token": "<|endoftext|>",
        "sources": list(sources),
        "splits": splits,
    }
    (folder / "dataset.json").write_text(json.dumps(info))
    (folder / "files.jsonl").write_text(
        json.dumps({"path": "a.txt", "source": sources[0], "unit": "byte"}) + "\n"
    )
    return PreparedDataset(folder)
