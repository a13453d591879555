"""Host memory on CPUs: keep freed pages instead of faulting them in again."""

from __future__ import annotations

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_pages() -> bool:
    """Let glibc keep freed memory instead of returning it to the kernel; True where that was possible.

    By default each large tensor is mapped when made and unmapped when freed, and every page is faulted in
    again, which costs all but the smallest models a good part of a CPU training step. This changes the whole
    process, so only commands that train or measure call it, and only on CPUs.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    mmap_ok = libc.mallopt(_M_MMAP_MAX, 0)
    trim_ok = libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    return bool(mmap_ok and trim_ok)
