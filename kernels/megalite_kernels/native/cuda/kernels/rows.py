"""How rows are laid over threads (csrc/cuda/rows.cuh): which instance of a norm takes which length of row."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from megalite_kernels.native.cuda.kernel import Kernel, instance

SIZES = {"bf16": 2, "fp16": 2, "float": 4}
"""Bytes of an element, by the name of its type in the sources."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Threads of a row, elements that each holds, threads of a block."""

    lanes: int
    items: int
    threads: int

    @property
    def columns(self) -> int:
        """The longest row that fits; of a longer one, what a block takes in a turn."""
        return self.lanes * self.items

    @property
    def groups(self) -> int:
        """Rows that a block works on at a time."""
        return self.threads // self.lanes


# 16 elements a thread, two 16-byte loads of bf16. At 48 registers 1,300 threads share a multiprocessor, with 40 KB
# under way together (25 bytes/ns of an H100's at a latency of 0.6 us ask for 15). Up to 512 columns a warp or less
# takes a row, with no barrier at all.
FORWARD = (
    Rows(8, 8, 128),
    Rows(16, 8, 128),
    Rows(32, 8, 128),
    Rows(32, 16, 128),
    Rows(64, 16, 64),
    Rows(128, 16, 128),
    Rows(256, 16, 256),
    Rows(512, 16, 512),
    Rows(1024, 16, 1024),
)
FORWARD_LONG = Rows(512, 16, 512)
# The backward keeps a row, its gradient and its columns' sums: 512 threads of 128 registers fill a multiprocessor.
BACKWARD = FORWARD[:-1]
# RMSNorm has one sum a column and not two: 16-bit rows of 1,024 threads have room in 64 registers.
BACKWARD_WIDE = FORWARD
# Single elements take a register each, where pairs share one.
FORWARD_SINGLE = FORWARD[:-1]
BACKWARD_SINGLE = (
    Rows(8, 8, 128),
    Rows(16, 8, 128),
    Rows(32, 8, 128),
    Rows(64, 8, 64),
    Rows(128, 8, 128),
    Rows(256, 8, 256),
    Rows(512, 8, 512),
)
BACKWARD_LONG = Rows(256, 8, 256)
"""A stripe of a row that is longer than the backward's registers."""
MEANS_LONG = Rows(512, 16, 512)
"""What sums over whole rows of that length."""


def shortest(table: tuple[Rows, ...], hidden: int) -> Rows | None:
    """The first entry that holds a row of `hidden` columns; None if it is too long for all."""
    return next((rows for rows in table if hidden <= rows.columns), None)


def backward_table(element: str, weight: str, run: int, *, centered: bool) -> tuple[Rows, ...]:
    """The backward's entries for these types; `centered` for LayerNorm."""
    if run == 1:
        return BACKWARD_SINGLE
    return BACKWARD if centered or SIZES[element] > 2 or SIZES[weight] > 2 else BACKWARD_WIDE


def run_of(element: str, aligned: bool) -> int:
    """Elements that move together: 16 bytes, or one where lengths or addresses don't allow that."""
    return 16 // SIZES[element] if aligned else 1


def forward_kernel(
    source: str, name: str, element: str, weight: str, *, hidden: int, aligned: bool
) -> tuple[Kernel, Rows]:
    """The forward for rows of `hidden` columns: `name`, or `name`_long; and how its rows lie."""
    rows = shortest(FORWARD if aligned else FORWARD_SINGLE, hidden)
    if rows is None:
        return row_kernel(source, f"{name}_long", element, weight, FORWARD_LONG, aligned), FORWARD_LONG
    return row_kernel(source, name, element, weight, rows, aligned), rows


@functools.cache
def row_kernel(
    source: str, name: str, element: str, weight: str, rows: Rows, aligned: bool, *, partial: bool = False
) -> Kernel:
    """An instance with rows laid out as `rows` says.

    Args:
        source: file of csrc/cuda.
        name: of the kernel.
        element: type of the rows.
        weight: type of the weight.
        rows: threads and elements.
        aligned: whether 16 bytes move at a time.
        partial: its blocks add up the columns of their row groups, in shared memory.
    """
    slots = 4 * 4 * max(1, rows.threads // 32)  # two sets of two floats a warp
    sums = 4 * rows.items * rows.threads if partial and rows.groups > 1 else 0
    return instance(
        source,
        name,
        threads=rows.threads,
        shared_bytes=max(slots, sums),
        ELEMENT=element,
        WEIGHT=weight,
        RUN=run_of(element, aligned),
        ITEMS=rows.items,
        LANES=rows.lanes,
    )


@functools.cache
def sum_kernel(weight: str) -> Kernel:
    """Adds up the partial sums of a gradient of type `weight`."""
    return instance("sum_partials.cuh", "sum_partials", threads=256, shared_bytes=1024, WEIGHT=weight)


SHIPPED = [sum_kernel("bf16"), sum_kernel("fp16"), sum_kernel("float")]
