"""Instances of adamw.cuh. Standard library only."""

from __future__ import annotations

from functools import cache

from megalite_kernels.native.cuda.kernel import Kernel, instance

THREADS = 256
ITEMS = 2
"""Groups of 4 elements that a thread has: 128 bytes of loads in flight."""
GROUP = 4


@cache
def step(param: str, *, master: bool, remainder: bool = False, stochastic: bool = False) -> Kernel:
    """The kernel for parameters of type `param`: "float", "bf16" or "fp16"."""
    if remainder:
        return instance(
            "adamw.cuh", "adamw", threads=THREADS, PARAM=param, MASTER=int(master), REMAINDER=1, ITEMS=ITEMS
        )
    return instance(
        "adamw.cuh", "adamw", threads=THREADS, PARAM=param, MASTER=int(master), STOCHASTIC=int(stochastic),
        ITEMS=ITEMS,
    )  # fmt: skip


def blocks(size: int) -> int:
    """Blocks for so many elements."""
    return -(-size // (THREADS * ITEMS * GROUP))


SHIPPED = [
    step("float", master=False),
    step("float", master=True),
    step("bf16", master=True),
    step("fp16", master=True),
    step("bf16", master=False, remainder=True),
    step("bf16", master=False, stochastic=True),
]
