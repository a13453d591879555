"""JSON lines: ranges of plain files, and whole .gz and .zst files, in bounded memory."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megalite.data.documents import CorruptInputError, Document, OnBad, Span
from megalite.errors import UserError

MAX_LINE_BYTES = 64 << 20
"""Longest JSON line: it must be held in memory, several times over while it is parsed."""
CHUNK = 1 << 16


def read_jsonl(path: str, span: Span, text_key: str, on_bad: OnBad) -> Iterator[Document]:
    """Texts of the lines that start in bytes [span.start, span.stop); positions are bytes."""
    with open(path, "rb", buffering=1 << 20) as stream:
        if span.start:
            # The line running at the start belongs to the span before, unless it ends exactly here.
            stream.seek(span.start - 1)
            while (skipped := stream.readline(CHUNK)) and not skipped.endswith(b"\n"):
                pass
        while (offset := stream.tell()) < span.stop and (line := stream.readline(MAX_LINE_BYTES + 1)):
            data = _text_of_line(line, text_key)
            if not isinstance(data, _Bad):
                if data is not None:
                    yield Document(data, offset)
                continue
            number = count_lines(path, offset) + 1
            on_bad(CorruptInputError(f"{path} line {number} (byte {offset}): {data.reason}"))
            while len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):  # the rest of an overlong line
                line = stream.readline(MAX_LINE_BYTES + 1)


def read_jsonl_gz(path: str, text_key: str, on_bad: OnBad) -> Iterator[Document]:
    """Texts of a gzip-compressed file; positions are lines, from 1."""
    return _read_stream(path, _gzip_chunks(path), text_key, on_bad)


def read_jsonl_zst(path: str, text_key: str, on_bad: OnBad) -> Iterator[Document]:
    """Texts of a Zstandard-compressed file; positions are lines, from 1."""
    return _read_stream(path, _zstd_chunks(path), text_key, on_bad)


def count_lines(path: str, stop: int) -> int:
    """Newlines before byte `stop` of a file."""
    count = 0
    with open(path, "rb") as stream:
        while stop > 0 and (data := stream.read(min(stop, 1 << 20))):
            count += data.count(b"\n")
            stop -= len(data)
    return count


def _read_stream(path: str, chunks: Iterator[bytes], text_key: str, on_bad: OnBad) -> Iterator[Document]:
    number = 0
    try:
        for number, line in enumerate(_lines(chunks), start=1):
            data = _text_of_line(line, text_key)
            if isinstance(data, _Bad):
                on_bad(CorruptInputError(f"{path} line {number}: {data.reason}"))
            elif data is not None:
                yield Document(data, number)
    except (EOFError, zlib.error, gzip.BadGzipFile, _ZstdError) as error:
        on_bad(CorruptInputError(f"{path} line {number + 1}: truncated or damaged compressed file ({error})"))


@dataclass(frozen=True, slots=True)
class _Bad:
    reason: str


def _text_of_line(line: bytes, text_key: str) -> bytes | _Bad | None:
    """UTF-8 text of a JSON line; None for a blank line."""
    if len(line) > MAX_LINE_BYTES:
        return _Bad(f"the line is longer than {MAX_LINE_BYTES} bytes")
    if not line.strip():
        return None
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
    """Decompressed chunks of all frames; a frame cut short raises (zstandard's own stream reader stays
    silent)."""
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
