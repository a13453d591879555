"""The stages of the RMSNorm lab, emulated: each computes what the reference does, and moves the bytes it states."""

from __future__ import annotations

import pytest
import torch

from megalite_kernels.native.cuda.emulated import reporting
from megalite_kernels.native.cuda.kernel import Kernel
from megalite_kernels.native.cuda.runtime import launch
from megalite_kernels.reference import rms_norm as reference
from tests.helpers.rms_norm_lab import HIDDEN, STAGES
from tests.ops.catalogue import random

NAMES = [kernel.name.removeprefix("rms_norm_") for kernel in STAGES]
READS = {"registers": 1, "vectors": 1}
"""Times that a stage reads x; the others do so twice."""


@pytest.mark.parametrize("kernel", STAGES, ids=NAMES)
def test_a_stage_is_right_and_reads_what_it_says(kernel: Kernel) -> None:
    # rows of 4,096 only fill the blocks of the later stages; a thread a row would take minutes
    rows, hidden = (300, 24) if kernel is STAGES[0] else (3, HIDDEN - 8)
    x, weight = random(rows, hidden).bfloat16(), random(hidden, seed=1).bfloat16()
    y = torch.empty_like(x)
    grid = -(-rows // kernel.threads) if kernel is STAGES[0] else rows
    with reporting() as reports:
        launch(kernel, (grid, 1, 1), (x, weight, y, rows, hidden, 1e-6), x.device)
    expected, _ = reference.forward(x, weight, 1e-6, False)
    torch.testing.assert_close(y, expected, rtol=2**-7, atol=1e-6)  # a sum in another order may round apart
    (report,) = reports
    times = READS.get(kernel.name.removeprefix("rms_norm_"), 2)
    assert report.global_read_bytes == (times + 1) * x.numel() * 2  # and the weight
    assert report.global_written_bytes == x.numel() * 2
    assert report.bank_conflicts == 0
    barriers = {"thread_per_row": 0, "block_per_row": 9}.get(kernel.name.removeprefix("rms_norm_"), 1)
    assert report.barriers >= barriers * grid
    assert kernel.name != "rms_norm_shuffles" or report.barriers == grid


def test_the_stages_end_where_the_kernel_begins() -> None:
    """The last one gives the bits of rms_norm.cuh for what it can do."""
    from megalite_kernels.native.cuda.rms_norm import forward

    x, weight = random(3, HIDDEN).bfloat16(), random(HIDDEN, seed=1).bfloat16()
    y = torch.empty_like(x)
    launch(STAGES[-1], (3, 1, 1), (x, weight, y, 3, HIDDEN, 1e-6), x.device)
    assert torch.equal(y, forward(x, weight, 1e-6, False)[0])
