"""Later passes over the input: which documents are used, and the tokens of each."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megalite.data.dataset import DOCUMENT_RECORD, SPLITS, Split
from megalite.data.dedup import FLAGS_FILE, is_validation
from megalite.data.documents import CorruptInputError, Document, ReadOptions
from megalite.data.files import read_json, write_json
from megalite.data.indexed import Array, token_dtype
from megalite.data.plan import Unit, read_unit
from megalite.data.scan import content_hash, hash_chunks, is_empty
from megalite.data.tokenize import Tokenizer
from megalite.errors import UserError

BATCH_BYTES = 1 << 18
"""Text encoded at once: the tokenizer keeps about a hundred bytes per token until it is done."""
RECORDS_READ = 1 << 16
ENCODED_RECORD = np.dtype([("tokens", "<u4"), ("record", DOCUMENT_RECORD)])


@dataclass(frozen=True, slots=True)
class UnitTask:
    """One unit of the input after the scan: which of its documents are used, and for what."""

    unit: Unit
    scan_folder: str
    first_document: int
    """Place of the unit's first document in input order."""
    validation_threshold: int
    validation_max_document_bytes: int
    options: ReadOptions
    skip_bad: bool


@dataclass(frozen=True, slots=True)
class EncodeTask:
    """Write the unit's tokens into `folder`."""

    base: UnitTask
    folder: str
    tokenizer: str
    eod_token: str


@dataclass(frozen=True, slots=True)
class UsedDocument:
    """A document that goes into the dataset."""

    document: Document
    source: int
    file: int
    split: Split
    split_hash: int


@dataclass(slots=True)
class EncodeResult:
    """What one unit adds to the dataset."""

    splits: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)
    """split → source number → documents, tokens, bytes."""
    text_bytes: int = 0
    busy_s: float = 0.0
    """Processor seconds: reading, hashing, encoding, writing."""
    tokenizer_s: float = 0.0
    """Those of them inside the tokenizer."""


def encode_unit(task: EncodeTask) -> EncodeResult:
    """Encode the unit's documents; the outcome is complete once its ``.json`` exists.

    Raises:
        UserError: an input changed since it was scanned.
    """
    began = time.process_time()
    tokenizer = _load_once(task.tokenizer, task.eod_token, Path(task.tokenizer).stat().st_mtime_ns)
    result = EncodeResult(splits={split: {} for split in SPLITS})
    prefix = Path(task.folder) / f"{task.base.unit.number:06d}"
    with ExitStack() as stack:
        streams = {
            split: tuple(
                stack.enter_context(open(f"{prefix}.{split}.{part}", "wb"))
                for part in ("tokens", "documents")
            )
            for split in SPLITS
        }
        for split, batch in _batches(task.base):
            tokens, documents = streams[split]
            _encode_batch(tokenizer, batch, tokens, documents, result)
    result.busy_s = time.process_time() - began
    write_json(Path(f"{prefix}.json"), asdict(result))
    return result


def encode_result(folder: Path, unit: int) -> EncodeResult | None:
    """The finished outcome of a unit, if there is one."""
    stored = read_json(folder / f"{unit:06d}.json")
    return None if stored is None else EncodeResult(**stored)


def used_documents(task: UnitTask) -> Iterator[UsedDocument]:
    """The unit's documents that are neither empty nor duplicates, in order.

    Raises:
        UserError: the documents are not those that were scanned.
    """
    scanned = _scanned(task)

    def on_bad(error: CorruptInputError) -> None:
        if not task.skip_bad:
            raise error

    for file, span, document in read_unit(task.unit, task.options, on_bad):
        if is_empty(document.data):
            continue
        dedup, split_hash = content_hash(document.data)
        expected = next(scanned, None)
        if expected is None or expected[:2] != (dedup, split_hash):
            raise UserError(f"{file.path} changed while it was being prepared: start over with --restart")
        if expected[2]:
            continue
        size = len(document.data)
        held_out = is_validation(
            split_hash, size, task.validation_threshold, task.validation_max_document_bytes
        )
        yield UsedDocument(
            document, file.source, span.file, "validation" if held_out else "train", split_hash
        )


def unit_documents(
    folder: Path, unit: int, split: Split, item_bytes: int, chunk_tokens: int = 1 << 21
) -> Iterator[tuple[bytes, Array]]:
    """Encoded documents of a unit, about `chunk_tokens` at a time: stored tokens, and `ENCODED_RECORD` s."""
    prefix = folder / f"{unit:06d}.{split}"
    with open(f"{prefix}.tokens", "rb") as tokens, open(f"{prefix}.documents", "rb") as documents:
        while data := documents.read(RECORDS_READ * ENCODED_RECORD.itemsize):
            records = np.frombuffer(data, ENCODED_RECORD)
            group = np.cumsum(records["tokens"], dtype=np.int64) // chunk_tokens
            for part in np.split(records, np.flatnonzero(np.diff(group)) + 1):
                yield tokens.read(int(part["tokens"].sum(dtype=np.int64)) * item_bytes), part


@functools.lru_cache(maxsize=1)
def _load_once(path: str, eod_token: str, modified_ns: int) -> Tokenizer:
    """A worker's tokenizer, kept from unit to unit with the words it has seen."""
    return Tokenizer.load(path, eod_token=eod_token)


def _scanned(task: UnitTask) -> Iterator[tuple[int, int, int]]:
    """(dedup hash, split hash, 1 if duplicate) of the unit's documents."""
    folder = Path(task.scan_folder)
    with open(folder / FLAGS_FILE, "rb") as flags:
        flags.seek(task.first_document)
        for records in hash_chunks(folder, task.unit.number):
            duplicate = flags.read(records.size)
            yield from zip(records["dedup"].tolist(), records["split"].tolist(), duplicate, strict=True)


def _batches(task: UnitTask) -> Iterator[tuple[Split, list[UsedDocument]]]:
    """Documents of one split each, about BATCH_BYTES at a time; both splits keep the input's order."""
    batches: dict[Split, list[UsedDocument]] = {split: [] for split in SPLITS}
    sizes = dict.fromkeys(SPLITS, 0)
    for used in used_documents(task):
        batches[used.split].append(used)
        sizes[used.split] += len(used.document.data)
        if sizes[used.split] >= BATCH_BYTES:
            yield used.split, batches[used.split]
            batches[used.split], sizes[used.split] = [], 0
    for split in SPLITS:
        if batches[split]:
            yield split, batches[split]


def _encode_batch(
    tokenizer: Tokenizer,
    batch: list[UsedDocument],
    tokens: BinaryIO,
    documents: BinaryIO,
    result: EncodeResult,
) -> None:
    """Append a batch of one split to the unit's files and totals."""
    dtype = token_dtype(tokenizer.vocab_size)
    totals = result.splits[batch[0].split]
    began = time.process_time()
    encoded = tokenizer.encode_batch([used.document.data.decode("utf-8") for used in batch])
    result.tokenizer_s += time.process_time() - began
    records = np.empty(len(batch), ENCODED_RECORD)
    for number, (used, ids) in enumerate(zip(batch, encoded, strict=True)):
        ids.append(tokenizer.eod_id)
        tokens.write(np.array(ids, dtype=dtype).tobytes())
        size = len(used.document.data)
        records[number] = (len(ids), (used.source, used.file, used.document.position, size))
        source = totals.setdefault(str(used.source), {"documents": 0, "tokens": 0, "bytes": 0})
        source["documents"] += 1
        source["tokens"] += len(ids)
        source["bytes"] += size
        result.text_bytes += size
    documents.write(records.tobytes())
