"""The .bin/.idx pair: exact bytes, damage with its place, and equality with Megatron's own code."""

from __future__ import annotations

import importlib.util
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalite.data import indexed
from megalite.data.indexed import IndexedReader, IndexedWriter, token_dtype
from megalite.errors import UserError

DOCUMENTS = [[5, 6, 7], [], [1], [65000, 2, 3, 4]]


def write(prefix: Path, documents: list[list[int]], dtype: object = np.uint16) -> None:
    with IndexedWriter(prefix, np.dtype(dtype)) as writer:
        for document in documents:
            writer.add_document(document)


def test_exact_bytes(tmp_path: Path):
    write(tmp_path / "d", DOCUMENTS)
    flat = [token for document in DOCUMENTS for token in document]
    assert (tmp_path / "d.bin").read_bytes() == struct.pack("<8H", *flat)
    expected = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 4, 5)
    expected += (
        struct.pack("<4i", 3, 0, 1, 4) + struct.pack("<4q", 0, 6, 6, 8) + struct.pack("<5q", 0, 1, 2, 3, 4)
    )
    assert (tmp_path / "d.idx").read_bytes() == expected
    assert sorted(os.listdir(tmp_path)) == ["d.bin", "d.idx"], "temporary files are gone"


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.int64])
def test_round_trip_of_every_token_type(tmp_path: Path, dtype: type):
    documents = [[0, 1, 100], [7], [], [120, 3]]
    write(tmp_path / "d", documents, dtype)
    reader = IndexedReader(tmp_path / "d")
    assert reader.dtype == np.dtype(dtype)
    assert [reader.document(i).tolist() for i in range(len(reader))] == documents
    assert reader.tokens == 6


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(0, 9), min_size=0, max_size=30))
def test_locate_finds_the_document_of_every_token(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int]
):
    prefix = tmp_path_factory.mktemp("locate") / "d"
    write(prefix, [[number] * length for number, length in enumerate(lengths)])
    reader = IndexedReader(prefix)
    assert [reader.locate(position) for position in range(reader.tokens)] == reader.stream.tolist()
    assert reader.document_starts(0, len(lengths)).tolist() == [sum(lengths[:i]) for i in range(len(lengths))]


def test_index_is_written_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(tmp_path / "whole", DOCUMENTS * 5)
    monkeypatch.setattr(indexed, "CHUNK", 3)
    write(tmp_path / "chunked", DOCUMENTS * 5)
    assert (tmp_path / "chunked.idx").read_bytes() == (tmp_path / "whole.idx").read_bytes()
    assert IndexedReader(tmp_path / "chunked").documents == 20


def test_token_dtype_is_megatrons_choice():
    assert token_dtype(65499) == np.dtype("<u2")
    assert token_dtype(65500) == np.dtype("<i4")


def test_a_failed_write_leaves_the_earlier_pair(tmp_path: Path):
    write(tmp_path / "d", [[1, 2]])
    with pytest.raises(ValueError, match="inhomogeneous"):
        write(tmp_path / "d", [[9], [[1], [2, 3]]])  # type: ignore[list-item]
    assert IndexedReader(tmp_path / "d").document(0).tolist() == [1, 2]
    assert sorted(os.listdir(tmp_path)) == ["d.bin", "d.idx"]


def test_add_raw_checks_its_lengths(tmp_path: Path):
    with (
        pytest.raises(ValueError, match="4 bytes of tokens do not hold 3 x 2"),
        IndexedWriter(tmp_path / "d", np.uint16) as writer,
    ):
        writer.add_raw(b"\x00" * 4, [3])


def test_too_long_a_document(tmp_path: Path):
    with (
        pytest.raises(UserError, match="2147483648 tokens is longer than"),
        IndexedWriter(tmp_path / "d", np.uint16) as writer,
    ):
        writer.add_raw(b"", [2**31])


def patch(path: Path, offset: int, data: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(data)] = data
    path.write_bytes(bytes(content))


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


DAMAGE = {
    "magic": (
        lambda p: patch(p.with_suffix(".idx"), 0, b"X"),
        r"d\.idx is not a Megatron index: bytes 0 to 8",
    ),
    "version": (lambda p: patch(p.with_suffix(".idx"), 9, b"\x02"), r"d\.idx: version 2 at byte 9"),
    "dtype": (lambda p: patch(p.with_suffix(".idx"), 17, b"\x09"), r"d\.idx: dtype code 9 at byte 17"),
    "float": (lambda p: patch(p.with_suffix(".idx"), 17, b"\x06"), r"d\.idx: dtype code 6 at byte 17"),
    "header": (lambda p: cut(p.with_suffix(".idx"), 20), r"d\.idx is truncated: it ends at byte 20"),
    "truncated": (
        lambda p: cut(p.with_suffix(".idx"), 100),
        r"d\.idx is truncated: it ends at byte 100, .* 122 bytes",
    ),
    "too long": (
        lambda p: patch(p.with_suffix(".idx"), 122, b"\x00" * 9),
        r"d\.idx is too long: it ends at byte 131",
    ),
    "multimodal": (
        lambda p: patch(p.with_suffix(".idx"), 122, b"\x00" * 4),
        r"d\.idx holds multimodal modes",
    ),
    "empty index": (lambda p: cut(p.with_suffix(".idx"), 0), r"d\.idx is truncated: it ends at byte 0"),
    "short bin": (
        lambda p: cut(p.with_suffix(".bin"), 10),
        r"d\.bin is too short: it ends at byte 10, .* bytes 8 to 16",
    ),
    "empty bin": (lambda p: cut(p.with_suffix(".bin"), 0), r"d\.bin is too short: it ends at byte 0"),
    "long bin": (
        lambda p: patch(p.with_suffix(".bin"), 16, b"\x00\x00"),
        r"d\.bin has 18 bytes, .* ends\s+at byte 16",
    ),
    "offset": (
        lambda p: patch(p.with_suffix(".idx"), 34 + 16 + 8, struct.pack("<q", 1 << 40)),
        r"sequence 1 is said to start at byte 1099511627776 of d\.bin, expected 6 \(at byte 58\)",
    ),
    "length": (
        lambda p: patch(p.with_suffix(".idx"), 34 + 4, struct.pack("<i", -1)),
        r"sequence 1 has length -1 \(at byte 38\)",
    ),
    "document table": (
        lambda p: patch(p.with_suffix(".idx"), 34 + 48 + 16, struct.pack("<q", 0)),
        r"entry 2 of the document table is 0 after 1 \(at byte 98\)",
    ),
    "document table end": (
        lambda p: patch(p.with_suffix(".idx"), 34 + 48 + 32, struct.pack("<q", 3)),
        r"the document table ends at sequence 3 of 4",
    ),
    "no idx": (lambda p: p.with_suffix(".idx").unlink(), r"d\.idx does not exist"),
    "no bin": (lambda p: p.with_suffix(".bin").unlink(), r"d\.bin does not exist"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_with_its_place(tmp_path: Path, name: str):
    write(tmp_path / "d", DOCUMENTS)
    damage, message = DAMAGE[name]
    damage(tmp_path / "d")
    with pytest.raises(UserError, match=message):
        IndexedReader(tmp_path / "d")


def test_no_such_document(tmp_path: Path):
    write(tmp_path / "d", DOCUMENTS)
    with pytest.raises(UserError, match="has documents 0 to 3, not 4"):
        IndexedReader(tmp_path / "d").document(4)


MEGATRON_SCRIPT = """
import importlib.machinery, sys
from unittest import mock
import torch, numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
folder = sys.argv[1]
ours = IndexedDataset(folder + "/ours")
np.savez(
    folder + "/read.npz",
    lengths=ours.sequence_lengths,
    documents=ours.document_indices,
    **{f"d{i}": ours[i] for i in range(len(ours))},
)
builder = IndexedDatasetBuilder(folder + "/theirs.bin", dtype=np.int32)
builder.add_document(torch.tensor([1, 2, 3, 4]), [4])
builder.add_document(torch.tensor([70000, 6]), [1, 1])      # a document of two sequences
builder.add_document(torch.tensor([7, 8, 9]), [3])
builder.finalize(folder + "/theirs.idx")
builder = IndexedDatasetBuilder(folder + "/same.bin", dtype=np.uint16)
for i in range(len(ours)):
    builder.add_document(torch.from_numpy(ours[i].astype(np.int32)), [len(ours[i])])
builder.finalize(folder + "/same.idx")
"""


@pytest.mark.skipif(
    importlib.util.find_spec("megatron") is None,
    reason="needs megatron-core: pip install --no-deps megatron-core==0.16.1",
)
def test_megatron_reads_ours_and_we_read_megatrons(tmp_path: Path):
    """In a process of its own: importing megatron-core changes torch's global state."""
    documents = [[5, 6, 7, 0], [1, 0], [65000, 2, 3, 4, 0]]
    write(tmp_path / "ours", documents)
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-c", MEGATRON_SCRIPT, str(tmp_path)],
        check=True,
        env=environment,
        capture_output=True,
        timeout=120,
    )
    read = np.load(tmp_path / "read.npz")
    assert read["lengths"].tolist() == [4, 2, 5]
    assert read["documents"].tolist() == [0, 1, 2, 3]
    assert [read[f"d{i}"].tolist() for i in range(3)] == documents
    theirs = IndexedReader(tmp_path / "theirs")
    assert [theirs.document(i).tolist() for i in range(len(theirs))] == [[1, 2, 3, 4], [70000, 6], [7, 8, 9]]
    assert theirs.document_starts(0, 3).tolist() == [0, 4, 6]
    assert [theirs.locate(p) for p in range(theirs.tokens)] == [0] * 4 + [1] * 2 + [2] * 3
    for part in ("bin", "idx"):
        assert (tmp_path / f"same.{part}").read_bytes() == (tmp_path / f"ours.{part}").read_bytes()
