"""The instances of the rotary kernels, csrc/cuda/rope.cuh: how a head is laid over lanes."""

from __future__ import annotations

import functools

from megalite_kernels.native.cuda.kernel import Kernel, instance
from megalite_kernels.native.cuda.kernels.rows import run_of

THREADS = 128
MAX_DIM = 512
"""Features of a head: 32 lanes with 16 each."""
BLOCKS_OF_BACKWARD = 3
"""On a multiprocessor: 160 registers for each of 384 threads."""


def rope_kernel(
    name: str,
    element: str,
    weight: str,
    *,
    dim: int,
    half: int,
    interleaved: bool,
    aligned: bool,
) -> Kernel:
    """An instance for heads of `dim` features, of which twice `half` turn.

    Args:
        name: rope_forward, rope_norm_forward or rope_norm_backward.
        element: type of the heads.
        weight: type of the norms' weights.
        dim: features of a head, up to `MAX_DIM`.
        half: pairs that turn.
        interleaved: pairs are neighbours.
        aligned: whether 16 bytes move at a time.
    """
    run = run_of(element, aligned)
    # A unit is 2 * run features: of those that turn, or of those that pass through.
    count = max(1, -(-half // run) + -(-(dim - 2 * half) // (2 * run)))
    lanes = min(32, 1 << (count - 1).bit_length())
    units = 1 << (-(-count // lanes) - 1).bit_length()
    return _instance(name, element, weight, run, units, lanes, int(interleaved), THREADS)


@functools.cache
def _instance(
    name: str, element: str, weight: str, run: int, units: int, lanes: int, interleaved: int, threads: int
) -> Kernel:
    return instance(
        "rope.cuh",
        name,
        threads=threads,
        shared_bytes=4 * 2 * run * units * threads if name == "rope_norm_backward" else 0,
        ELEMENT=element,
        WEIGHT=weight,
        RUN=run,
        UNITS=units,
        LANES=lanes,
        INTERLEAVED=interleaved,
    )


SHIPPED = [
    rope_kernel(name, "bf16", "bf16", dim=dim, half=dim // 2, interleaved=False, aligned=True)
    for dim in (64, 128)
    for name in ("rope_forward", "rope_norm_forward", "rope_norm_backward")
]
"""Whole heads of Llama's and Qwen's sizes; the others are compiled where they are used."""
