"""Last stage: the units' outcomes joined, in order, into the files of the dataset folder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megalite.data.dataset import DOCUMENT_RECORD, FILES_FILE, SPLITS
from megalite.data.encode import EncodeResult, unit_documents
from megalite.data.indexed import IndexedWriter, token_dtype
from megalite.data.sources import Source, SourceFile, position_unit


def write_splits(
    encoded: Path,
    units: int,
    output: Path,
    *,
    vocab_size: int,
    documents: dict[str, int],
    on_progress: Callable[[float], None],
) -> None:
    """Write ``{split}.bin/.idx`` and ``{split}.documents.npy`` into `output`, a chunk at a time.

    Args:
        encoded: folder of the encoded units.
        units: how many there are.
        output: folder that gets the files.
        vocab_size: decides the storage type of tokens.
        documents: documents per split.
        on_progress: called with the share done.
    """
    dtype = token_dtype(vocab_size)
    for place, split in enumerate(SPLITS):
        path = output / f"{split}.documents.npy"
        with IndexedWriter(output / split, dtype) as writer, open(path, "wb") as records:
            np.lib.format.write_array_header_1_0(
                records,
                {
                    "descr": np.lib.format.dtype_to_descr(DOCUMENT_RECORD),
                    "fortran_order": False,
                    "shape": (documents[split],),
                },
            )
            for unit in range(units):
                for tokens, chunk in unit_documents(encoded, unit, split, dtype.itemsize):
                    writer.add_raw(tokens, chunk["tokens"])
                    records.write(chunk["record"].tobytes())
                on_progress((place + (unit + 1) / units) / len(SPLITS))
            records.flush()
            os.fsync(records.fileno())


def write_files_list(path: Path, files: Sequence[SourceFile], sources: Sequence[Source]) -> None:
    """One JSON line per input file: its path, source, and what document positions in it count."""
    with open(path / FILES_FILE, "w", encoding="utf-8") as out:
        for file in files:
            entry = {"path": file.path, "source": sources[file.source].name, "unit": position_unit(file.kind)}
            out.write(json.dumps(entry, ensure_ascii=False) + "\n")
        out.flush()
        os.fsync(out.fileno())


def split_totals(results: Sequence[EncodeResult], sources: Sequence[Source]) -> dict[str, Any]:
    """split → documents, tokens, bytes, and the same for each source under "sources"."""
    totals: dict[str, Any] = {}
    for split in SPLITS:
        per_source = {source.name: {"documents": 0, "tokens": 0, "bytes": 0} for source in sources}
        for result in results:
            for number, counts in result.splits[split].items():
                for what, count in counts.items():
                    per_source[sources[int(number)].name][what] += count
        whole = {
            what: sum(source[what] for source in per_source.values())
            for what in ("documents", "tokens", "bytes")
        }
        totals[split] = {**whole, "sources": per_source}
    return totals
