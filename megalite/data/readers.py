"""Documents out of input files, one at a time, with the exact place of anything that cannot be read."""

from __future__ import annotations

import gzip
import html
import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from megalite.data.sources import SourceFile
from megalite.errors import UserError

MAX_LINE_BYTES = 64 << 20
"""Longest JSON line: it must be held in memory, several times over while it is parsed."""
CHUNK = 1 << 16
PARQUET_ROWS = 32
SHORTEST_PROSE = 80
"""Characters below which a botocore documentation string is a label rather than prose."""


class CorruptInputError(UserError):
    """An input that cannot be read; the message starts with the file and the place in it."""


@dataclass(frozen=True, slots=True)
class Document:
    """One document of the corpus."""

    data: bytes
    """UTF-8 text."""
    position: int
    """Where it starts in its file; `sources.position_unit` says what that counts."""


@dataclass(frozen=True, slots=True)
class Span:
    """A part of a file that one worker reads on its own.

    The meaning of [start, stop) depends on the kind: text: pieces of max_document_bytes; jsonl: bytes (a line
    belongs to the span in which it starts); parquet: row groups; compressed files: always [0, 1), the whole.
    """

    file: int
    start: int
    stop: int


OnBad = Callable[[CorruptInputError], None]
"""Called for everything unreadable: raises it, or returns to go on behind it."""


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """How documents are taken from files."""

    text_key: str = "text"
    """Key (JSON lines) or column (Parquet) of the text."""
    max_document_bytes: int = 1 << 20
    """Longer texts are cut at the first line end at or after each multiple of this, so a piece is shorter than
    twice this; where a line is longer than this, it is cut between two characters."""


def read_span(file: SourceFile, span: Span, options: ReadOptions, on_bad: OnBad) -> Iterator[Document]:
    """The documents of a span in file order.

    Raises:
        UserError: whatever `on_bad` raises; a missing optional package.
        OSError: the file cannot be opened or read.
    """
    if file.kind == "text":
        yield from _read_text(file.path, span, options.max_document_bytes, on_bad)
        return
    if file.kind == "parquet":
        documents = _read_parquet(file.path, span, options.text_key, on_bad)
    elif file.kind == "botocore":
        documents = _read_botocore(file.path, on_bad)
    elif file.kind == "jsonl":
        documents = _read_jsonl_range(file.path, span, options.text_key, on_bad)
    else:
        opened = _gzip_chunks(file.path) if file.kind == "jsonl.gz" else _zstd_chunks(file.path)
        documents = _read_jsonl_stream(file.path, opened, options.text_key, on_bad)
    for document in documents:
        for piece in cut_at_lines(document.data, options.max_document_bytes):
            yield Document(piece, document.position)


def cut_at_lines(data: bytes, limit: int) -> Iterator[bytes]:
    """Pieces of a text longer than `limit`, each ended by the first line end at or after a multiple of `limit`."""
    if len(data) <= limit:
        yield data
        return
    start = 0
    for nominal in range(limit, len(data) + limit, limit):
        end = len(data) if nominal >= len(data) else _line_end(data, nominal, limit)
        if end > start:
            yield data[start:end]
        start = end


def text_pieces(size: int, limit: int) -> int:
    """Number of pieces that a text file of `size` bytes is cut into."""
    return max(1, -(-size // limit))


def _line_end(data: bytes, nominal: int, limit: int) -> int:
    """One past the first newline in [nominal - 1, nominal + limit - 1), else the next character's start."""
    found = data.find(b"\n", nominal - 1, nominal + limit - 1)
    if found >= 0:
        return found + 1
    while nominal < len(data) and data[nominal] & 0xC0 == 0x80:  # inside a multi-byte character
        nominal += 1
    return nominal


def _read_text(path: str, span: Span, limit: int, on_bad: OnBad) -> Iterator[Document]:
    """Pieces span.start … span.stop - 1 of a text file; same cuts as `cut_at_lines` on its whole content."""
    with open(path, "rb") as stream:
        size = stream.seek(0, 2)
        start = _cut(stream, span.start, size, limit)
        for piece in range(span.start, span.stop):
            end = _cut(stream, piece + 1, size, limit)
            stream.seek(start)
            data = stream.read(end - start)
            if error := _utf8_error(data):
                on_bad(CorruptInputError(_bad_text(path, start, data, error)))
            elif data or size == 0:
                yield Document(data, start)
            start = end


def _cut(stream: BinaryIO, piece: int, size: int, limit: int) -> int:
    """Byte at which piece number `piece` starts."""
    nominal = piece * limit
    if piece == 0 or nominal >= size:
        return min(nominal, size)
    stream.seek(nominal - 1)
    window = stream.read(limit + 4)
    return nominal - 1 + _line_end(window, 1, limit)


def _utf8_error(data: bytes) -> UnicodeDecodeError | None:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        return error
    return None


def _bad_text(path: str, start: int, data: bytes, error: UnicodeDecodeError) -> str:
    offset = start + error.start
    line = _count_lines(path, offset) + 1
    return (
        f"{path} line {line} (byte {offset}): not UTF-8 text (byte 0x{data[error.start]:02x}, {error.reason}): "
        "convert the file, leave it out, or use --on-error skip"
    )


def _count_lines(path: str, stop: int) -> int:
    """Newlines before byte `stop`."""
    count = 0
    with open(path, "rb") as stream:
        while stop > 0 and (data := stream.read(min(stop, 1 << 20))):
            count += data.count(b"\n")
            stop -= len(data)
    return count


def _read_jsonl_range(path: str, span: Span, text_key: str, on_bad: OnBad) -> Iterator[Document]:
    with open(path, "rb", buffering=1 << 20) as stream:
        if span.start:
            # The line running at the start belongs to the span before, unless it ends exactly here.
            stream.seek(span.start - 1)
            while (skipped := stream.readline(CHUNK)) and not skipped.endswith(b"\n"):
                pass
        while (offset := stream.tell()) < span.stop and (line := stream.readline(MAX_LINE_BYTES + 1)):
            data = _text_of_line(line, text_key)
            if isinstance(data, bytes):
                if data:
                    yield Document(data, offset)
                continue
            number = _count_lines(path, offset) + 1
            on_bad(CorruptInputError(f"{path} line {number} (byte {offset}): {data.reason}"))
            while len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):  # the rest of an overlong line
                line = stream.readline(MAX_LINE_BYTES + 1)


def _read_jsonl_stream(
    path: str, chunks: Iterator[bytes], text_key: str, on_bad: OnBad
) -> Iterator[Document]:
    number = 0
    try:
        for number, line in enumerate(_lines(chunks), start=1):
            data = _text_of_line(line, text_key)
            if isinstance(data, _Bad):
                on_bad(CorruptInputError(f"{path} line {number}: {data.reason}"))
            elif data:
                yield Document(data, number)
    except (EOFError, zlib.error, gzip.BadGzipFile, _ZstdError) as error:
        on_bad(CorruptInputError(f"{path} line {number + 1}: truncated or damaged compressed file ({error})"))


@dataclass(frozen=True, slots=True)
class _Bad:
    reason: str


def _text_of_line(line: bytes, text_key: str) -> bytes | _Bad:
    """UTF-8 text of a JSON line; empty for a blank line."""
    if len(line) > MAX_LINE_BYTES:
        return _Bad(f"the line is longer than {MAX_LINE_BYTES} bytes")
    if not line.strip():
        return b""
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return _Bad(f"not UTF-8 text (byte {error.start} of the line, {error.reason})")
    except (ValueError, RecursionError) as error:
        torn = "" if line.endswith(b"\n") else "; the line has no end, the file may be torn"
        return _Bad(f"not JSON ({error}{torn})")
    if not isinstance(record, dict):
        return _Bad(f"a JSON {type(record).__name__}, expected an object with the key {text_key!r}")
    if text_key not in record:
        return _Bad(
            f"no key {text_key!r} (there are {', '.join(map(repr, list(record)[:8]))}): use --text-key"
        )
    return _utf8(record[text_key], text_key)


def _utf8(value: Any, text_key: str) -> bytes | _Bad:
    if not isinstance(value, str):
        return _Bad(f"{text_key!r} is {type(value).__name__}, expected text")
    try:
        return value.encode("utf-8")
    except UnicodeEncodeError as error:
        return _Bad(f"{text_key!r} is not valid Unicode (character {error.start}, {error.reason})")


def _lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Lines, ends included; one that grows beyond the limit is given up to there, and its rest dropped."""
    parts: list[bytes] = []
    size = 0
    dropping = False
    for chunk in chunks:
        start = 0
        while (end := chunk.find(b"\n", start)) >= 0:
            if not dropping:
                yield b"".join((*parts, chunk[start : end + 1]))
            parts, size, start, dropping = [], 0, end + 1, False
        if dropping:
            continue
        parts.append(chunk[start:])
        size += len(parts[-1])
        if size > MAX_LINE_BYTES:
            yield b"".join(parts)
            parts, size, dropping = [], 0, True
    if size:
        yield b"".join(parts)


def _gzip_chunks(path: str) -> Iterator[bytes]:
    with gzip.open(path, "rb") as stream:
        while chunk := stream.read(CHUNK):
            yield chunk


class _ZstdError(Exception):
    """The zstandard package's error, which cannot be named without importing it."""


def _zstd_chunks(path: str) -> Iterator[bytes]:
    """Decompressed chunks of all frames; a frame cut short raises (zstandard's own stream reader stays silent)."""
    try:
        import zstandard
    except ImportError:
        raise UserError(f"{path} needs the package zstandard: pip install zstandard") from None
    with open(path, "rb") as stream:
        frame, rest = zstandard.ZstdDecompressor().decompressobj(), b""
        started = False
        while data := rest or stream.read(CHUNK >> 2):
            started = True
            try:
                chunk = frame.decompress(data)
            except zstandard.ZstdError as error:
                raise _ZstdError(str(error)) from None
            rest = b""
            if chunk:
                yield chunk
            if frame.eof:
                rest = frame.unused_data
                frame, started = zstandard.ZstdDecompressor().decompressobj(), False
        if started:
            raise _ZstdError("the file ends inside a frame")


def _read_parquet(path: str, span: Span, text_key: str, on_bad: OnBad) -> Iterator[Document]:
    pyarrow, parquet = _parquet_package(path)
    row = 0
    try:
        # Buffered and not read ahead: memory is a few pages, not a row group.
        with parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
            names = file.schema_arrow.names
            if text_key not in names:
                on_bad(
                    CorruptInputError(
                        f"{path}: no column {text_key!r} (there are {', '.join(names[:8])}): use --text-key"
                    )
                )
                return
            row = sum(file.metadata.row_group(group).num_rows for group in range(span.start))
            groups = list(range(span.start, min(span.stop, file.num_row_groups)))
            for batch in file.iter_batches(
                PARQUET_ROWS, row_groups=groups, columns=[text_key], use_threads=False
            ):
                for value in _as_binary(pyarrow, batch.column(0)):
                    data = _text_of_cell(value, text_key)
                    if isinstance(data, _Bad):
                        on_bad(CorruptInputError(f"{path} row {row}: {data.reason}"))
                    elif data:
                        yield Document(data, row)
                    row += 1
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        on_bad(CorruptInputError(f"{path} row {row}: not a readable Parquet file ({_first_line(error)})"))


def parquet_row_groups(path: str) -> list[int]:
    """Uncompressed bytes of each row group; one group of 0 bytes where the file cannot be read.

    A broken file is reported when its span is read, not while the work is planned.
    """
    pyarrow, parquet = _parquet_package(path)
    try:
        with parquet.ParquetFile(path) as file:
            metadata = file.metadata
            return [metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)]
    except (pyarrow.ArrowException, OSError):
        return [0]


def _parquet_package(path: str) -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path} needs the package pyarrow: pip install pyarrow") from None
    return pyarrow, pyarrow.parquet


def _as_binary(pyarrow: Any, column: Any) -> Iterator[Any]:
    """Cells as bytes where they are text (Arrow does not check its strings), else as Python values."""
    types = pyarrow.types
    if types.is_string(column.type):
        column = column.cast(pyarrow.binary())
    elif types.is_large_string(column.type):
        column = column.cast(pyarrow.large_binary())
    return (cell.as_py() for cell in column)


def _text_of_cell(value: Any, text_key: str) -> bytes | _Bad:
    if not isinstance(value, bytes):
        return _Bad(f"{text_key!r} is {'null' if value is None else type(value).__name__}, expected text")
    error = _utf8_error(value)
    return (
        value if error is None else _Bad(f"not UTF-8 text (byte {error.start} of the cell, {error.reason})")
    )


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _read_botocore(path: str, on_bad: OnBad) -> Iterator[Document]:
    """The documentation strings of one service description, stripped of HTML."""
    try:
        opened = gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb")
        with opened as stream:
            service = json.load(stream)
    except (ValueError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        on_bad(CorruptInputError(f"{path}: not a readable service description ({_first_line(error)})"))
        return
    for entry, text in enumerate(_documentation(service)):
        stripped = re.sub(r"<[^>]*>", " ", re.sub(r"</(p|li|dd|dt|h\d)>", "\n", text))
        prose = re.sub(r"[ \t]+", " ", html.unescape(stripped))
        prose = re.sub(r" ?\n\s*", "\n", prose).strip()
        if len(prose) >= SHORTEST_PROSE:
            yield Document((prose + "\n").encode("utf-8"), entry)


def _documentation(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        for name, value in node.items():
            if name == "documentation" and isinstance(value, str):
                yield value
            else:
                yield from _documentation(value)
    elif isinstance(node, list):
        for value in node:
            yield from _documentation(value)
