"""First pass over the input: the content hash and length of every document, spilled to disk."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from megalite.data.documents import CorruptInputError, ReadOptions
from megalite.data.files import read_json, write_json
from megalite.data.indexed import Array
from megalite.data.plan import Unit, read_unit

HASH_RECORD = np.dtype([("dedup", "<u8"), ("split", "<u8"), ("bytes", "<u4")])
"""Two independent halves of a document's 128-bit content hash, and its length in UTF-8 bytes."""
SORTED_RECORD = np.dtype([("dedup", "<u8"), ("split", "<u8"), ("bytes", "<u4"), ("index", "<u4")])
"""The same sorted by hash within a run, with the document's place in the run."""
RUN = 1 << 18
"""Documents sorted at once (6 MiB of records)."""
MESSAGES_KEPT = 20
"""Skipped inputs reported in full per unit; all are counted."""


@dataclass(frozen=True, slots=True)
class ScanTask:
    """One unit to scan into `folder`."""

    unit: Unit
    folder: str
    options: ReadOptions
    skip_bad: bool


@dataclass(slots=True)
class ScanResult:
    """What was found in one unit."""

    signature: str = ""
    """`Unit.signature` of what was read."""
    documents: int = 0
    bytes: int = 0
    """UTF-8 bytes of text."""
    empty: int = 0
    """Documents without any character but white space; they are left out."""
    skipped: int = 0
    """Unreadable inputs passed over."""
    messages: list[str] = field(default_factory=list)
    """The first of them, as they would have been reported."""
    empty_by_source: dict[str, int] = field(default_factory=dict)
    skipped_by_source: dict[str, int] = field(default_factory=dict)
    busy_s: float = 0.0


def content_hash(data: bytes) -> tuple[int, int]:
    """(dedup, split) halves of the 128-bit BLAKE2b hash of a document's UTF-8 text, each a u64.

    Equal texts share both halves; the validation split uses the second one only, so it is independent of
    everything else that is done with the first.
    """
    digest = hashlib.blake2b(data, digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


def is_empty(data: bytes) -> bool:
    """True for a document of white space alone."""
    return not data.strip()


def scan_unit(task: ScanTask) -> ScanResult:
    """Hash the documents of a unit; the outcome is complete once its ``.json`` exists.

    Raises:
        UserError: an input is unreadable and is not to be skipped.
    """
    began = time.process_time()
    result = ScanResult(signature=task.unit.signature)
    empty: Counter[str] = Counter()
    skipped: Counter[str] = Counter()
    prefix = Path(task.folder) / f"{task.unit.number:06d}"
    Path(f"{prefix}.json").unlink(missing_ok=True)  # of an input that changed
    current = ""

    def on_bad(error: CorruptInputError) -> None:
        if not task.skip_bad:
            raise error
        result.skipped += 1
        skipped[current] += 1
        if len(result.messages) < MESSAGES_KEPT:
            result.messages.append(str(error))

    with open(f"{prefix}.hashes", "wb") as hashes, open(f"{prefix}.sorted", "wb") as ordered:
        pending: list[tuple[int, int, int]] = []
        for file, span in task.unit.spans:
            current = str(file.source)
            for _, _, document in read_unit(Unit(task.unit.number, ((file, span),), 0), task.options, on_bad):
                if is_empty(document.data):
                    empty[current] += 1
                    continue
                pending.append((*content_hash(document.data), len(document.data)))
                result.documents += 1
                result.bytes += len(document.data)
                if len(pending) == RUN:
                    _spill(pending, hashes, ordered)
        _spill(pending, hashes, ordered)
    result.empty = sum(empty.values())
    result.empty_by_source, result.skipped_by_source = dict(empty), dict(skipped)
    result.busy_s = time.process_time() - began
    write_json(Path(f"{prefix}.json"), asdict(result))
    return result


def scan_result(folder: Path, unit: Unit) -> ScanResult | None:
    """The finished outcome of a unit, if there is one and its input is still the same."""
    stored = read_json(folder / f"{unit.number:06d}.json")
    if stored is None or stored["signature"] != unit.signature:
        return None
    return ScanResult(**stored)


def hash_chunks(folder: Path, unit: int, chunk: int = RUN) -> Iterator[Array]:
    """The `HASH_RECORD` s of a unit in document order, at most `chunk` at a time."""
    with open(folder / f"{unit:06d}.hashes", "rb") as stream:
        while data := stream.read(chunk * HASH_RECORD.itemsize):
            yield np.frombuffer(data, HASH_RECORD)


def _spill(pending: list[tuple[int, int, int]], hashes: object, ordered: object) -> None:
    """Append one run to both files and empty it."""
    records = np.array(pending, dtype=HASH_RECORD)
    by_hash = np.empty(records.size, SORTED_RECORD)
    order = np.lexsort((records["split"], records["dedup"]))
    for name in HASH_RECORD.names or ():
        by_hash[name] = records[name][order]
    by_hash["index"] = order
    hashes.write(records.tobytes())  # type: ignore[attr-defined]
    ordered.write(by_hash.tobytes())  # type: ignore[attr-defined]
    pending.clear()
