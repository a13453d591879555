"""Tensor and sequence parallelism, alone and with other axes, against one process: loss, every gradient, the norm."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megalite.config import ParallelConfig
from tests.parallel.layouts import MODELS, assert_equal, layout_job, one_process, packed_batch, put_together

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def check(rank_pool: Any, ranks: int, name: str, num_batches: int, **layout: Any) -> None:
    for dtype, tolerance in TOLERANCE.items():
        batches = [packed_batch(seed=seed) for seed in range(num_batches)]
        truth = one_process(MODELS[name], dtype, batches)
        answers = rank_pool(ranks).run(layout_job, ParallelConfig(**layout), MODELS[name], dtype, batches)
        assert_equal(put_together(answers), truth, tolerance)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("tp", [2, 4])
def test_tensor_parallel(rank_pool: Any, tp: int, sequence: bool, name: str) -> None:
    check(rank_pool, tp, name, 1, tp=tp, sequence_parallel=sequence)


@pytest.mark.parametrize("name", ["qwen3-tied", "gpt2"])
@pytest.mark.parametrize(
    "layout", [{"cp": 2}, {"cp": 2, "cp_method": "ulysses"}, {"cp": 4}, {"tp": 2, "cp": 2}]
)
def test_context_parallel(rank_pool: Any, layout: dict[str, Any], name: str) -> None:
    check(rank_pool, 2 if layout.get("cp") == 2 and "tp" not in layout else 4, name, 1, **layout)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("layout", [{"tp": 2}, {"tp": 2, "cp": 2}, {"cp": 4}, {"tp": 4}])
def test_eight_ranks(rank_pool: Any, layout: dict[str, Any], name: str) -> None:
    """dp takes what is left of eight ranks; batches have unequal numbers of valid labels."""
    check(rank_pool, 8, name, 4, **layout)
