"""Instances of scaled_copy.cuh. Standard library only."""

from __future__ import annotations

from functools import cache

from megalite_kernels.native.cuda.kernel import Kernel, instance

BYTES = {"bf16": 2, "fp16": 2, "float": 4}
"""Of the types that are read and written."""
THREADS = 256
ITEMS = 4
"""Groups that a thread has: 64 bytes of loads in flight."""


@cache
def copy(source: str, to: str) -> Kernel:
    """The kernel of `x * scale` in another type."""
    return instance("scaled_copy.cuh", "scaled_copy", threads=THREADS, SOURCE=source, TARGET=to, ITEMS=ITEMS)


def blocks(size: int, source: str, to: str) -> int:
    """Blocks for so many elements; a group of a thread is 16 bytes of the wider type."""
    group = 16 // max(BYTES[source], BYTES[to])
    return -(-size // (group * ITEMS * THREADS))


SHIPPED = [
    *(copy("float", to) for to in BYTES),
    copy("bf16", "bf16"),
    copy("fp16", "fp16"),
]
