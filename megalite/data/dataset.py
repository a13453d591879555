"""Prepared dataset folders, and the samples of a training run drawn from them.

A folder holds ``train.bin/.idx``, ``validation.bin/.idx``, ``train.documents.npy`` and
``validation.documents.npy`` (one `DOCUMENT_RECORD` per document), ``files.jsonl``, ``tokenizer.json`` and
``dataset.json``.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from megalite.config import IGNORE_INDEX, DatasetSpec
from megalite.data.indexed import Array, IndexedReader
from megalite.data.order import Blend, StreamOrder, key
from megalite.data.tokenize import FILE_NAME as TOKENIZER_FILE
from megalite.data.tokenize import Tokenizer
from megalite.errors import UserError

Split = Literal["train", "validation"]
SPLITS: tuple[Split, Split] = ("train", "validation")
INFO_FILE = "dataset.json"
FILES_FILE = "files.jsonl"
FORMAT_VERSION = 1
DOCUMENT_RECORD = np.dtype([("source", "<u2"), ("file", "<u4"), ("position", "<u8"), ("bytes", "<u8")])
"""Where a document came from: source and file number, position in the file (a line, row or byte offset: the
file's entry in files.jsonl says which), and its length in UTF-8 bytes."""


@dataclass(frozen=True, slots=True)
class SplitInfo:
    """Totals of one split, or of one source within it."""

    documents: int
    tokens: int
    bytes: int
    """UTF-8 bytes of text; end-of-document tokens stand for none."""


class PreparedDataset:
    """One prepared folder: what dataset.json says, and access to its files.

    Raises:
        UserError: the folder is missing, unfinished, of another version, or its files disagree with
        dataset.json.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.info = _read_info(self.path)
        self.sources: list[str] = self.info["sources"]
        self.eod_id: int = self.info["eod_id"]
        self.eod_token: str = self.info["eod_token"]
        self.vocab_size: int = self.info["vocab_size"]
        self.tokenizer_fingerprint: str = self.info["tokenizer_fingerprint"]

    def split(self, split: Split) -> SplitInfo:
        """Totals of a split."""
        return _totals(self.info["splits"][split])

    def split_of_source(self, split: Split, source: str) -> SplitInfo:
        """Totals of one source within a split."""
        return _totals(self.info["splits"][split]["sources"][source])

    def tokenizer(self) -> Tokenizer:
        """The tokenizer stored beside the data.

        Raises:
            UserError: the file is not the one the data was encoded with.
        """
        tokenizer = Tokenizer.load(self.path / TOKENIZER_FILE, eod_token=self.eod_token)
        if tokenizer.fingerprint != self.tokenizer_fingerprint:
            raise UserError(
                f"{self.path / TOKENIZER_FILE} has fingerprint {tokenizer.fingerprint[:12]}, but the data "
                f"was encoded with {self.tokenizer_fingerprint[:12]}: restore the file or prepare again"
            )
        return tokenizer

    def reader(self, split: Split) -> IndexedReader:
        """The token files of a split, checked against dataset.json."""
        reader = IndexedReader(self.path / split)
        expected = self.split(split)
        if (reader.documents, reader.tokens) != (expected.documents, expected.tokens):
            raise UserError(
                f"{reader.idx_path} holds {reader.documents} documents and {reader.tokens} tokens, but "
                f"{self.path / INFO_FILE} says {expected.documents} and {expected.tokens}: prepare it again"
            )
        return reader

    def documents(self, split: Split) -> Array:
        """The `DOCUMENT_RECORD` of every document of a split, memory-mapped."""
        path = self.path / f"{split}.documents.npy"
        try:
            records = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read: {error}") from None
        if records.dtype != DOCUMENT_RECORD or records.shape != (self.split(split).documents,):
            raise UserError(f"{path} does not hold one record per document: prepare the dataset again")
        return records

    def files(self, numbers: Iterable[int]) -> dict[int, dict[str, str]]:
        """Entries of files.jsonl (`path`, `source`, `unit`) by file number, read without loading the rest."""
        wanted = sorted(set(numbers))
        entries: dict[int, dict[str, str]] = {}
        with open(self.path / FILES_FILE, encoding="utf-8") as lines:
            previous = -1
            for number in wanted:
                line = next(itertools.islice(lines, number - previous - 1, None), None)
                if line is None:
                    raise UserError(
                        f"{self.path / FILES_FILE} has no entry {number}: prepare the dataset again"
                    )
                entries[number] = json.loads(line)
                previous = number
        return entries


def _totals(entry: dict[str, Any]) -> SplitInfo:
    return SplitInfo(documents=entry["documents"], tokens=entry["tokens"], bytes=entry["bytes"])


def _read_info(path: Path) -> dict[str, Any]:
    file = path / INFO_FILE
    try:
        info = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{path} is not a prepared dataset (no {INFO_FILE}): make one with "
            f"`megalite data prepare INPUT --output {path}`"
        ) from None
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error}): prepare the dataset again") from None
    if not isinstance(info, dict) or info.get("format") != "megalite-dataset":
        raise UserError(f"{file} does not describe a megalite dataset")
    if info.get("version") != FORMAT_VERSION:
        raise UserError(f"{file} has version {info.get('version')}, this program reads {FORMAT_VERSION}")
    needed = {"tokenizer_fingerprint", "vocab_size", "eod_id", "eod_token", "splits", "sources"}
    if missing := sorted(needed - info.keys()):
        raise UserError(f"{file} lacks {', '.join(missing)}: prepare the dataset again")
    return info


@dataclass(frozen=True, slots=True)
class Sample:
    """S consecutive tokens of a dataset's stream, and the tokens that follow each of them."""

    tokens: npt.NDArray[np.int64]
    """[S]"""
    labels: npt.NDArray[np.int64]
    """[S]: the next token, or IGNORE_INDEX where it belongs to another document."""
    boundaries: npt.NDArray[np.int64]
    """Positions where a segment starts, ascending, the first is 0."""
    dataset: int
    """Which dataset of the blend."""
    index: int
    """Sample number within that dataset."""
    start: int
    """Stream position of the first token."""
    first_document: int
    """Document that holds the first token."""
    last_document: int
    """Document that holds the last token; less than first_document where the stream wraps around."""


class TokenStream:
    """The circular token stream of one ``.bin/.idx`` pair and the documents in it.

    A *segment* is what one document contributes to a sample. It starts at the end-of-document token before
    the document, which thereby serves as the document's first input: its label, the document's first token,
    is a prediction from nothing else. A document that does not end in that token (files written by other
    programs) ends its segment itself, and the label across the boundary is IGNORE_INDEX.

    Args:
        reader: the token files.
        eod_id: end-of-document token; None if the files have none.
        vocab_size: tokens must be below it.
    """

    def __init__(self, reader: IndexedReader, *, eod_id: int | None, vocab_size: int) -> None:
        self.reader = reader
        self.eod_id = -1 if eod_id is None else eod_id
        self.vocab_size = vocab_size

    def read(self, start: int, length: int) -> npt.NDArray[np.int64]:
        """`length` tokens from stream position `start` on, around the end of the stream as often as needed.

        Raises:
            UserError: a token is not below vocab_size.
        """
        out = np.empty(length, dtype=np.int64)
        done = 0
        while done < length:
            position = (start + done) % self.reader.tokens
            part = self.reader.stream[position : position + length - done]
            out[done : done + part.size] = part
            done += part.size
        if length and (int(out.max()) >= self.vocab_size or int(out.min()) < 0):
            bad = int(np.argmax((out >= self.vocab_size) | (out < 0)))
            offset = (start + bad) % self.reader.tokens * self.reader.dtype.itemsize
            raise UserError(
                f"{self.reader.bin_path}: token {int(out[bad])} at byte {offset} is not below the vocabulary "
                f"size {self.vocab_size}: the file does not belong to this tokenizer"
            )
        return out

    def cut(self, start: int, seq_length: int) -> tuple[Array, Array, Array, int, int]:
        """(tokens [S], labels [S], boundaries, first document, last document) of the piece at `start`."""
        window = self.read(start, seq_length + 1)
        ends, first, last = self._document_ends(start, seq_length)
        tokens, labels = window[:-1], window[1:].copy()
        closed = window[ends - 1] == self.eod_id
        open_ends = ends[~closed]
        labels[open_ends - 1] = IGNORE_INDEX
        starts = np.concatenate(([0], ends[closed] - 1, open_ends))
        return tokens, labels, np.unique(starts[starts < seq_length]), first, last

    def _document_ends(self, start: int, seq_length: int) -> tuple[npt.NDArray[np.int64], int, int]:
        """Document ends (exclusive, relative to `start`) in 1 … S of a piece, and its outer documents."""
        reader = self.reader
        first = reader.locate(start)
        parts, base, document = [], -start, first
        while True:
            limit = seq_length - base
            inside = min(limit, reader.tokens) - 1
            last = reader.locate(inside)
            parts.append(self._ends(document, last + 1) + base)
            if limit <= reader.tokens:
                break
            base, document = base + reader.tokens, 0
        ends = np.concatenate(parts)
        return ends[(ends >= 1) & (ends <= seq_length)], first, last

    def _ends(self, first: int, last: int) -> npt.NDArray[np.int64]:
        """Stream positions one past the last token of documents first … last - 1."""
        starts = self.reader.document_starts(first + 1, last)
        return np.append(starts, self.reader.document_start(last))


class BlendedDataset:
    """Samples of one or several datasets: `sample(n)` is a pure function of (seed, n).

    Args:
        streams: token stream of each dataset.
        weights: relative share of samples of each.
        seq_length: tokens per sample (S).
        seed: key of the order.
        prepared: the folders the streams come from, for provenance; empty for bare streams.
    """

    def __init__(
        self,
        streams: Sequence[TokenStream],
        weights: Sequence[float],
        *,
        seq_length: int,
        seed: int,
        prepared: Sequence[PreparedDataset] = (),
    ) -> None:
        self.streams = list(streams)
        self.seq_length = seq_length
        self.seed = seed
        self.prepared = list(prepared)
        self.blend = Blend(tuple(weights), seed)
        self.orders = [
            StreamOrder(stream.reader.tokens, seq_length, key(seed, number))
            for number, stream in enumerate(streams)
        ]

    def locate(self, n: int) -> tuple[int, int, int]:
        """(dataset, sample number within it, stream position) of sample n."""
        dataset, index = self.blend(n)
        return dataset, index, self.orders[dataset].start(index)

    def sample(self, n: int) -> Sample:
        """Sample number n ≥ 0 of the run."""
        dataset, index, start = self.locate(n)
        tokens, labels, boundaries, first, last = self.streams[dataset].cut(start, self.seq_length)
        return Sample(
            tokens=tokens,
            labels=labels,
            boundaries=boundaries,
            dataset=dataset,
            index=index,
            start=start,
            first_document=first,
            last_document=last,
        )

    def epochs(self, samples: int) -> list[float]:
        """How often each dataset has been read after the samples 0 … samples - 1."""
        counts = (self.blend.count(number, samples) for number in range(len(self.orders)))
        return [count / order.samples_per_epoch for count, order in zip(counts, self.orders, strict=True)]


def open_prepared(specs: Sequence[DatasetSpec]) -> list[PreparedDataset]:
    """The folders of a blend, which must share one tokenizer.

    Raises:
        UserError: none is given, one cannot be read, or the tokenizers differ.
    """
    if not specs:
        raise UserError(
            "data.datasets is empty: name a prepared dataset folder (megalite data prepare makes one)"
        )
    prepared = [PreparedDataset(spec.path) for spec in specs]
    first = prepared[0]
    for other in prepared[1:]:
        if other.tokenizer_fingerprint != first.tokenizer_fingerprint:
            raise UserError(
                f"{other.path} was encoded with tokenizer {other.tokenizer_fingerprint[:12]}, {first.path} "
                f"with {first.tokenizer_fingerprint[:12]}: prepare both with the same --tokenizer"
            )
    return prepared


def load_datasets(
    specs: Sequence[DatasetSpec], *, seq_length: int, seed: int, split: Split = "train"
) -> BlendedDataset:
    """The samples of a run from prepared folders.

    Raises:
        UserError: see `open_prepared` and `IndexedReader`; a dataset shorter than one sample.
    """
    prepared = open_prepared(specs)
    streams = [
        TokenStream(folder.reader(split), eod_id=folder.eod_id, vocab_size=folder.vocab_size)
        for folder in prepared
    ]
    weights = [spec.weight for spec in specs]
    return BlendedDataset(streams, weights, seq_length=seq_length, seed=seed, prepared=prepared)
