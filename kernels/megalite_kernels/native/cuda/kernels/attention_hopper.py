"""Instances of the attention kernels of Hopper: head dims 64 and 128 in bf16 and fp16, on sm_90a alone."""

from __future__ import annotations

from megalite_kernels.native.cuda.kernel import Kernel, instance

ELEMENTS = ("bf16", "fp16")
DIMS = (64, 128)
ROWS_OF_CONSUMER = 64
"""One warp group's, the height of a wgmma."""

# (consumer warp groups, rows of a tile of the ring, stages of the ring) by head dim. The limits are registers: 240 a
# thread with two consumers, 160 with three, of which an output of 128 features takes 64 and one of 64 takes 32.
_FORWARD = {64: (3, 128, 4), 128: (2, 128, 2)}
_DK_DV = {64: (2, 64, 4), 128: (2, 64, 2)}
_DQ = {64: (2, 128, 3), 128: (2, 64, 3)}


def owned_rows(kernel: Kernel) -> int:
    """Queries (of dk_dv: keys) of a block."""
    return ROWS_OF_CONSUMER * int(dict(kernel.defines)["CONSUMERS"])


def ring_rows(kernel: Kernel) -> int:
    """Keys (of dk_dv: queries) of a tile of the ring."""
    return int(dict(kernel.defines)["BLOCK_N"])


def forward(element: str, dim: int) -> Kernel:
    """Output and log-sum-exp."""
    consumers, rows, stages = _FORWARD[dim]
    shared = _tiles(dim, ROWS_OF_CONSUMER * consumers + 2 * stages * rows) + 8 * (1 + 4 * stages)
    return _instance("forward", element, dim, _FORWARD[dim], shared)


def dk_dv(element: str, dim: int) -> Kernel:
    """Gradients of keys and values."""
    _, rows, stages = _DK_DV[dim]
    return _instance(
        "dk_dv", element, dim, _DK_DV[dim], _backward_bytes(dim, _DK_DV[dim]) + 8 * stages * rows
    )


def dq(element: str, dim: int) -> Kernel:
    """Gradient of queries."""
    return _instance("dq", element, dim, _DQ[dim], _backward_bytes(dim, _DQ[dim]))


def _tiles(dim: int, rows: int) -> int:
    return 2 * dim * rows


def _backward_bytes(dim: int, blocks: tuple[int, int, int]) -> int:
    consumers, rows, stages = blocks
    return _tiles(dim, 2 * ROWS_OF_CONSUMER * consumers + 2 * stages * rows) + 8 * (1 + 2 * stages)


def _instance(name: str, element: str, dim: int, blocks: tuple[int, int, int], shared_bytes: int) -> Kernel:
    consumers, rows, stages = blocks
    return instance(
        f"attention_hopper_{'forward' if name == 'forward' else 'backward'}.cuh",
        f"attention_hopper_{name}",
        threads=128 * (1 + consumers),
        shared_bytes=shared_bytes,
        target="sm_90a",
        BLOCK_N=rows,
        CONSUMERS=consumers,
        DIM=dim,
        ELEMENT=element,
        STAGES=stages,
    )


SHIPPED = [make(element, dim) for make in (forward, dk_dv, dq) for element in ELEMENTS for dim in DIMS]
