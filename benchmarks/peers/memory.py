"""Memory of this process while it trains: resident set on CPUs, the allocator on GPUs.

A child process starts with its parent's peak in ``ru_maxrss``, so Linux's /proc is read, where the peak can also be
set back.
"""

from __future__ import annotations

import gc
from pathlib import Path

import torch

from megalite_kernels.memory import release_freed_pages


def reset_peak(device: str) -> None:
    """Start a new peak from what is held now."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    file = Path("/proc/self/clear_refs")
    if file.exists():
        file.write_text("5", encoding="ascii")  # sets VmHWM to VmRSS


def peak_bytes(device: str) -> int:
    """The largest since `reset_peak`; 0 where the system does not say."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else status_bytes("VmHWM")


def held_bytes(device: str) -> int:
    """What is held now."""
    return torch.cuda.memory_allocated() if device == "cuda" else status_bytes("VmRSS")


def status_bytes(name: str) -> int:
    """An entry of /proc/self/status, 0 without it."""
    file = Path("/proc/self/status")
    if file.exists():
        for line in file.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return 0


def release(device: str) -> None:
    """Give back what is free, so that the next contender finds the whole machine."""
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
    else:
        release_freed_pages()


def available_bytes() -> int:
    """Memory that new allocations would find, 0 where the system does not say."""
    file = Path("/proc/meminfo")
    if file.exists():
        for line in file.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 0
