from __future__ import annotations

import errno
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from megalite.interop import tensor_file
from megalite.interop.tensor_file import Entry, plan_files, runs, side_by_side

VALUES = {
    "b.weight": torch.randn(3, 5),
    "a": torch.randn(7).double(),
    "größe": torch.randn(4, 6).bfloat16(),
    "c": torch.randn(2, 3, 4),
    "empty": torch.empty(0, 5),
    "half": torch.randn(1).half(),
}


def entries(values: dict[str, torch.Tensor]) -> list[Entry]:
    return [Entry(name, tuple(v.shape), v.dtype) for name, v in values.items()]


def test_the_bytes_are_those_of_the_safetensors_library(tmp_path):
    [file] = plan_files(entries(VALUES), "ours")
    file.create(tmp_path)
    with file.writer(tmp_path) as out:
        for name, value in VALUES.items():
            out.write(name, (0,) * value.dim(), value)
    save_file(VALUES, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.parametrize("shape", [(6,), (4, 6), (1, 1), (3, 4, 5)])
def test_blocks_written_in_any_order_make_the_whole(shape, tmp_path):
    whole = torch.randn(shape)
    [file] = plan_files([Entry("w", shape, torch.float32)], "f")
    file.create(tmp_path)
    blocks = [()]
    for n in shape:  # every dim cut unevenly in two
        blocks = [(*b, part) for b in blocks for part in (slice(0, n // 3), slice(n // 3, n))]
    for block in reversed(blocks):
        with file.writer(tmp_path) as out:
            out.write("w", tuple(s.start for s in block), whole[block])
    assert torch.equal(load_file(tmp_path / "f.safetensors")["w"], whole)


def test_a_transposed_block_is_written_as_it_reads(tmp_path):
    whole = torch.randn(5, 3)
    [file] = plan_files([Entry("w", (3, 5), torch.float32)], "f")
    file.create(tmp_path)
    with file.writer(tmp_path) as out:
        out.write("w", (0, 0), whole.t())
    assert torch.equal(load_file(tmp_path / "f.safetensors")["w"], whole.t())


def test_runs_are_as_long_as_they_can_be():
    assert list(runs((4, 6), (0, 0), (4, 6))) == [(0, 24)]
    assert list(runs((4, 6), (1, 0), (2, 6))) == [(6, 12)]
    assert list(runs((4, 6), (1, 2), (2, 3))) == [(8, 3), (14, 3)]
    assert list(runs((9,), (4,), (3,))) == [(4, 3)]
    assert list(runs((4, 6), (1, 2), (0, 3))) == []


def test_blocks_side_by_side_become_one():
    whole = torch.arange(48.0).view(6, 8)
    cuts = [
        ((0, 0), (6, 3)),
        ((0, 3), (6, 3)),
        ((0, 7), (6, 1)),
        ((2, 0), (1, 4)),
        ((3, 4), (1, 4)),
        ((4, 0), (2, 8)),
    ]
    blocks = [((r, c), whole[r : r + n, c : c + m]) for (r, c), (n, m) in cuts]
    joined = list(side_by_side(blocks))
    assert [offset for offset, _ in joined] == [(0, 0), (0, 7), (2, 0), (3, 4), (4, 0)]
    assert torch.equal(joined[0][1], whole[:, :6])
    assert all(
        torch.equal(block, whole[r : r + block.shape[0], c : c + block.shape[1]]) for (r, c), block in joined
    )
    assert [offset for offset, _ in side_by_side([((0,), whole[0, :4]), ((4,), whole[0, 4:])])] == [
        (0,),
        (4,),
    ]


def test_files_are_divided_in_order_and_named_like_those_of_transformers():
    parts = plan_files(entries(VALUES), "weights/model", max_bytes=100)
    assert [list(p.entries) for p in parts] == [["b.weight"], ["a"], ["größe"], ["c", "empty", "half"]]
    assert [p.name for p in parts] == [f"weights/model-{i:05d}-of-00004.safetensors" for i in range(1, 5)]
    text = tensor_file.index_text(parts)
    assert '"a": "model-00002-of-00004.safetensors"' in text
    assert f'"total_size": {sum(v.nbytes for v in VALUES.values())}' in text


def test_short_writes_are_continued_and_errors_name_the_file(tmp_path, monkeypatch):
    whole = torch.randn(40, 40)
    [file] = plan_files([Entry("w", (40, 40), torch.float32)], "f")
    file.create(tmp_path)
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, data[:1000], at))
    with file.writer(tmp_path) as out:
        out.write("w", (0, 0), whole)
    assert torch.equal(load_file(tmp_path / "f.safetensors")["w"], whole)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left") as failure, file.writer(tmp_path) as out:
        out.write("w", (0, 0), whole)
    assert failure.value.filename == str(tmp_path / "f.safetensors")
