"""The stages of csrc/cuda/lab/rms_norm_*.cuh, in order, as instances for rows of 4,096 columns."""

from __future__ import annotations

from megalite_kernels.native.cuda.kernel import instance

HIDDEN = 4096
THREADS = 256
STAGES = tuple(
    instance(
        f"lab/rms_norm_{number:02}_{name}.cuh",
        f"rms_norm_{name}",
        threads=THREADS,
        shared_bytes=4 * shared,
        **({"ITEMS": HIDDEN // THREADS} if number >= 4 else {}),
    )
    for number, (name, shared) in enumerate(
        (
            ("thread_per_row", 0),
            ("block_per_row", THREADS),
            ("shuffles", THREADS // 32),
            ("registers", THREADS // 32),
            ("vectors", THREADS // 32),
        ),
        start=1,
    )
)
