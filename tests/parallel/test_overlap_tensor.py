"""Tensor parallelism hides its communication, seen in traces: what is launched before which product, and how much.

Every proof is run on an early wait too, which it must reject.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from megalite.config import ModelConfig, ParallelConfig
from megalite.layers.linear import ColumnParallelLinear, RowParallelLinear
from megalite.parallel import chunked, loss, tensor
from megalite.parallel.gradients import GradientSink, WeightQueue, set_sink
from megalite.parallel.loss import vocab_parallel_losses
from megalite.parallel.mesh import Axis, mesh_of_group
from megalite.parallel.tensor import Shard, TensorSplit
from tests.helpers.trace import Events, assert_hidden, impatient, trace
from tests.parallel.layouts import SHAPE, build, loss_of, packed_batch

TOKENS, HIDDEN, WIDE = 32, 16, 24
STARTS = ("start_all_gather", "start_reduce_scatter", "start_all_reduce")
EARLY = {
    "nothing": (),
    "gather before dgrad": ((tensor, "start_all_gather"),),
    "sum before wgrad": ((chunked, "start_reduce_scatter"), (chunked, "start_all_reduce")),
    "each chunk": tuple((chunked, name) for name in STARTS),
    "in the loss": (
        (loss, "start_reduce_scatter"),
        (loss, "start_all_reduce"),
        (chunked, "start_all_gather"),
    ),
}


@contextlib.contextmanager
def planted(early: str) -> Any:
    with contextlib.ExitStack() as stack:
        for module, name in EARLY[early]:
            stack.enter_context(impatient(module, name))
        yield


def tp_axis(ranks: int = 2) -> Axis:
    layout = ParallelConfig(tp=ranks, sequence_parallel=False)
    return mesh_of_group(layout, torch.device("cpu")).tp


def column(split: TensorSplit) -> tuple[ColumnParallelLinear, Tensor]:
    outputs = {"o": Shard.even(WIDE, split.axis)}
    rows = TOKENS // split.axis.size if split.sequence else TOKENS
    layer = ColumnParallelLinear(HIDDEN, outputs, split, bias=True, std=0.1)
    torch.nn.init.ones_(layer.weight)
    return layer, torch.randn(rows, HIDDEN, requires_grad=True)


def row(split: TensorSplit) -> tuple[RowParallelLinear, Tensor]:
    inputs = Shard.even(WIDE, split.axis)
    layer = RowParallelLinear(inputs, HIDDEN, split, name="o", bias=False, std=0.1)
    torch.nn.init.ones_(layer.weight)
    return layer, torch.randn(TOKENS, inputs.size, requires_grad=True)


def traced(make: Any, sequence: bool, chunks: int, early: str, deferred: bool = False) -> list[Events]:
    """Traces of a layer's forward and backward pass."""
    layer, x = make(TensorSplit(tp_axis(), sequence, chunks))
    if deferred:
        sink = GradientSink(torch.zeros_like(layer.weight), lambda: None)
        sink.queue = WeightQueue()
        set_sink(layer.weight, sink)
    with planted(early):
        with trace() as forward:
            y = layer(x)
        with trace() as backward:
            y.sum().backward()
    return [forward, backward]


def rejected(job: Any, *args: Any) -> None:
    """The job's own assertion fails on this rank."""
    with pytest.raises(AssertionError, match=r"exposed, not"):
        job(*args)


def proven(rank_pool: Any, job: Any, *args: Any, early: str) -> None:
    """The job passes as the code is, and fails with an early wait."""
    rank_pool(2).run(job, *args, "nothing")
    rank_pool(2).run(rejected, job, *args, early)


def column_backward_job(sequence: bool, early: str) -> None:
    _, backward = traced(column, sequence, 1, early)
    if sequence:
        assert_hidden(backward, "all_gather", count=1)
        assert_hidden(backward, "reduce_scatter", count=1)
    else:
        assert_hidden(backward, "all_reduce", count=1)
    products = {"megalite.linear_fwd": 1, "megalite.linear_weight_grad": 1}
    assert Counter(c.name for c in backward.computes) == products, backward


@pytest.mark.parametrize(
    ("sequence", "early"),
    [(True, "gather before dgrad"), (True, "sum before wgrad"), (False, "sum before wgrad")],
)
def test_column_backward(rank_pool: Any, sequence: bool, early: str) -> None:
    """gather(x) behind dgrad and the sum of dx behind wgrad, without chunks."""
    proven(rank_pool, column_backward_job, sequence, early=early)


def column_deferred_job(sequence: bool, early: str) -> None:
    _, backward = traced(column, sequence, 4, early, deferred=True)
    assert_hidden(backward, "reduce_scatter" if sequence else "all_reduce", exposed=1, count=4)
    assert len(backward.computes) == 4, backward  # dgrad in chunks, and no wgrad


@pytest.mark.parametrize("sequence", [True, False])
def test_column_backward_without_its_weight_gradient(rank_pool: Any, sequence: bool) -> None:
    """A wgrad that a pipeline puts off hides nothing: all but the last chunk's sum is behind dgrad."""
    proven(rank_pool, column_deferred_job, sequence, early="sum before wgrad")


def row_backward_job(early: str) -> None:
    _, backward = traced(row, True, 4, early)
    assert_hidden(backward, "all_gather", exposed=1, count=4)
    _, whole = traced(row, True, 1, early)
    assert_hidden(whole, "all_gather", exposed=1, count=1)


def test_row_backward(rank_pool: Any) -> None:
    """The gather of dy hides in chunks only, behind dgrad; both products need it."""
    proven(rank_pool, row_backward_job, early="each chunk")


def forward_job(sequence: bool, chunks: int, early: str) -> None:
    of_column, _ = traced(column, sequence, chunks, early)
    of_row, _ = traced(row, sequence, chunks, early)
    assert_hidden(of_row, "reduce_scatter" if sequence else "all_reduce", exposed=1, count=chunks)
    if sequence:
        assert_hidden(of_column, "all_gather", exposed=1, count=chunks)
    else:
        assert not of_column.launches


@pytest.mark.parametrize("chunks", [2, 4])
@pytest.mark.parametrize("sequence", [True, False])
def test_forward_in_chunks(rank_pool: Any, sequence: bool, chunks: int) -> None:
    """Only the first gather and the last sum are exposed."""
    proven(rank_pool, forward_job, sequence, chunks, early="each chunk")


def loss_traces(sequence: bool, chunks: int, early: str) -> list[Events]:
    axis = tp_axis()
    split = TensorSplit(axis, sequence, chunks)
    rows = TOKENS // axis.size if sequence else TOKENS
    hidden = torch.randn(rows, HIDDEN, requires_grad=True)
    weight = torch.randn(20, HIDDEN, requires_grad=True)
    place = {"first_row": 20 * axis.rank, "valid_rows": 20, "vocab_size": 40, "ignore_index": -100}
    with planted(early):
        with trace() as forward:
            losses = vocab_parallel_losses(hidden, weight, torch.arange(TOKENS), split, **place)
        with trace() as backward:
            losses.sum().backward()
    return [forward, backward]


def loss_collectives_job(sequence: bool) -> None:
    forward, backward = loss_traces(sequence, 1, "nothing")
    hidden, stats = TOKENS * HIDDEN * 4, 2 * 4 * TOKENS * 4
    if sequence:
        assert [one.bytes for one in forward.of("all_gather")] == [hidden, stats], forward
        assert backward.counts() == {"all_gather": 1, "reduce_scatter": 1}, backward
    else:
        assert [one.bytes for one in forward.of("all_gather")] == [stats], forward
        assert backward.counts() == {"all_reduce": 1}, backward
    assert forward.counts() == {"all_gather": 2 if sequence else 1}, forward
    assert {one.bytes for one in backward.launches} == {hidden}


@pytest.mark.parametrize("sequence", [True, False])
def test_the_loss_takes_one_collective(rank_pool: Any, sequence: bool) -> None:
    """Statistics of all ranks in one gather; with sequence parallelism the hidden states are gathered besides."""
    rank_pool(2).run(loss_collectives_job, sequence)


def loss_chunks_job(sequence: bool, early: str) -> None:
    forward, backward = loss_traces(sequence, 4, early)
    assert_hidden(backward, "reduce_scatter" if sequence else "all_reduce", exposed=1, count=4)
    if sequence:
        assert_hidden(forward, "all_gather", exposed=2, count=5)  # the first chunk and the statistics
        assert_hidden(backward, "all_gather", exposed=1, count=4)


@pytest.mark.parametrize("sequence", [True, False])
def test_the_loss_in_chunks(rank_pool: Any, sequence: bool) -> None:
    proven(rank_pool, loss_chunks_job, sequence, early="in the loss")


def model_bytes_job(layers: int, sequence: bool, chunks: int) -> list[dict[str, int]]:
    """Bytes by kind of a model's forward and backward pass."""
    shape = {**SHAPE, "num_layers": layers}
    axis = tp_axis(4)
    config = ModelConfig(**shape, num_key_value_heads=2, qk_norm=True, family="qwen3")
    model = build(config, TensorSplit(axis, sequence, chunks), torch.float32)
    with trace() as forward:
        total = loss_of(model, packed_batch(TOKENS), None)
    with trace() as backward:
        total.backward()
    assert len({launch.group for launch in (*forward.launches, *backward.launches)}) == 1
    return [next(iter(events.bytes_by_group().values())) for events in (forward, backward)]


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("sequence", [True, False])
def test_bytes_of_a_layer(rank_pool: Any, sequence: bool, chunks: int) -> None:
    """The formula, by the difference of three layers and one: two gathers and two scatters forward, and so on."""
    unit = TOKENS * SHAPE["hidden_size"] * 4
    if sequence:
        # Backward: dy of both row-parallel products and x of both column-parallel ones are gathered.
        expected = [
            {"all_gather": 2 * unit, "reduce_scatter": 2 * unit},
            {"all_gather": 4 * unit, "reduce_scatter": 2 * unit},
        ]
    else:
        expected = [{"all_reduce": 2 * unit}, {"all_reduce": 2 * unit}]
    one, three = (rank_pool(4).run(model_bytes_job, n, sequence, chunks)[0] for n in (1, 3))
    for passed, a, b in zip(expected, one, three, strict=True):
        assert {kind: (b[kind] - a.get(kind, 0)) // 2 for kind in passed} == passed
        assert all(b[kind] == a[kind] for kind in b.keys() - passed.keys())
