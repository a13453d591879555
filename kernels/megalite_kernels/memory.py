"""Host memory on CPUs: which pages stand behind it, and for how long."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import mmap
import os
import platform
from pathlib import Path

import torch
from torch import Tensor

from megalite_kernels import pool

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_MADV_DONTNEED, _MADV_HUGEPAGE = 4, 14  # linux/mman.h
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")
_LEAST_BYTES = 16 << 20
"""Smaller tensors have too few huge pages to matter."""


def keep_freed_pages() -> bool:
    """Keep freed memory in this process instead of returning it to the kernel; True where that was possible.

    By default each large tensor is mapped when made and unmapped when freed, and every page is faulted in
    again, which costs all but the smallest models a good part of a CPU training step. What is kept is asked for in
    pages of 2 MB: products read rows that are kilobytes apart, each in a page of its own, and a step of llama-60m on
    an Intel Xeon with AMX took 537-551 ms for 582-614. Tensors of 64 KB and more come from a pool of their own where
    that is built (`pool`), which leaves fewer holes: there that step then needed 252 MB above its state, for 326 from
    glibc alone. This changes the whole process, so only commands that train or measure call it, and only on CPUs.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    if _addresses_are_free():
        pool.install(_physical_bytes())
    libc = ctypes.CDLL(None)
    mmap_ok = libc.mallopt(_M_MMAP_MAX, 0)
    trim_ok = libc.mallopt(_M_TRIM_THRESHOLD, -1)  # never
    if mmap_ok and trim_ok and _reservable():
        _reserve_in_huge_pages(_physical_bytes() // 2)
    return bool(mmap_ok and trim_ok)


def allocator() -> str:
    """What `keep_freed_pages` gives a process on this machine, for records."""
    pooled = pool.library() is not None and _addresses_are_free()
    return "pool, and glibc, freed pages kept" if pooled else "glibc, freed pages kept"


def release_freed_pages() -> None:
    """Give free memory back to the kernel all the same."""
    gc.collect()
    pool.release()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def _physical_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE


def _reservable() -> bool:
    """The kernel has huge pages for who asks, and addresses without memory behind them count for nothing."""
    return _huge_pages_on_request() and _addresses_are_free()


def _addresses_are_free() -> bool:
    """Addresses without memory behind them count for nothing."""
    if not _OVERCOMMIT.exists() or _OVERCOMMIT.read_text(encoding="ascii").strip() == "2":
        return False
    import resource  # not on Windows

    limits = (resource.RLIMIT_AS, resource.RLIMIT_DATA)
    return all(resource.getrlimit(limit)[0] == resource.RLIM_INFINITY for limit in limits)


def _reserve_in_huge_pages(size: int) -> None:
    """Grow glibc's heap by `size` bytes of addresses, whose memory comes in huge pages when it is written.

    Pages are advised before they are there, and glibc, which maps nothing and trims nothing, hands them out later.
    """
    libc = ctypes.CDLL(None)
    libc.malloc.argtypes, libc.malloc.restype = (ctypes.c_size_t,), ctypes.c_void_p
    libc.free.argtypes = (ctypes.c_void_p,)
    start = libc.malloc(size)
    if start is not None:
        _advise(start, size, _MADV_HUGEPAGE)
        libc.free(start)


def zeros_in_huge_pages(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch.zeros` for a long-lived buffer: on Linux's CPUs in pages of 2 MB where the kernel gives them.

    Fewer address translations: passes over 30M parameters' state on a Zen 4 took 18.6 ms for 22.6 (AdamW), 4.2 for 6.1
    (zeros) and 4.0 for 5.4 (norm).
    """
    tensor = torch.empty(size, dtype=dtype, device=device)
    # Pages that are there already stay small: they go, and come back large.
    if _can_advise(tensor) and _advise(tensor.data_ptr(), tensor.nbytes, _MADV_HUGEPAGE):
        _advise(tensor.data_ptr(), tensor.nbytes, _MADV_DONTNEED)
    return tensor.zero_()


def _can_advise(tensor: Tensor) -> bool:
    """The tensor is large, plain memory of this process not in huge pages yet, which the kernel has for who asks."""
    plain = tensor.device.type == "cpu" and tensor.is_contiguous() and not tensor.is_shared()
    if not plain or type(tensor) is not Tensor or tensor.nbytes < _LEAST_BYTES:
        return False
    return not pool.owns(tensor.data_ptr()) and _huge_pages_on_request()


def _huge_pages_on_request() -> bool:
    with contextlib.suppress(FileNotFoundError):
        return "[never]" not in _HUGE_PAGES.read_text(encoding="ascii")
    return False


def _advise(start: int, size: int, advice: int) -> bool:
    """Advice on the pages that hold nothing but these bytes."""
    page = mmap.PAGESIZE
    first, end = -(-start // page) * page, (start + size) // page * page
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return bool(madvise(first, end - first, advice) == 0)
