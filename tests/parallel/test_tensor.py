"""Tensor and sequence parallelism, alone and with other axes, against one process: loss, every gradient, the norm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megalite.config import ParallelConfig
from megalite.layers.linear import ColumnParallelLinear, RowParallelLinear
from megalite.parallel.mesh import mesh_of_group
from megalite.parallel.tensor import Shard, TensorSplit
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


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize(("tp", "chunks"), [(2, 2), (2, 3), (4, 3)])
def test_chunks(rank_pool: Any, tp: int, chunks: int, sequence: bool, name: str) -> None:
    """32 tokens: three chunks are uneven whether cut whole, in 2 or in 4."""
    check(rank_pool, tp, name, 1, tp=tp, sequence_parallel=sequence, tp_chunks=chunks)


def exact_job(dtype: torch.dtype, sequence: bool, tokens: int) -> list[tuple[int, str]]:
    """(chunks, tensor) wherever a layer's result differs from that without chunks, on small whole numbers."""
    axis = mesh_of_group(ParallelConfig(tp=dist.get_world_size()), torch.device("cpu")).tp
    inputs, outputs = Shard.even(48, axis), {"o": Shard.even(40, axis)}
    results: dict[int, list[Tensor]] = {}
    for chunks in (1, 2, 3, 5, 100):
        split = TensorSplit(axis, sequence, chunks)
        generator = torch.Generator().manual_seed(axis.rank)
        column = ColumnParallelLinear(32, outputs, split, bias=True, std=0.1, dtype=dtype)
        row = RowParallelLinear(inputs, 24, split, name="o", bias=True, std=0.1, dtype=dtype)
        shard = tokens // axis.size if sequence else tokens
        shapes = [p.shape for p in (*column.parameters(), *row.parameters())]
        shapes += [(shard, 32), (tokens, inputs.size), (tokens, outputs["o"].size), (shard, 24)]
        *values, x, y, dx, dy = (torch.randint(-1, 2, s, generator=generator).to(dtype) for s in shapes)
        parameters = [*column.parameters(), *row.parameters()]
        for parameter, value in zip(parameters, values, strict=True):
            parameter.data.copy_(value)
        leaves = [*parameters, x.requires_grad_(), y.requires_grad_()]
        out = [column(x), row(y)]
        results[chunks] = [*out, *torch.autograd.grad(out, leaves, [dx, dy])]
    names = ["column", "row", "dweight", "dbias", "row dweight", "row dbias", "dx", "row dx"]
    return [
        (chunks, name)
        for chunks, tensors in results.items()
        for name, tensor, expected in zip(names, tensors, results[1], strict=True)
        if not torch.equal(tensor, expected)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize(("tp", "tokens"), [(2, 20), (4, 28)])
def test_chunks_keep_every_token_in_its_place(
    rank_pool: Any, tp: int, tokens: int, sequence: bool, dtype: torch.dtype
) -> None:
    """Also chunks of uneven length, and more of them than tokens.

    On numbers whose sums are exact, so that only a wrong row can differ. On others the bits are those of the matrix
    product for fewer rows (the same ones for multiples of 16 rows, here), and from 3 ranks on those of an all-reduce
    that starts elsewhere.
    """
    for different in rank_pool(tp).run(exact_job, dtype, sequence, tokens):
        assert different == []


@pytest.mark.parametrize("name", ["qwen3-tied", "gpt2"])
@pytest.mark.parametrize(
    "layout", [{"cp": 2}, {"cp": 2, "cp_method": "ulysses"}, {"cp": 4}, {"tp": 2, "cp": 2}]
)
def test_context_parallel(rank_pool: Any, layout: dict[str, Any], name: str) -> None:
    check(rank_pool, 2 if layout.get("cp") == 2 and "tp" not in layout else 4, name, 1, **layout)


@pytest.mark.slow  # tests/parallel/test_matrix.py trains in the same layouts of eight ranks
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("layout", [{"tp": 2}, {"tp": 2, "cp": 2}, {"cp": 4}, {"tp": 4}])
def test_eight_ranks(rank_pool: Any, layout: dict[str, Any], name: str) -> None:
    """dp takes what is left of eight ranks; batches have unequal numbers of valid labels."""
    check(rank_pool, 8, name, 4, **layout)
