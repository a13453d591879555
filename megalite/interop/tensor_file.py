"""safetensors files whose place for every tensor is known before the first byte is written.

Names, shapes and types decide a file's header, so every process of a run knows where each block of each tensor
lies: one creates the file at its full size, all of them write their blocks into place, and the bytes are the
same whoever wrote which. They are those that the safetensors library itself would have written.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megalite.errors import StorageError

MAX_FILE_BYTES = 5 * 10**9
INDEX_SUFFIX = ".safetensors.index.json"
# Name in the header, by falling order in the file: the widest types first, so that all are aligned.
_TYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of a file."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Its size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class TensorFile:
    """Where everything lies in one file."""

    name: str
    """Path below the folder that the file is in."""
    entries: dict[str, Entry]
    header: bytes
    starts: dict[str, int]
    """First byte of each tensor."""
    size: int

    def create(self, folder: Path) -> None:
        """Make the file at its full size, with its header and without values.

        Raises:
            OSError: it is there already, or cannot be written.
        """
        with self._opened(folder, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as descriptor:
            _write_at(descriptor, memoryview(self.header), 0)
            os.ftruncate(descriptor, self.size)

    @contextlib.contextmanager
    def writer(self, folder: Path) -> Iterator[BlockWriter]:
        """Write blocks into a file that `create` made; what was written is on disk when the context ends.

        Raises:
            OSError: the disk is full or the file cannot be written; names the file.
        """
        with self._opened(folder, os.O_WRONLY) as descriptor:
            yield BlockWriter(self, descriptor)
            os.fsync(descriptor)

    @contextlib.contextmanager
    def _opened(self, folder: Path, flags: int) -> Iterator[int]:
        path = folder / self.name
        descriptor = os.open(path, flags, 0o666)
        try:
            yield descriptor
        except OSError as error:
            if error.filename is None and error.errno is not None:  # calls on descriptors know no name
                raise OSError(error.errno, error.strerror, str(path)) from error
            raise
        finally:
            os.close(descriptor)


@dataclass(frozen=True, slots=True)
class BlockWriter:
    """An open file and the places in it."""

    file: TensorFile
    descriptor: int

    def write(self, name: str, offset: Sequence[int], block: Tensor) -> None:
        """Put a block of a tensor into its place.

        Args:
            name: the tensor.
            offset: where the block starts in it.
            block: values in the file's type, on the host; any strides.
        """
        entry = self.file.entries[name]
        assert block.dtype == entry.dtype, f"{name}: {block.dtype} into {entry.dtype}"
        width = entry.dtype.itemsize
        values: memoryview = block.contiguous().view(-1).view(torch.uint8).numpy().data
        done = 0
        for position, length in runs(entry.shape, offset, block.shape):
            part = values[done : done + length * width]
            _write_at(self.descriptor, part, self.file.starts[name] + position * width)
            done += length * width


def side_by_side(
    blocks: Iterable[tuple[tuple[int, ...], Tensor]],
) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """Blocks of one tensor, in order of their offsets, with those that touch along the last dim made one.

    Queries, keys and values of a fused projection lie so: written one by one, every row is three writes.
    """
    at: tuple[int, ...] = ()
    row: list[Tensor] = []
    for offset, block in blocks:
        touches = (
            row
            and block.dim() > 1
            and offset[:-1] == at[:-1]
            and offset[-1] == at[-1] + sum(b.shape[-1] for b in row)
            and block.shape[:-1] == row[0].shape[:-1]
        )
        if not touches:
            if row:
                yield at, torch.cat(row, -1) if len(row) > 1 else row[0]
            at, row = offset, []
        row.append(block)
    if row:
        yield at, torch.cat(row, -1) if len(row) > 1 else row[0]


def runs(shape: Sequence[int], offset: Sequence[int], block: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(first element, length) of each stretch of memory that a block takes up in a whole tensor, in its order."""
    if 0 in block:
        return
    strides = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    outer = len(shape) - 1
    while outer > 0 and block[outer] == shape[outer]:
        outer -= 1
    outer = max(outer, 0)
    length = math.prod(block[outer:])
    start = sum(o * s for o, s in zip(offset, strides, strict=True))
    for index in itertools.product(*(range(n) for n in block[:outer])):
        yield start + sum(i * s for i, s in zip(index, strides, strict=False)), length


def _write_at(descriptor: int, data: memoryview, position: int) -> None:
    """Write all of it: one call writes at most 2 GB, and less where the disk becomes full."""
    while data:
        written = os.pwrite(descriptor, data, position)
        data, position = data[written:], position + written


def plan_files(entries: Iterable[Entry], stem: str, *, max_bytes: int = MAX_FILE_BYTES) -> list[TensorFile]:
    """Divide tensors into files of at most `max_bytes` of values, in their order, named as transformers does."""
    groups: list[list[Entry]] = [[]]
    used = 0
    for entry in entries:
        if groups[-1] and used + entry.num_bytes > max_bytes:
            groups.append([])
            used = 0
        groups[-1].append(entry)
        used += entry.num_bytes
    if len(groups) == 1:
        return [_lay_out(f"{stem}.safetensors", groups[0])]
    count = len(groups)
    return [_lay_out(f"{stem}-{i:05d}-of-{count:05d}.safetensors", g) for i, g in enumerate(groups, 1)]


def _lay_out(name: str, entries: list[Entry]) -> TensorFile:
    types = list(_TYPES)
    ordered = sorted(entries, key=lambda e: (types.index(e.dtype), e.name))
    described: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for e in ordered:
        place = [end, end + e.num_bytes]
        described[e.name] = {"dtype": _TYPES[e.dtype], "shape": list(e.shape), "data_offsets": place}
        end += e.num_bytes
    text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    starts = {e.name: len(header) + described[e.name]["data_offsets"][0] for e in ordered}
    return TensorFile(name, {e.name: e for e in ordered}, header, starts, len(header) + end)


def index_text(files: Sequence[TensorFile]) -> str:
    """Contents of the ``*.index.json`` beside several files: which of them holds which tensor."""
    weight_map = {name: Path(file.name).name for file in files for name in file.entries}
    total = sum(entry.num_bytes for file in files for entry in file.entries.values())
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n"


def open_tensors(path: Path) -> Any:
    """A safetensors file to read from; its tensors are maps of the file.

    Raises:
        StorageError: there is none that can be read.
    """
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{path} cannot be read as safetensors: {error}") from error


def get_tensor(stored: Any, name: str, path: Path) -> Tensor:
    """A tensor of a file that `open_tensors` opened.

    Raises:
        StorageError: it is missing or cannot be read.
    """
    try:
        value: Tensor = stored.get_tensor(name)
    except SafetensorError as error:
        raise StorageError(f"{path}: {name} cannot be read: {error}") from error
    return value
