"""How the input is divided into units of work.

The division depends on the input alone (never on the number of workers), and documents keep the order of
their files, so the prepared dataset is the same however many processes make it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megalite.data.documents import Document, OnBad, ReadOptions, Span
from megalite.data.read_parquet import row_group_bytes
from megalite.data.readers import read_span, text_pieces
from megalite.data.sources import SourceFile
from megalite.errors import UserError

SMALLEST_UNIT = 1 << 20
LARGEST_UNIT = 64 << 20
UNITS_WANTED = 256
"""Enough that a handful of workers end together and progress moves; bounded from above by LARGEST_UNIT."""


@dataclass(frozen=True, slots=True)
class Unit:
    """Consecutive spans that one worker handles in one go, and whose outcome is kept once finished."""

    number: int
    spans: tuple[tuple[SourceFile, Span], ...]
    bytes: int
    """Input bytes, as stored."""

    @property
    def signature(self) -> str:
        """Changes when the unit would read other files, other parts of them, or files changed since."""
        digest = hashlib.blake2b(digest_size=16)
        for file, span in self.spans:
            part = (file.path, file.source, file.kind, file.size, file.modified_ns, span.start, span.stop)
            digest.update(repr(part).encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


def plan_units(files: Sequence[SourceFile], options: ReadOptions) -> list[Unit]:
    """All units, in the order of the files."""
    target = unit_bytes(sum(file.size for file in files))
    units: list[Unit] = []
    spans: list[tuple[SourceFile, Span]] = []
    size = 0
    for number, file in enumerate(files):
        for span, span_bytes in _spans(number, file, target, options):
            if spans and size + span_bytes > target:
                units.append(Unit(len(units), tuple(spans), size))
                spans, size = [], 0
            spans.append((file, span))
            size += span_bytes
    if spans:
        units.append(Unit(len(units), tuple(spans), size))
    return units


def unit_bytes(total: int) -> int:
    """Input bytes per unit for `total` bytes of input."""
    # A power of two, so that mending one input does not move the borders of all units.
    wanted = 1 << (total // UNITS_WANTED).bit_length()
    return min(max(wanted, SMALLEST_UNIT), LARGEST_UNIT)


def read_unit(unit: Unit, options: ReadOptions, on_bad: OnBad) -> Iterator[tuple[SourceFile, Span, Document]]:
    """The documents of a unit in order, each with where it came from.

    Raises:
        UserError: a file changed since the unit was planned; whatever `on_bad` raises.
    """
    for file, span in unit.spans:
        check_unchanged(file)
        for document in read_span(file, span, options, on_bad):
            yield file, span, document


def check_unchanged(file: SourceFile) -> None:
    """Raise if a file is not as it was when the work was planned."""
    status = Path(file.path).stat()
    if (status.st_size, status.st_mtime_ns) != (file.size, file.modified_ns):
        raise UserError(f"{file.path} changed while it was being prepared: start over with --restart")


def _spans(number: int, file: SourceFile, target: int, options: ReadOptions) -> Iterator[tuple[Span, int]]:
    """The spans of one file with their input bytes."""
    if file.kind == "text":
        pieces = text_pieces(file.size, options.max_document_bytes)
        at_once = max(1, target // options.max_document_bytes)
        for first in range(0, pieces, at_once):
            last = min(first + at_once, pieces)
            end = min(last * options.max_document_bytes, file.size)
            yield Span(number, first, last), end - first * options.max_document_bytes
    elif file.kind == "jsonl":
        for start in range(0, max(file.size, 1), target):
            stop = min(start + target, file.size)
            yield Span(number, start, stop), stop - start
    elif file.kind == "parquet":
        groups = row_group_bytes(file.path)
        total = max(sum(groups), 1)
        first, size = 0, 0
        for group, group_bytes in enumerate(groups):
            size += file.size * group_bytes // total
            if size >= target or group == len(groups) - 1:
                yield Span(number, first, group + 1), size
                first, size = group + 1, 0
    else:
        yield Span(number, 0, 1), os.path.getsize(file.path)
