"""The stages of csrc/cuda/lab/attention_*.cuh, in order, as instances for heads of 64 features."""

from __future__ import annotations

from megalite_kernels.native.cuda.kernel import instance

DIM, BLOCK_N = 64, 32
STAGES = (
    instance("lab/attention_01_thread_per_query.cuh", "attention_thread_per_query", threads=64, DIM=DIM),
    instance(
        "lab/attention_02_shared_tiles.cuh",
        "attention_shared_tiles",
        threads=64,
        shared_bytes=4 * BLOCK_N * DIM,
        DIM=DIM,
        BLOCK_N=BLOCK_N,
    ),
    instance(
        "lab/attention_03_tensor_cores.cuh",
        "attention_tensor_cores",
        threads=128,
        shared_bytes=2 * (64 + 2 * BLOCK_N) * DIM,
        DIM=DIM,
        BLOCK_N=BLOCK_N,
    ),
)
"""Each block of all three takes `QUERIES` queries."""
QUERIES = 64
