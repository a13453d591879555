"""Host memory: the peak so far. `keep_freed_pages` is in `megalite_kernels.memory`."""

from __future__ import annotations

import platform
import resource

import torch


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory so far: of the allocator on a GPU, of the resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024
