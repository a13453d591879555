"""Tensor and sequence parallelism against one process: loss, every gradient, the norm, initial weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.parallel.layouts import (
    MODELS,
    assert_equal,
    one_process,
    packed_batch,
    put_together,
    tensor_parallel_job,
)

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("tp", [2, 4])
def test_equals_one_process(rank_pool: Any, tp: int, sequence: bool, name: str) -> None:
    for dtype, tolerance in TOLERANCE.items():
        batch = packed_batch()
        truth = one_process(MODELS[name], dtype, batch)
        got = put_together(rank_pool(tp).run(tensor_parallel_job, MODELS[name], sequence, dtype, batch))
        assert_equal(got, truth, tolerance)
