"""Buffers in huge pages are buffers of zeros, wherever the memory comes from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megalite_kernels import memory

LARGE = (memory._LEAST_BYTES + 4096) // 4 + 3  # not a whole number of pages


@pytest.mark.parametrize("size", [0, 5, LARGE])
def test_zeros_in_huge_pages_are_zeros(size: int) -> None:
    dirty = torch.ones(size)  # freed memory, with whatever was in it
    del dirty
    made = memory.zeros_in_huge_pages(size, torch.float32, torch.device("cpu"))
    assert made.shape == (size,)
    assert made.dtype == torch.float32
    assert not made.any()


def test_what_stands_beside_a_buffer_keeps_its_values() -> None:
    """Advice goes to whole pages of a tensor only: its neighbours' are none of its business."""
    both = torch.ones(LARGE + 2)
    if memory._advise(both[1:-1], memory._MADV_DONTNEED):
        assert (both[0], both[-1]) == (1, 1)
        assert both.sum() < both.numel()


def test_no_advice_where_there_are_no_huge_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "enabled"
    monkeypatch.setattr(memory, "_HUGE_PAGES", file)
    large = torch.empty(LARGE)
    assert not memory._can_advise(large)
    file.write_text("always madvise [never]\n")
    assert not memory._can_advise(large)
    file.write_text("always [madvise] never\n")
    assert memory._can_advise(large)
    assert not memory._can_advise(large[:100])
    assert not memory._can_advise(large.share_memory_())
    assert not memory._can_advise(torch.empty(LARGE, device="meta"))
