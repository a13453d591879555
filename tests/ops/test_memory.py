"""Buffers in huge pages are buffers of zeros, wherever the memory comes from."""

from __future__ import annotations

import platform
import subprocess
import sys
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
    inner = both[1:-1]
    if memory._advise(inner.data_ptr(), inner.nbytes, memory._MADV_DONTNEED):
        assert (both[0], both[-1]) == (1, 1)
        assert both.sum() < both.numel()


def test_no_advice_where_there_are_no_huge_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "enabled"
    monkeypatch.setattr(memory, "_HUGE_PAGES", file)
    # Of the pool, where an earlier test of this process took one, all is in huge pages already.
    monkeypatch.setattr(memory.pool, "owns", lambda address: False)
    large = torch.empty(LARGE)
    assert not memory._can_advise(large)
    file.write_text("always madvise [never]\n")
    assert not memory._can_advise(large)
    file.write_text("always [madvise] never\n")
    assert memory._can_advise(large)
    assert not memory._can_advise(large[:100])
    assert not memory._can_advise(large.share_memory_())
    assert not memory._can_advise(torch.empty(LARGE, device="meta"))


HEAP = """
import ctypes, mmap, os, torch
from megalite_kernels import memory

def flags(address):
    inside = False
    for line in open("/proc/self/smaps"):
        if "-" in line.split(" ", 1)[0]:
            start, end = (int(x, 16) for x in line.split(" ", 1)[0].split("-"))
            inside = start <= address < end
        elif inside and line.startswith("VmFlags"):
            return line.split()[1:]

assert memory.keep_freed_pages()
end = ctypes.CDLL(None).sbrk
end.restype = ctypes.c_void_p
before = end(0)
for _ in range(2):
    tensor = torch.empty((1 << 31) + 4096, dtype=torch.uint8)  # more than an int counts, none of it written
    enough = os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE // 2 > tensor.nbytes + (1 << 20)
    expected = enough and memory._reservable() and not limited
    assert ("hg" in flags(tensor.data_ptr() + 4096)) == expected, flags(tensor.data_ptr())
    del tensor
    assert end(0) >= before
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the heap is glibc's")
@pytest.mark.parametrize("limited", [False, True])
def test_the_heap_is_kept_in_huge_pages(limited: bool) -> None:
    """Where addresses are limited there is no reserve."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))" if limited else ""
    code = f"{limit}\nlimited = {limited}\n{HEAP}"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
