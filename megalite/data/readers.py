"""Documents out of input files, one at a time, with the exact place of anything that cannot be read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from megalite.data.documents import CorruptInputError, Document, OnBad, ReadOptions, Span, utf8_error
from megalite.data.read_botocore import read_botocore
from megalite.data.read_jsonl import count_lines, read_jsonl, read_jsonl_gz, read_jsonl_zst
from megalite.data.read_parquet import read_parquet
from megalite.data.sources import SourceFile


def read_span(file: SourceFile, span: Span, options: ReadOptions, on_bad: OnBad) -> Iterator[Document]:
    """The documents of a span in file order.

    Raises:
        UserError: whatever `on_bad` raises; a missing optional package.
        OSError: the file cannot be opened or read.
    """
    if file.kind == "text":
        yield from _read_text(file.path, span, options.max_document_bytes, on_bad)
        return
    key = options.text_key
    if file.kind == "jsonl":
        documents = read_jsonl(file.path, span, key, on_bad)
    elif file.kind == "jsonl.gz":
        documents = read_jsonl_gz(file.path, key, on_bad)
    elif file.kind == "jsonl.zst":
        documents = read_jsonl_zst(file.path, key, on_bad)
    elif file.kind == "parquet":
        documents = read_parquet(file.path, span, key, on_bad)
    else:
        documents = read_botocore(file.path, on_bad)
    for document in documents:
        for piece in cut_at_lines(document.data, options.max_document_bytes):
            yield Document(piece, document.position)


def cut_at_lines(data: bytes, limit: int) -> Iterator[bytes]:
    """Pieces of a text longer than `limit`, each ended by the first line end at or after a multiple of
    `limit`."""
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
            if error := utf8_error(data):
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


def _bad_text(path: str, start: int, data: bytes, error: UnicodeDecodeError) -> str:
    offset = start + error.start
    line = count_lines(path, offset) + 1
    return (
        f"{path} line {line} (byte {offset}): not UTF-8 text (byte 0x{data[error.start]:02x}, "
        f"{error.reason}): convert the file, leave it out, or use --on-error skip"
    )
