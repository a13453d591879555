"""Instances of cross_entropy.cuh, and which of them serves a row. Standard library only."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from megalite_kernels.native.cuda.kernel import Kernel, instance

SOURCE = "cross_entropy.cuh"
ELEMENTS = {"bf16": 2, "fp16": 2, "float": 4}
"""Types of logits, with their bytes."""

THREADS = 256
"""Of a block that reads its row from global memory: 8 of them on a multiprocessor, each with 4 vectors a thread in
flight."""
KEPT_THREADS = 512
"""Of a block whose row waits in shared memory, where 2 or 3 of them fit."""
PART_BYTES = 72 << 10
"""Of a row that one block of a cluster should keep: three blocks on a multiprocessor with 227 KiB, so that one loads
while others reduce and store."""
CLUSTERS = (1, 2, 4, 8)
SUMS_BYTES = 12
"""Of a maximum, a sum of exponentials and a plain sum."""
VECTOR_BYTES = 16


@cache
def forward(element: str) -> Kernel:
    """The kernel of losses and statistics."""
    sums = THREADS // 32 * SUMS_BYTES
    return instance(SOURCE, "cross_entropy_forward", threads=THREADS, shared_bytes=sums, ELEMENT=element)


@cache
def backward(element: str) -> Kernel:
    """The kernel of gradients from a known logsumexp."""
    return instance(SOURCE, "cross_entropy_backward", threads=THREADS, ELEMENT=element)


@cache
def gradient(element: str, cols: int, shared_limit: int, *, clusters: bool) -> tuple[Kernel, int]:
    """(kernel of loss and gradient for rows of `cols` logits, bytes of a row that each of its blocks keeps).

    A row that fits into one block's shared memory in PART_BYTES stays there; a longer one is divided among a cluster,
    where there are clusters; one that fits nowhere is read twice.

    Args:
        shared_limit: bytes that a block may have.
        clusters: whether the device has them (sm_90 and later).
    """
    vectors = -(-cols * ELEMENTS[element] // VECTOR_BYTES)
    sizes = CLUSTERS if clusters else CLUSTERS[:1]
    parts = {size: -(-vectors // size) * VECTOR_BYTES for size in sizes}
    size = next((size for size, part in parts.items() if part <= PART_BYTES), sizes[-1])
    kernel = _kept(element, clustered=size > 1)
    if parts[size] + kernel.shared_bytes > shared_limit:
        return _read_twice(element), 0
    return replace(kernel, shared_bytes=parts[size] + kernel.shared_bytes, cluster=size), parts[size]


def _kept(element: str, *, clustered: bool) -> Kernel:
    """Without the bytes of the row itself."""
    sums = KEPT_THREADS // 32 + (1 + CLUSTERS[-1] if clustered else 0)
    return instance(
        SOURCE, "cross_entropy_grad", threads=KEPT_THREADS, shared_bytes=sums * SUMS_BYTES,
        target="sm_90" if clustered else "sm_80", ELEMENT=element, KEEP=1, CLUSTERED=int(clustered),
    )  # fmt: skip


def _read_twice(element: str) -> Kernel:
    sums = THREADS // 32 * SUMS_BYTES
    return instance(
        SOURCE, "cross_entropy_grad", threads=THREADS, shared_bytes=sums, ELEMENT=element, KEEP=0, CLUSTERED=0
    )


SHIPPED = [
    kernel
    for element in ELEMENTS
    for kernel in (
        forward(element),
        backward(element),
        _kept(element, clustered=False),
        _kept(element, clustered=True),
        _read_twice(element),
    )
]
