"""A prepared dataset of random tokens: speed does not depend on what a text says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from megalite.data.dataset import DOCUMENT_RECORD
from megalite.data.indexed import IndexedWriter
from megalite.data.tokenize import Tokenizer


def write_made_up_data(folder: Path, *, vocab_size: int, tokens: int, document_tokens: int = 0) -> Path:
    """Write a dataset whose every token id is equally likely, with a tokenizer of bytes only.

    Args:
        folder: does not exist yet.
        vocab_size: ids are below it; at least 257.
        tokens: of the training split, at least.
        document_tokens: mean length of a document (lengths are geometric), at whose end attention ends; 0 makes one
            document of everything, so that attention does all the work that the causal convention counts.

    Raises:
        ValueError: the vocabulary is smaller than the tokenizer's.
    """
    if vocab_size < 257:
        raise ValueError(f"vocab_size={vocab_size} must be at least the 257 of a tokenizer of bytes")
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    tokenizer = Tokenizer.train(["made up"], vocab_size=257)
    splits = {}
    for name, least in (("train", tokens), ("validation", 2000)):
        lengths = np.array([least])
        if document_tokens:
            lengths = generator.geometric(1 / document_tokens, size=2 * (1 + least // document_tokens))
            lengths = np.append(lengths, max(1, least - lengths.sum()))
        with IndexedWriter(folder / name, np.int32) as writer:
            for length in lengths:
                body = generator.integers(0, vocab_size, size=int(length), dtype=np.int32)
                body[body == tokenizer.eod_id] = (tokenizer.eod_id + 1) % vocab_size
                writer.add_document(np.append(body, tokenizer.eod_id))
            total = {"documents": writer.documents, "tokens": writer.tokens, "bytes": writer.tokens}
        np.save(folder / f"{name}.documents.npy", np.zeros(total["documents"], DOCUMENT_RECORD))
        splits[name] = {**total, "sources": {"random": total}}
    tokenizer.save(folder / "tokenizer.json")
    (folder / "files.jsonl").write_text("{}\n", encoding="utf-8")
    info = {
        "format": "megalite-dataset",
        "version": 1,
        "sources": ["random"],
        "eod_id": tokenizer.eod_id,
        "eod_token": tokenizer.eod_token,
        "vocab_size": vocab_size,  # of the ids, more than the tokenizer can spell
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "splits": splits,
    }
    (folder / "dataset.json").write_text(json.dumps(info), encoding="utf-8")
    return folder
