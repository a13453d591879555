"""Instances of grad_norm.cuh. Standard library only."""

from __future__ import annotations

from functools import cache

from megalite_kernels.native.cuda.kernel import Kernel, instance

SLOTS = 8
"""Tensors that one launch takes."""
CHUNK = 1 << 15
"""Elements whose squares make one partial sum; fixed, so that the order depends on the sizes only."""
THREADS = 256
UNROLL = 4


@cache
def partial(element: str) -> Kernel:
    """The kernel of the chunks' sums of squares."""
    return instance(
        "grad_norm.cuh", "grad_norm_partial", threads=THREADS, shared_bytes=_sums(), ELEMENT=element, CHUNK=CHUNK,
        UNROLL=UNROLL,
    )  # fmt: skip


@cache
def total() -> Kernel:
    """The kernel of the root of their sum."""
    return instance("grad_norm.cuh", "grad_norm_total", threads=THREADS, shared_bytes=_sums())


def chunks(size: int) -> int:
    """Partial sums of a tensor."""
    return -(-size // CHUNK)


def _sums() -> int:
    return THREADS // 32 * 8


SHIPPED = [partial("float"), partial("bf16"), partial("fp16"), total()]
