"""What is in a prepared dataset, and which documents a training step reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megalite.data.dataset import SPLITS, BlendedDataset, PreparedDataset, Split
from megalite.data.indexed import CHUNK
from megalite.errors import UserError


@dataclass(frozen=True, slots=True)
class Histogram:
    """Documents by length in powers of two of tokens."""

    counts: dict[int, int]
    """Upper bound (exclusive, a power of two) → documents."""
    longest: int
    """Document number of the longest one; -1 if there is none."""
    longest_tokens: int


def length_histogram(dataset: PreparedDataset, split: Split) -> Histogram:
    """Lengths of a split's documents, in constant memory."""
    reader = dataset.reader(split)
    counts: dict[int, int] = {}
    longest, longest_tokens = -1, -1
    for first in range(0, reader.documents, CHUNK):
        last = min(first + CHUNK, reader.documents)
        starts = np.append(reader.document_starts(first, last), reader.document_start(last))
        lengths = np.diff(starts)
        place = int(np.argmax(lengths))
        if lengths[place] > longest_tokens:
            longest, longest_tokens = first + place, int(lengths[place])
        # frexp's exponent of n is the number of bits of n: exact below 2⁵³.
        bits, numbers = np.unique(np.frexp(lengths.astype(np.float64))[1], return_counts=True)
        for exponent, number in zip(bits.tolist(), numbers.tolist(), strict=True):
            counts[2**exponent] = counts.get(2**exponent, 0) + number
    return Histogram(
        counts=dict(sorted(counts.items())), longest=longest, longest_tokens=max(longest_tokens, 0)
    )


def inspect(dataset: PreparedDataset) -> dict[str, Any]:
    """Totals, bytes per token, longest document and length histogram of both splits, as plain values.

    Opening the files checks their sizes and indices against each other and against dataset.json, and the
    tokenizer against its fingerprint.
    """
    dataset.tokenizer()
    report: dict[str, Any] = {
        "path": str(dataset.path),
        "tokenizer_fingerprint": dataset.tokenizer_fingerprint,
        "vocab_size": dataset.vocab_size,
        "eod_id": dataset.eod_id,
        "sources": dataset.sources,
        "splits": {},
    }
    for split in SPLITS:
        totals, histogram = dataset.split(split), length_histogram(dataset, split)
        dataset.documents(split)
        report["splits"][split] = {
            "documents": totals.documents,
            "tokens": totals.tokens,
            "bytes": totals.bytes,
            "bytes_per_token": totals.bytes / totals.tokens if totals.tokens else None,
            "longest_document": histogram.longest,
            "longest_document_tokens": histogram.longest_tokens,
            "documents_shorter_than": histogram.counts,
            "sources": dataset.info["splits"][split]["sources"],
        }
    for name in ("duplicates", "empty_documents", "skipped_inputs", "speed"):
        report[name] = dataset.info.get(name)
    return report


def document_report(dataset: PreparedDataset, split: Split, document: int) -> dict[str, Any]:
    """One document: where it came from, its token ids, and its decoded text.

    Raises:
        UserError: there is no such document.
    """
    reader = dataset.reader(split)
    tokens = reader.document(document)
    ids = tokens.tolist()
    text_ids = ids[:-1] if ids and ids[-1] == dataset.eod_id else ids
    return {
        **_origin(dataset, split, [document])[0],
        "tokens": ids,
        "text": dataset.tokenizer().decode(text_ids),
    }


def documents_of_samples(
    dataset: BlendedDataset, first_sample: int, num_samples: int
) -> list[dict[str, Any]]:
    """Where each of the samples first_sample … first_sample + num_samples - 1 comes from.

    Returns:
        One entry a sample: `sample`, `dataset` (folder), `index` (sample number within it), `start` (stream
        position of its first token), and `documents`, its documents in order.

    Raises:
        UserError: the dataset was not opened from prepared folders.
    """
    if not dataset.prepared:
        raise UserError("only samples of prepared dataset folders have recorded documents")
    entries = []
    for n in range(first_sample, first_sample + num_samples):
        sample = dataset.sample(n)
        prepared = dataset.prepared[sample.dataset]
        numbers = _documents_between(
            sample.first_document, sample.last_document, prepared.split("train").documents
        )
        entries.append(
            {
                "sample": n,
                "dataset": str(prepared.path),
                "index": sample.index,
                "start": sample.start,
                "documents": _origin(prepared, "train", numbers),
            }
        )
    return entries


def _documents_between(first: int, last: int, total: int) -> list[int]:
    """Documents first … last of a circular stream."""
    if first <= last:
        return list(range(first, last + 1))
    return [*range(first, total), *range(last + 1)]


def _origin(dataset: PreparedDataset, split: Split, numbers: Sequence[int]) -> list[dict[str, Any]]:
    """Source, file, place in the file and bytes of documents of one split."""
    records = dataset.documents(split)
    wanted = [records[number] for number in numbers]
    files = dataset.files(int(record["file"]) for record in wanted)
    return [
        {
            "document": number,
            "split": split,
            "source": dataset.sources[int(record["source"])],
            "file": files[int(record["file"])]["path"],
            files[int(record["file"])]["unit"]: int(record["position"]),
            "bytes": int(record["bytes"]),
        }
        for number, record in zip(numbers, wanted, strict=True)
    ]
