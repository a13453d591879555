"""Exact duplicates and the validation split, from spilled hashes, in bounded memory.

Hashes are handled in partitions of the hash space. Each run of the scan is sorted, so a partition is one
contiguous part of every run: all hashes are read once, and memory holds one partition.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from megalite.data.files import read_json, write_json
from megalite.data.indexed import Array
from megalite.data.scan import RUN, SORTED_RECORD
from megalite.errors import UserError

PARTITION = 1 << 19
"""Documents per partition: about 60 MiB while it is sorted."""
MAX_VALIDATION_SHARE = 0.05
"""Validation takes at most this share of the text; the single smallest eligible hash may exceed it (see
below)."""
MAX_SINGLE_SHARE = 0.2
FLAGS_FILE = "duplicates.u8"
RESULT_FILE = "dedup.json"


@dataclass(frozen=True, slots=True)
class DedupResult:
    """What is left after exact duplicates are dropped, and where the validation split is cut."""

    inputs: str
    """Signature of all input; later stages refuse any other."""
    documents: int
    """Distinct documents."""
    bytes: int
    """Their UTF-8 bytes."""
    duplicate_documents: int
    duplicate_bytes: int
    validation_threshold: int
    """A document is held out if its split hash is below this and it is not too long."""
    validation_documents: int
    validation_bytes: int


@dataclass(frozen=True, slots=True)
class SplitRule:
    """What the user asked of the validation split."""

    validation_bytes: int
    """Wanted size; 0 holds nothing out."""
    max_document_bytes: int
    """Longer documents are never held out."""


def is_validation(split_hash: int, size: int, threshold: int, max_document_bytes: int) -> bool:
    """The whole split rule: a pure function of a document's content and the threshold in dataset.json."""
    return split_hash < threshold and size <= max_document_bytes


def find_duplicates(
    folder: Path,
    documents: Sequence[int],
    rule: SplitRule,
    *,
    inputs: str,
    on_progress: Callable[[float], None],
) -> DedupResult:
    """Mark every repeated document (the first in input order stays) and choose the validation threshold.

    Args:
        folder: what the scan wrote; gets `FLAGS_FILE`, one byte per document in input order, 1 a duplicate.
        documents: documents of each unit.
        rule: the validation split wanted.
        inputs: signature of the input, kept with the outcome.
        on_progress: called with the share done.

    Raises:
        UserError: no document can be held out although validation was asked for.
    """
    base = np.concatenate(([0], np.cumsum(documents, dtype=np.int64)))
    total = int(base[-1])
    partitions = max(1, -(-total // PARTITION))
    chooser = _ThresholdChooser(rule)
    kept_documents = kept_bytes = dropped_documents = dropped_bytes = 0
    with open(folder / FLAGS_FILE, "wb") as flags:
        for first in range(0, total, PARTITION):
            flags.write(bytes(min(PARTITION, total - first)))
        for partition in range(partitions):
            records, places = _partition(folder, documents, base, partition, partitions)
            repeated = np.zeros(records.size, dtype=bool)
            same = (records["dedup"][1:] == records["dedup"][:-1]) & (
                records["split"][1:] == records["split"][:-1]
            )
            repeated[1:] = same
            for place in places[repeated].tolist():
                flags.seek(place)
                flags.write(b"\x01")
            kept = records[~repeated]
            kept_documents += kept.size
            kept_bytes += int(kept["bytes"].sum(dtype=np.int64))
            dropped_documents += records.size - kept.size
            dropped_bytes += int(records["bytes"][repeated].sum(dtype=np.int64))
            chooser.add(kept)
            on_progress((partition + 1) / partitions)
        flags.flush()
        os.fsync(flags.fileno())
    threshold, held_documents, held_bytes = chooser.choose(kept_bytes)
    result = DedupResult(
        inputs=inputs,
        documents=kept_documents,
        bytes=kept_bytes,
        duplicate_documents=dropped_documents,
        duplicate_bytes=dropped_bytes,
        validation_threshold=threshold,
        validation_documents=held_documents,
        validation_bytes=held_bytes,
    )
    write_json(folder / RESULT_FILE, asdict(result))
    return result


def dedup_result(folder: Path) -> DedupResult | None:
    """The finished outcome, if there is one."""
    stored = read_json(folder / RESULT_FILE)
    return None if stored is None else DedupResult(**stored)


class _ThresholdChooser:
    """Finds the threshold below which eligible documents amount to the wanted bytes.

    Only the smallest hashes can matter, and only as many as fill the wanted size: the rest is dropped after
    each partition.
    """

    def __init__(self, rule: SplitRule) -> None:
        self._rule = rule
        self._smallest = np.empty(0, dtype=[("split", "<u8"), ("bytes", "<u4")])

    def add(self, records: Array) -> None:
        """Consider the distinct documents of one partition."""
        eligible = records[records["bytes"] <= self._rule.max_document_bytes]
        new = np.empty(eligible.size, dtype=self._smallest.dtype)
        new["split"], new["bytes"] = eligible["split"], eligible["bytes"]
        merged = np.concatenate((self._smallest, new))
        merged = merged[np.argsort(merged["split"], kind="stable")]
        filled = np.cumsum(merged["bytes"], dtype=np.int64)
        # One document more than fits, since its hash is the threshold.
        self._smallest = merged[: int(np.searchsorted(filled, self._rule.validation_bytes, side="right")) + 1]

    def choose(self, corpus_bytes: int) -> tuple[int, int, int]:
        """(threshold, documents, bytes) of the held-out part of a corpus of `corpus_bytes`."""
        if self._rule.validation_bytes == 0:
            return 0, 0, 0
        wanted = min(self._rule.validation_bytes, int(corpus_bytes * MAX_VALIDATION_SHARE))
        filled = np.cumsum(self._smallest["bytes"], dtype=np.int64)
        count = int(np.searchsorted(filled, wanted, side="right"))
        if count == 0 and filled.size and filled[0] <= corpus_bytes * MAX_SINGLE_SHARE:
            count = 1  # a corpus of few documents: one held-out document is better than none
        if count == 0:
            raise UserError(
                "no document can be held out for validation: none of at most "
                f"{self._rule.max_document_bytes} bytes is small beside the {corpus_bytes} bytes. Use "
                "a smaller --max-document-bytes (long texts are cut there), a larger "
                "--validation-max-document-bytes, more text, or --validation-bytes 0"
            )
        hashes = self._smallest["split"]
        threshold = int(hashes[count]) if count < hashes.size else int(hashes[count - 1]) + 1
        below = hashes < threshold  # equal hashes of different texts fall on one side together
        return threshold, int(below.sum()), int(self._smallest["bytes"][below].sum(dtype=np.int64))


def _partition(
    folder: Path, documents: Sequence[int], base: Array, partition: int, partitions: int
) -> tuple[Array, Array]:
    """Records of one partition sorted by (hash, place), and the places in input order."""
    low, high = (edge * 2**64 // partitions for edge in (partition, partition + 1))
    parts, places = [], []
    for unit, count in enumerate(documents):
        if count == 0:
            continue
        records = np.memmap(folder / f"{unit:06d}.sorted", SORTED_RECORD, mode="r", shape=(count,))
        for first in range(0, count, RUN):
            run = records[first : first + RUN]
            part = np.array(run[_first_at_least(run, low) : _first_at_least(run, high)])
            parts.append(part)
            places.append(base[unit] + first + part["index"].astype(np.int64))
    if not parts:
        return np.empty(0, SORTED_RECORD), np.empty(0, np.int64)
    merged, place = np.concatenate(parts), np.concatenate(places)
    order = np.lexsort((place, merged["split"], merged["dedup"]))
    return merged[order], place[order]


def _first_at_least(run: Array, value: int) -> int:
    """Index of the first record of a sorted run whose hash is at least `value`.

    (np.searchsorted would copy the strided column of the mapped file into memory.)
    """
    low, high = 0, run.size
    while low < high:
        middle = (low + high) // 2
        if int(run["dedup"][middle]) < value:
            low = middle + 1
        else:
            high = middle
    return low
