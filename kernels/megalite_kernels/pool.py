"""Large tensors on CPUs from one pool of addresses (`csrc/pool`), instead of glibc's heap.

The library includes torch's headers, so unlike `_C` it fits one version of torch; where it is missing or fits another,
there is no pool, and all goes on as before.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
from typing import NamedTuple

import torch

LEAST_BYTES = 64 << 10
"""Smaller tensors stay with torch's own allocator."""


class Stats(NamedTuple):
    """What a pool holds now: bytes in use and the most that were, bytes up to the last that was ever in use, counts."""

    used_bytes: int
    peak_bytes: int
    reached_bytes: int
    blocks: int
    holes: int


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled pool; None where it was not built, or with another torch."""
    spec = importlib.util.find_spec("megalite_kernels._pool")
    if spec is None or spec.origin is None:
        return None
    try:
        loaded = ctypes.CDLL(spec.origin)
    except OSError:  # another torch, whose symbols are others
        return None
    loaded.megalite_pool_torch_version.restype = ctypes.c_char_p
    loaded.megalite_pool_install.argtypes = (ctypes.c_size_t, ctypes.c_size_t)
    loaded.megalite_pool_owns.argtypes = (ctypes.c_void_p,)
    loaded.megalite_pool_stats.argtypes = (ctypes.POINTER(ctypes.c_size_t), ctypes.c_int)
    loaded.megalite_pool_release.restype = loaded.megalite_pool_stats.restype = None
    built = loaded.megalite_pool_torch_version().decode()
    return loaded if built == torch.__version__.split("+")[0] else None


def install(size: int, least: int = LEAST_BYTES) -> bool:
    """Serve tensors of at least `least` bytes from `size` bytes of addresses from now on; True if that is so.

    The native kernels work in the same memory: what one needs for itself is free again when the next one runs.
    """
    loaded = library()
    if loaded is None or not loaded.megalite_pool_install(size, least):
        return False
    with contextlib.suppress(ImportError):
        from megalite_kernels import _C

        functions = (loaded.megalite_pool_take, loaded.megalite_pool_give)
        take, give = (ctypes.cast(function, ctypes.c_void_p).value or 0 for function in functions)
        _C.work_in(take, give)
    return True


def owns(address: int) -> bool:
    """Whether the address is one of the pool's."""
    loaded = library()
    return loaded is not None and bool(loaded.megalite_pool_owns(address))


def release() -> None:
    """Give free memory back to the system, in whole pages of 2 MB."""
    loaded = library()
    if loaded is not None:
        loaded.megalite_pool_release()


def stats(*, reset_peak: bool = False) -> Stats:
    """What the pool holds; `reset_peak` starts a new peak from what is in use now."""
    values = (ctypes.c_size_t * 5)()
    loaded = library()
    if loaded is not None:
        loaded.megalite_pool_stats(values, reset_peak)
    return Stats(*values)
