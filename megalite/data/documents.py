"""What the readers give and take: documents, parts of files, and how errors in the input are reported."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megalite.errors import UserError


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
    """Longer texts are cut at the first line end at or after each multiple of this, so a piece is shorter
    than
    twice this; where a line is longer than this, it is cut between two characters."""


def utf8_error(data: bytes) -> UnicodeDecodeError | None:
    """Why bytes are not UTF-8 text; None if they are."""
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        return error
    return None


def first_line(error: BaseException) -> str:
    """An error's message without what follows its first line."""
    return (str(error).splitlines() or [type(error).__name__])[0]
