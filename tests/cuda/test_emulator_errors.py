"""Each mistake that the emulator is to catch: planted in a small kernel and caught, and its right twin left alone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from megalite_kernels.native.cuda.emulated import EmulationError, reporting
from megalite_kernels.native.cuda.emulated_build import BuildError
from megalite_kernels.native.cuda.kernel import Kernel, instance
from megalite_kernels.native.cuda.runtime import launch

SOURCE = str(Path(__file__).parent / "kernels" / "bad.cuh")
CPU = torch.device("cpu")
THREADS = 64
SEEDS = ("0", "1", "2", "3")

# The kernel, what its error says, and what else is not as in most: see `_kernel` and `_run`.
MISTAKES: list[tuple[str, str, dict[str, Any]]] = [
    ("missing_barrier", r"this (read|write) at bad.cuh:\d+|nothing has written", {}),
    ("overwritten_too_early", "race on shared memory", {}),
    ("missing_syncwarp", "race on shared memory", {}),
    (
        "uninitialised_shared",
        r"reads byte 252 of shared memory at bad.cuh:\d+, which nothing has written",
        {},
    ),
    ("reads_past_the_end", "reads 4 bytes .* at byte 256 of argument 0, whose tensor has 256", {}),
    ("writes_before_the_start", "writes 4 bytes .* at byte -4 of argument 1", {}),
    ("writes_its_input", "writes 4 bytes .* of argument 0, which the kernel takes as const", {}),
    ("shared_too_small", "writes 4 bytes .* at byte 256 of shared memory, which has 256", {}),
    ("misaligned_vector", "reads 16 bytes .* 4 past a multiple of 16", {}),
    ("misaligned_plain", "writes 8 bytes .* 4 past a multiple of 8", {}),
    ("local_of_another", r"of the local variables of thread \d+", {"shared": 8 * THREADS}),
    ("null_pointer", "at the null pointer", {"more": [None]}),
    ("absent_lane", r"__shfl_xor_sync|lane 5", {}),
    ("lane_not_in_mask", "names lane 16, which is read but not in the mask", {}),
    ("caller_not_in_mask", "does not name the calling lane 16", {}),
    ("diverged_lanes", "the lanes have diverged", {}),
    ("diverged_barrier", r"__syncthreads at line \d+, where other threads wait at the one of line \d+", {}),
    ("early_exit_before_barrier", "left the kernel|leaves the kernel", {}),
    ("named_barrier_too_many", "deadlock: 32 threads wait for ever: .* named_barrier_sync at bad.cuh", {}),
    ("named_barrier_wrong_id", "deadlock", {}),
    ("missing_async_wait", "an asynchronous copy is still to write: wait for the copy first", {}),
    ("async_over_reads", "race on shared memory .* is not ordered after the read", {}),
    ("global_race_in_block", "race on global memory .* of the same block", {}),
    ("global_race_of_blocks", "race on global memory .* of another block", {"blocks": 2}),
    ("last_block", "race on global memory .* of another block", {"blocks": 5, "more": ["counter"]}),
    ("atomic_and_plain", "race on shared memory", {}),
    ("unaligned_rows", "ldmatrix: lane 1 gives the address of byte 12", {"shared": 16 * THREADS}),
    ("endless_loop", "without waiting for anybody", {}),
    ("leaves_its_cluster", "has left the kernel|may still read", {"blocks": 2, "cluster": 2}),
    ("cluster_race", "race on shared memory|nothing has written", {"blocks": 2, "cluster": 2}),
]


def _kernel(name: str, options: dict[str, Any], **defines: int) -> Kernel:
    return instance(
        SOURCE,
        name,
        threads=THREADS,
        shared_bytes=options.get("shared", 4 * THREADS),
        cluster=options.get("cluster", 1),
        **defines,
    )


def _run(kernel: Kernel, options: dict[str, Any], bad: int = 0) -> None:
    x, y = torch.randn(THREADS), torch.zeros(2 * THREADS if options.get("blocks", 1) > 1 else THREADS)
    more = [
        torch.zeros(1, dtype=torch.int32) if value == "counter" else value
        for value in options.get("more", [])
    ]
    launch(kernel, (options.get("blocks", 1), 1, 1), [x, y, bad, *more], CPU)


@pytest.mark.parametrize(("name", "message", "options"), MISTAKES, ids=[name for name, _, _ in MISTAKES])
def test_mistake_is_caught_in_every_order(
    name: str, message: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = _kernel(name, options)
    for seed in SEEDS:
        monkeypatch.setenv("MEGALITE_CUDA_EMULATE_SEED", seed)
        _run(kernel, options)
        with pytest.raises(EmulationError, match=message) as caught:
            _run(kernel, options, bad=1)
        assert re.match(rf"{name}: (block \(\d, 0, 0\), thread \d+: |deadlock|thread)", str(caught.value))


def test_more_local_variables_than_a_stack_holds() -> None:
    _run(_kernel("large_locals", {}, LOCALS=1000), {})
    with pytest.raises(BuildError, match="frame size"):
        _run(_kernel("large_locals", {}, LOCALS=80000), {})


@pytest.mark.parametrize(("width", "conflicts"), [(1, 0), (2, 1), (4, 3), (32, 31), (33, 0)])
def test_bank_conflicts_of_strides(width: int, conflicts: int) -> None:
    kernel = _kernel("strided", {"shared": 4 * THREADS * width}, WIDTH=width)
    with reporting() as reports:
        _run(kernel, {})
    warps = THREADS // 32
    assert reports[0].bank_conflicts == warps * conflicts
    assert reports[0].shared_wavefronts == warps * (width + 1 + conflicts)


@pytest.mark.parametrize(("skew", "conflicts"), [(0, 0), (1, 4)])
def test_bank_conflicts_of_vectors(skew: int, conflicts: int) -> None:
    """A quarter of a warp is served at once: with every second vector, 8 of them are in 16 banks."""
    kernel = _kernel("vectors", {"shared": 4 * THREADS * 8}, SKEW=skew)
    with reporting() as reports:
        _run(kernel, {})
    assert reports[0].bank_conflicts == THREADS // 32 * conflicts
