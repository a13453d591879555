"""Instances of the attention kernels for `mma.sync` (csrc/cuda/attention_forward.cuh, attention_backward.cuh).

Standard library only. Every one keeps to 99 KiB of shared memory, which consumer GPUs have too, and compiles without
spills for each architecture it is chosen for (tests/cuda_gate).
"""

from __future__ import annotations

from dataclasses import dataclass

from megalite_kernels.native.cuda.kernel import Kernel, instance

ELEMENTS = ("bf16", "fp16")
FORWARD_WIDTHS = (64, 96, 128, 256)
"""Columns computed: a head takes the least that holds its dim, zeros fill the rest."""
BACKWARD_WIDTHS = FORWARD_WIDTHS[:-1]
"""dk and dv of 256 columns and 16 keys are 256 registers of each thread: there are not as many."""
STATISTICS_TOKENS = 64
"""Tokens of a head that a block of `attention_statistics` owns."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """Rows that a block owns, rows it passes over at a time, warps, and how many of the latter are under way."""

    owned: int
    passed: int
    warps: int
    stages: int = 2


# 32 rows a warp halve the traffic from shared memory of 16; the accumulators of 128 columns and more leave no registers
# for them in dk_dv, which has two, nor in forward as it is compiled for sm_90 and later.
FORWARD = {
    64: Tiles(128, 64, 4),
    96: Tiles(128, 32, 4),
    128: Tiles(128, 32, 4),
    256: Tiles(64, 32, 4),
}
FORWARD_90 = FORWARD | {128: Tiles(128, 64, 8)}
DK_DV = {64: Tiles(128, 64, 8), 96: Tiles(128, 32, 8), 128: Tiles(128, 32, 8)}
DQ = {64: Tiles(128, 32, 4), 96: Tiles(128, 32, 4), 128: Tiles(128, 32, 8)}


def width_of(dim: int) -> int:
    """Columns that a head of `dim` is computed with."""
    return next(width for width in FORWARD_WIDTHS if width >= dim)


def forward(element: str, width: int, architecture: int) -> Kernel:
    """`attention_forward`: a block owns queries and passes over keys."""
    tiles = (FORWARD_90 if architecture >= 90 else FORWARD)[width]
    return _kernel("attention_forward.cuh", "attention_forward", element, width, tiles, 1, queries_owned=True)


def dk_dv(element: str, width: int) -> Kernel:
    """`attention_dk_dv`: a block owns keys and passes over queries and their statistics."""
    return _kernel(
        "attention_backward.cuh", "attention_dk_dv", element, width, DK_DV[width], 2, queries_owned=False
    )


def dq(element: str, width: int) -> Kernel:
    """`attention_dq`: a block owns queries and passes over keys."""
    return _kernel("attention_backward.cuh", "attention_dq", element, width, DQ[width], 2, queries_owned=True)


def statistics(element: str) -> Kernel:
    """`attention_statistics`: base-2 log-sum-exp and delta of every row."""
    return instance(
        "attention_backward.cuh",
        "attention_statistics",
        threads=128,
        shared_bytes=128 * 4,
        ELEMENT=element,
        BLOCK_T=STATISTICS_TOKENS,
    )


def _kernel(
    source: str, name: str, element: str, width: int, tiles: Tiles, owned_tiles: int, *, queries_owned: bool
) -> Kernel:
    row_bytes = -(-width // 64) * 64 * 2
    rows = owned_tiles * tiles.owned + 2 * tiles.stages * tiles.passed
    shared = rows * row_bytes + (0 if queries_owned else 8 * tiles.stages * tiles.passed)
    queries, keys = (tiles.owned, tiles.passed) if queries_owned else (tiles.passed, tiles.owned)
    return instance(
        source,
        name,
        threads=32 * tiles.warps,
        shared_bytes=shared,
        ELEMENT=element,
        DIM=width,
        BLOCK_M=queries,
        BLOCK_N=keys,
        STAGES=tiles.stages,
    )


def _shipped() -> list[Kernel]:
    kernels = []
    for element in ELEMENTS:
        for width in (128, 64):
            versions = (forward(element, width, 80), forward(element, width, 90))
            kernels += [*dict.fromkeys(versions), dk_dv(element, width), dq(element, width)]
        kernels.append(statistics(element))
    return kernels


SHIPPED = _shipped()
"""Compiled when megalite is installed where nvcc is; other widths when they are first used."""
