"""One text column of Parquet files, a few pages at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megalite.data.documents import CorruptInputError, Document, OnBad, Span, first_line, utf8_error
from megalite.errors import UserError

ROWS = 32
"""Rows read at once: documents may be long."""


def read_parquet(path: str, span: Span, text_key: str, on_bad: OnBad) -> Iterator[Document]:
    """Texts of row groups [span.start, span.stop); positions are rows of the file, from 0."""
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
            for batch in file.iter_batches(ROWS, row_groups=groups, columns=[text_key], use_threads=False):
                for value in _as_binary(pyarrow, batch.column(0)):
                    if problem := _problem(value, text_key):
                        on_bad(CorruptInputError(f"{path} row {row}: {problem}"))
                    else:
                        yield Document(value, row)
                    row += 1
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        on_bad(CorruptInputError(f"{path} row {row}: not a readable Parquet file ({first_line(error)})"))


def row_group_bytes(path: str) -> list[int]:
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


def _problem(value: Any, text_key: str) -> str | None:
    """Why a cell is not text; None if it is."""
    if not isinstance(value, bytes):
        return f"{text_key!r} is {'null' if value is None else type(value).__name__}, expected text"
    error = utf8_error(value)
    return None if error is None else f"not UTF-8 text (byte {error.start} of the cell, {error.reason})"
