"""The stages of the attention lab, emulated: each is right, reads what it says, and has no bank conflict."""

from __future__ import annotations

import pytest
import torch

from megalite_kernels.native.cuda.emulated import reporting
from megalite_kernels.native.cuda.kernel import Kernel
from megalite_kernels.native.cuda.runtime import launch
from tests.helpers.attention import plain
from tests.helpers.attention_lab import BLOCK_N, DIM, QUERIES, STAGES
from tests.ops.catalogue import random

HEADS, TOKENS = 2, 75


@pytest.mark.parametrize("kernel", STAGES, ids=[kernel.name.removeprefix("attention_") for kernel in STAGES])
def test_a_stage_is_right_and_reads_what_it_says(kernel: Kernel) -> None:
    q, k, v = (random(HEADS, TOKENS, DIM, seed=i).bfloat16() for i in range(3))
    out = torch.empty_like(q)
    grid = (-(-TOKENS // QUERIES), HEADS, 1)
    with reporting() as reports:
        launch(kernel, grid, (q, k, v, out, TOKENS, DIM**-0.5), q.device)
    expected, _ = plain(*(x.transpose(0, 1)[None].double() for x in (q, k, v)), None, None, {})
    torch.testing.assert_close(out.double(), expected[0].transpose(0, 1), rtol=2**-6, atol=2**-7)
    (report,) = reports
    assert report.bank_conflicts == 0
    assert report.global_written_bytes == out.numel() * 2
    assert report.global_read_bytes == q.numel() * 2 + HEADS * DIM * 2 * _keys_and_values(kernel)


def _keys_and_values(kernel: Kernel) -> int:
    """How many rows of k and v a head's kernel reads."""
    if kernel is STAGES[0]:
        return 3 * TOKENS * (TOKENS + 1) // 2
    ends = (min(TOKENS, start + QUERIES) for start in range(0, TOKENS, QUERIES))
    return 2 * sum(min(TOKENS, -(-end // BLOCK_N) * BLOCK_N) for end in ends)
