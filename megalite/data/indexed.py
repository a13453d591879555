"""Megatron's ``.bin/.idx`` token files: a streaming writer and a memory-mapped reader.

Layout, little endian (``.bin`` is raw tokens back to back, no header; this is the ``.idx``):

    offset          bytes  content
    0               9      magic ``MMIDIDX\\0\\0``
    9               8      u64 version = 1
    17              1      u8 dtype code
    18              8      u64 S, number of sequences
    26              8      u64 D, length of the document table (documents + 1)
    34              4 S    i32 tokens of each sequence
    34 + 4 S        8 S    i64 byte offset of each sequence in the ``.bin``
    34 + 12 S       8 D    i64 first sequence of each document, and S at the end

Source: ``megatron/core/datasets/indexed_dataset.py`` of Megatron-LM (read by megatron-core 0.16.1 in the
tests).
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from megalite.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype("<u1"),
    2: np.dtype("<i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    6: np.dtype("<f8"),
    7: np.dtype("<f4"),
    8: np.dtype("<u2"),
}
"""Codes 6 and 7 exist in the format but hold no tokens; the reader refuses them."""
CHUNK = 1 << 18
"""Sequences checked or written at once: 2 MiB of offsets."""
MAX_SEQUENCE_TOKENS = 2**31 - 1

Array = npt.NDArray[Any]


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Megatron's choice of storage type: u16 below 65,500 ids, else i32."""
    return DTYPES[8] if vocab_size < 65500 else DTYPES[4]


def bin_path(prefix: str | Path) -> Path:
    """The token file of a pair; `prefix` is the path without suffix."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    """The index file of a pair; `prefix` is the path without suffix."""
    return Path(f"{prefix}.idx")


class IndexedWriter:
    """Writes one ``.bin/.idx`` pair of one-sequence documents in bounded memory.

    Everything goes to ``*.tmp`` names (sequence lengths are spilled there too); `finalize` fsyncs and
    renames, the ``.idx`` last, so a pair with an ``.idx`` is complete. As a context manager it finalizes on
    success and removes its temporary files on an exception.

    Raises:
        UserError: a document of more than 2³¹-1 tokens.
        OSError: the disk is full or the folder cannot be written.
    """

    def __init__(self, prefix: str | Path, dtype: npt.DTypeLike) -> None:
        self.prefix = Path(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self._code = next(code for code, known in DTYPES.items() if known == self.dtype)
        self._temporary = {part: Path(f"{prefix}.{part}.tmp") for part in ("bin", "lengths", "idx")}
        self.documents = 0
        self.tokens = 0
        # Closed by finalize or abort.
        self._bin = open(self._temporary["bin"], "wb", buffering=1 << 20)  # noqa: SIM115
        self._lengths = open(self._temporary["lengths"], "wb", buffering=1 << 16)  # noqa: SIM115

    def add_document(self, tokens: npt.ArrayLike) -> None:
        """Append one document: token ids [n], n may be 0."""
        ids = np.asarray(tokens)
        self.add_raw(ids.astype(self.dtype, copy=False).tobytes(), np.array([ids.size]))

    def add_raw(self, data: bytes | memoryview, lengths: npt.ArrayLike) -> None:
        """Append whole documents: their tokens as stored bytes, and the token count of each."""
        counts = np.asarray(lengths, dtype=np.int64)
        if counts.size and int(counts.max()) > MAX_SEQUENCE_TOKENS:
            raise UserError(
                f"{self.prefix}: a document of {int(counts.max())} tokens is longer than the "
                f"format's limit of {MAX_SEQUENCE_TOKENS}: split it before preparing"
            )
        total = int(counts.sum())
        if total * self.dtype.itemsize != len(data):
            raise ValueError(f"{len(data)} bytes of tokens do not hold {total} x {self.dtype.itemsize} bytes")
        self._bin.write(data)
        self._lengths.write(counts.astype("<i4").tobytes())
        self.documents += counts.size
        self.tokens += total

    def finalize(self) -> None:
        """Write the index, fsync both files and give them their final names."""
        _sync_close(self._bin)
        _sync_close(self._lengths)
        with open(self._temporary["idx"], "wb") as out:
            out.write(HEADER.pack(MAGIC, VERSION, self._code, self.documents, self.documents + 1))
            for lengths in self._spilled_lengths():
                out.write(lengths.tobytes())
            offset = 0
            for lengths in self._spilled_lengths():
                ends = offset + np.cumsum(lengths, dtype=np.int64) * self.dtype.itemsize
                out.write(np.concatenate(([offset], ends[:-1])).astype("<i8").tobytes())
                offset = int(ends[-1])
            for first in range(0, self.documents + 1, CHUNK):
                out.write(np.arange(first, min(first + CHUNK, self.documents + 1), dtype="<i8").tobytes())
            _sync_close(out)
        os.replace(self._temporary["bin"], bin_path(self.prefix))
        os.replace(self._temporary["idx"], idx_path(self.prefix))
        os.unlink(self._temporary["lengths"])
        fsync_folder(self.prefix.parent)

    def abort(self) -> None:
        """Close and remove the temporary files; a finished pair of the same name stays as it was."""
        for stream in (self._bin, self._lengths):
            with contextlib.suppress(OSError):  # flushing what the full disk did not take
                stream.close()
        for path in self._temporary.values():
            path.unlink(missing_ok=True)

    def _spilled_lengths(self) -> Iterator[Array]:
        with open(self._temporary["lengths"], "rb") as spilled:
            while data := spilled.read(4 * CHUNK):
                yield np.frombuffer(data, dtype="<i4")

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.abort()
            return
        try:
            self.finalize()
        except BaseException:
            self.abort()
            raise


class IndexedReader:
    """Random access to the documents and the token stream of one ``.bin/.idx`` pair, by memory map.

    The whole index is checked when it is opened (in chunks: constant memory), so that later reads cannot land
    outside the file. Sequences must lie back to back, as every Megatron writer puts them: the tokens of all
    documents are then one array in file order, the *stream*.

    Raises:
        UserError: a file is missing, short or inconsistent; the message names it and the byte offset.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = Path(prefix)
        self.bin_path, self.idx_path = bin_path(prefix), idx_path(prefix)
        index = _map(self.idx_path)
        self.dtype, sequences, table = _parse_header(self.idx_path, index)
        offset = HEADER.size
        # The arrays are unaligned in the file: element and slice access is fine, but whole-array calls such
        # as np.searchsorted would first copy them into memory. Hence the bisection in `locate`.
        self.sequence_lengths = np.frombuffer(index, "<i4", sequences, offset)
        self.sequence_offsets = np.frombuffer(index, "<i8", sequences, offset + 4 * sequences)
        self._document_table = np.frombuffer(index, "<i8", table, offset + 12 * sequences)
        self.documents = table - 1
        data = _map(self.bin_path)
        self.tokens = self._check_sequences(len(data))
        self._one_to_one = self._check_documents()
        self.stream: Array = np.frombuffer(data, self.dtype, self.tokens)
        """All tokens [tokens] in file order, as stored."""

    def document_start(self, document: int) -> int:
        """Stream position of a document's first token; `documents` gives the end of the stream."""
        if document == self.documents:
            return self.tokens
        sequence = document if self._one_to_one else int(self._document_table[document])
        if sequence == self.sequence_offsets.size:
            return self.tokens
        return int(self.sequence_offsets[sequence]) // self.dtype.itemsize

    def document_starts(self, first: int, last: int) -> Array:
        """Stream positions [last - first] int64 of the first tokens of documents first … last - 1."""
        if self._one_to_one:
            return self.sequence_offsets[first:last] // self.dtype.itemsize
        return np.array([self.document_start(d) for d in range(first, last)], dtype=np.int64)

    def document(self, document: int) -> Array:
        """Tokens of one document as stored, its end-of-document token included; a view into the file.

        Raises:
            UserError: there is no such document.
        """
        if not 0 <= document < self.documents:
            raise UserError(f"{self.bin_path} has documents 0 to {self.documents - 1}, not {document}")
        return self.stream[self.document_start(document) : self.document_start(document + 1)]

    def locate(self, position: int) -> int:
        """The document that holds stream position `position` (0 ≤ position < tokens)."""
        low, high = 0, self.documents  # document_start(low) <= position < document_start(high)
        while high - low > 1:
            middle = (low + high) // 2
            if self.document_start(middle) <= position:
                low = middle
            else:
                high = middle
        return low

    def __len__(self) -> int:
        return self.documents

    def _check_sequences(self, bin_bytes: int) -> int:
        """Total tokens, after checking that sequences are back to back and end inside the ``.bin``."""
        expected = 0
        count = self.sequence_lengths.size
        for first in range(0, count, CHUNK):
            lengths = self.sequence_lengths[first : first + CHUNK].astype(np.int64)
            offsets = self.sequence_offsets[first : first + CHUNK]
            if (lengths < 0).any():
                bad = first + int(np.argmax(lengths < 0))
                raise UserError(
                    f"{self.idx_path}: sequence {bad} has length {self.sequence_lengths[bad]} "
                    f"(at byte {HEADER.size + 4 * bad}): the index is damaged, prepare the dataset again"
                )
            ends = expected + np.cumsum(lengths) * self.dtype.itemsize
            starts = ends - lengths * self.dtype.itemsize
            if (starts != offsets).any():
                bad = int(np.argmax(starts != offsets))
                raise UserError(
                    f"{self.idx_path}: sequence {first + bad} is said to start at byte {offsets[bad]} of "
                    f"{self.bin_path.name}, expected {starts[bad]} (at byte "
                    f"{HEADER.size + 4 * count + 8 * (first + bad)}): the index is damaged"
                )
            if ends[-1] > bin_bytes:
                bad = int(np.argmax(ends > bin_bytes))
                raise UserError(
                    f"{self.bin_path} is too short: it ends at byte {bin_bytes}, but sequence {first + bad} "
                    f"lies at bytes {starts[bad]} to {ends[bad]}: copy or prepare the dataset again"
                )
            expected = int(ends[-1])
        if expected != bin_bytes:
            raise UserError(
                f"{self.bin_path} has {bin_bytes} bytes, but the last sequence of {self.idx_path.name} ends "
                f"at byte {expected}: the two files do not belong together"
            )
        return expected // self.dtype.itemsize

    def _check_documents(self) -> bool:
        """Check that the document table rises from 0 to S; True if each document is one sequence."""
        one_to_one = self.documents == self.sequence_lengths.size
        base = HEADER.size + 12 * self.sequence_lengths.size
        previous = 0
        for first in range(0, self._document_table.size, CHUNK):
            table = self._document_table[first : first + CHUNK]
            steps = np.diff(table, prepend=previous)
            if (steps < 0).any() or (first == 0 and table[0] != 0):
                bad = int(np.argmax(steps < 0)) if (steps < 0).any() else 0
                raise UserError(
                    f"{self.idx_path}: entry {first + bad} of the document table is {table[bad]} after "
                    f"{previous if bad == 0 else table[bad - 1]} (at byte {base + 8 * (first + bad)})"
                )
            one_to_one = one_to_one and bool((steps[1 if first == 0 else 0 :] == 1).all())
            previous = int(table[-1])
        if previous != self.sequence_lengths.size:
            raise UserError(
                f"{self.idx_path}: the document table ends at sequence {previous} of "
                f"{self.sequence_lengths.size} (at byte {base + 8 * (self._document_table.size - 1)})"
            )
        return one_to_one


def fsync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_close(stream: Any) -> None:
    stream.flush()
    os.fsync(stream.fileno())
    stream.close()


def _map(path: Path) -> mmap.mmap | bytes:
    """The file as a read-only buffer; an empty file cannot be mapped and gives empty bytes."""
    try:
        with open(path, "rb") as stream:
            if os.fstat(stream.fileno()).st_size == 0:
                return b""
            return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: prepare it with `megalite data prepare`") from None


def _parse_header(path: Path, index: mmap.mmap | bytes) -> tuple[np.dtype[Any], int, int]:
    """Token dtype, number of sequences, length of the document table."""
    if len(index) < HEADER.size:
        raise UserError(f"{path} is truncated: it ends at byte {len(index)}, its header at {HEADER.size}")
    magic, version, code, sequences, table = HEADER.unpack(index[: HEADER.size])
    if magic != MAGIC:
        raise UserError(f"{path} is not a Megatron index: bytes 0 to 8 are {magic!r}, expected {MAGIC!r}")
    if version != VERSION:
        raise UserError(f"{path}: version {version} at byte 9 is not supported, only {VERSION} is")
    if code not in DTYPES or DTYPES[code].kind == "f":
        raise UserError(f"{path}: dtype code {code} at byte 17 is no integer type (1 to 5, 8)")
    if table < 1:
        raise UserError(
            f"{path}: the document table (length at byte 26) is empty, expected at least one entry"
        )
    needed = HEADER.size + 12 * sequences + 8 * table
    # A trailing i8 mode per sequence marks multimodal data, which this reader does not interpret.
    if len(index) == needed + sequences and sequences:
        raise UserError(
            f"{path} holds multimodal modes from byte {needed} on: only text datasets are supported"
        )
    if len(index) != needed:
        raise UserError(
            f"{path} is {'truncated' if len(index) < needed else 'too long'}: it ends at byte {len(index)}, "
            f"but {sequences} sequences and {table - 1} documents take {needed} bytes"
        )
    return DTYPES[code], sequences, table
