"""Reductions and gathers of buckets: when they start, what waits for them, how many bytes they move."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from megalite.config import ParallelConfig
from megalite.parallel import gathering
from megalite.parallel.collectives import all_gather
from megalite.parallel.data import FlatBuffers
from megalite.parallel.gradients import WeightQueue, get_sink
from megalite.parallel.mesh import Axis, Mesh, mesh_of_group
from megalite.parallel.pieces import iter_pieces, piece_view
from megalite.parallel.tensor import UNSPLIT
from tests.helpers.rank_pool import RankFailure
from tests.helpers.trace import Events, assert_hidden, trace
from tests.parallel.layouts import MODELS, build, loss_of
from tests.parallel.replicas import make_replica
from tests.parallel.states import (
    CPU,
    RATE,
    Part,
    compare,
    copies_of,
    forward_backward,
    make_batches,
    sgd,
    whole,
)

DEEP = dataclasses.replace(MODELS["qwen3-tied"], num_layers=4)


class Rank:
    """A model, its state and two micro-batches on one rank."""

    def __init__(self, name: str, dtype: torch.dtype = torch.float32, **layout: Any) -> None:
        self.layout = ParallelConfig(**layout)
        self.mesh = mesh_of_group(self.layout, CPU)
        self.model = build(MODELS[name], UNSPLIT, torch.float32)
        self.state = FlatBuffers(self.model, self.mesh, dtype, self.layout)
        self.batches = make_batches(2 * self.mesh.dp.size)[self.mesh.dp.rank :: self.mesh.dp.size]

    def backward(self) -> None:
        forward_backward(self.model, self.mesh, self.layout, self.batches, 0.01)

    def step(self) -> None:
        self.state.start_step(len(self.batches))
        self.backward()
        self.state.finish_gradients()
        sgd(self.state)


def traced_step(rank: Rank) -> tuple[Events, Events]:
    """The backward pass and what ends it; the update and the forward pass after it."""
    rank.state.start_step(2)
    with trace() as backward:
        rank.backward()
        rank.state.finish_gradients()
    with trace() as update:
        sgd(rank.state)
        rank.state.start_step(2)
        rank.backward()
    rank.state.finish_gradients()
    rank.state.release()
    return backward, update


def wait_at_once(state: FlatBuffers) -> None:
    """What the order would be if nothing were hidden."""
    reducer, gatherer = state.reducer, state.gatherer
    launch, start = reducer._launch, gatherer.start

    def launch_and_wait() -> None:
        launch()
        reducer._running[-1].finish()

    def start_and_wait() -> None:
        start()
        gatherer.settle()

    reducer._launch, gatherer.start = launch_and_wait, start_and_wait  # type: ignore[method-assign]


def overlap_job(name: str, early: bool) -> None:
    rank = Rank(name, bucket_size=3000)
    if early:
        wait_at_once(rank.state)
    rank.step()  # counts gradients, and sees which modules are called
    backward, update = traced_step(rank)
    count = len(rank.state.buckets)
    assert count > 5
    # The norms' bucket waits for the first layer's, the embedding's for the embedding: no product comes after them.
    # A tied matrix stands in the embedding's, so the head has none of its own.
    assert_hidden(backward, "reduce_scatter", by="mm", count=count, exposed=3)
    first = backward.of("reduce_scatter")[0]
    assert len(backward.behind(first, by="mm")) >= 10, backward  # of 16 in the layers of a micro-batch
    # The first layer needs the embedding and its norm before any product.
    assert_hidden(update, "all_gather", by="mm", count=count, exposed=3)


@pytest.mark.parametrize("name", ["llama", "qwen3-tied", "gpt2"])
def test_reductions_hide_behind_the_backward_pass_and_gathers_behind_the_forward(rank_pool, name):
    rank_pool(2).run(overlap_job, name, False)


def test_an_early_wait_is_seen(rank_pool):
    with pytest.raises(RankFailure, match=r"7 exposed, not 3"):
        rank_pool(2).run(overlap_job, "llama", True)


def bytes_job(name: str, dtype: torch.dtype, layout: dict[str, Any]) -> dict[tuple[str, int], float]:
    rank = Rank(name, dtype, bucket_size=800, **layout)
    rank.step()
    with trace() as events:
        rank.step()
        rank.state.release()
    sent: dict[tuple[str, int], float] = {}
    for launch in events.launches:
        if launch.bytes > 8:  # not the loss
            key = launch.kind, len(launch.group)
            sent[key] = sent.get(key, 0) + launch.sent_bytes
    elements = sum(bucket.weights.numel() for bucket in rank.state.buckets)
    parameters = sum(parameter.numel() for parameter in rank.model.parameters())
    assert parameters <= elements <= 1.25 * parameters  # small buckets, much padding
    return {kind: size / elements for kind, size in sent.items()}


@pytest.mark.parametrize(
    ("layout", "dtype", "expected"),
    [
        ({}, torch.float32, {("reduce_scatter", 4): 4 * 3 / 4, ("all_gather", 4): 4 * 3 / 4}),
        ({}, torch.bfloat16, {("reduce_scatter", 4): 4 * 3 / 4, ("all_gather", 4): 2 * 3 / 4}),
        ({"zero": 0}, torch.bfloat16, {("all_reduce", 4): 2 * 4 * 3 / 4}),
        (
            {"dp_shard": 2},
            torch.bfloat16,
            {("reduce_scatter", 2): 4 / 2, ("all_reduce", 2): 2 * 2 / 2, ("all_gather", 2): 2 / 2},
        ),
        (
            {"grad_reduce_dtype": "bf16"},
            torch.bfloat16,
            {("all_to_all", 4): 2 * 3 / 4, ("all_gather", 4): 2 * 3 / 4},
        ),
        (
            {"grad_reduce_dtype": "bf16", "zero": 0},
            torch.bfloat16,
            {("all_to_all", 4): 2 * 3 / 4, ("all_gather", 4): 2 * 3 / 4},
        ),
        (
            {"grad_reduce_dtype": "bf16", "dp_shard": 2},
            torch.bfloat16,
            {("all_to_all", 2): 2 / 2 + 1 / 2, ("all_gather", 2): 1 / 2 + 2 / 2},
        ),
    ],
    ids=str,
)
def test_bytes_that_a_rank_sends_for_each_element(rank_pool, layout, dtype, expected):
    """A step of two micro-batches: gradients once, weights once, (n - 1) / n of them for n ranks that divide them."""
    for sent in rank_pool(4).run(bytes_job, "llama", dtype, layout):
        assert sent == pytest.approx(expected)


def narrow_job(layout: dict[str, Any]) -> tuple[list[Tensor], list[Tensor], list[slice]]:
    rank = Rank("llama", bucket_size=800, grad_reduce_dtype="bf16", **layout)
    rank.state.start_step(2)
    rank.backward()
    local = [
        bucket.main_grad.clone() for bucket in rank.state.buckets
    ]  # nothing was launched in a first step
    rank.state.finish_gradients()
    sums = [bucket.main_grad[bucket.own].clone() for bucket in rank.state.buckets]
    rank.state.release()
    return local, sums, [bucket.own for bucket in rank.state.buckets]


@pytest.mark.parametrize(
    ("layout", "roundings"),
    [({}, 1), ({"zero": 0}, 2), ({"dp_shard": 2}, 3)],
    ids=["zero1", "zero0", "dp_shard2"],
)
def test_bf16_on_the_wire_is_summed_in_fp32(rank_pool, layout, roundings):
    """Each time a number travels it is rounded, by 2^-8 at most: gradients, sums of a replica, the whole sum."""
    answers = rank_pool(4).run(narrow_job, layout)
    for bucket in range(len(answers[0][0])):
        exact = torch.stack([local[bucket] for local, _, _ in answers])
        sent = exact.bfloat16().float()
        for _, sums, own in answers:
            got, mine = sums[bucket], own[bucket]
            if roundings == 1:
                torch.testing.assert_close(got, sent[:, mine].sum(0), rtol=1e-6, atol=0)
            else:
                assert (got == got.bfloat16()).all(), "ranks that own the same must have the same numbers"
            bound = 1.01 * roundings * 2.0**-8 * exact[:, mine].abs().sum(0)
            assert ((got - exact[:, mine].sum(0)).abs() <= bound).all()


def late_gradient_job() -> str:
    rank = Rank("llama", bucket_size=3000)
    rank.step()
    rank.state.start_step(1)
    try:
        rank.backward()
    except ValueError as error:
        return str(error)
    finally:
        rank.state.reducer.finish()
    return ""


def test_a_gradient_after_the_last_is_refused(rank_pool):
    for message in rank_pool(2).run(late_gradient_job):
        assert message.startswith("a gradient of head.weight arrived after those of all 1 micro-batches")


def deferred_job() -> bool:
    """Weight gradients computed after both backward passes, as zero-bubble pipelines do, with and without overlap."""
    rank, usual = Rank("llama", bucket_size=3000), Rank("llama", bucket_size=3000)
    queue = WeightQueue()
    for parameter in rank.model.parameters():
        if (sink := get_sink(parameter)) is not None:
            sink.queue = queue
    for _ in range(3):
        for one in (usual, rank):
            one.state.start_step(2)
            one.backward()
            queue.take()()
            launched = len(one.state.reducer._running)
            one.state.finish_gradients()
            sgd(one.state)
    assert launched == len(rank.state.buckets), "the counts were not learned: nothing starts before the end"
    pairs = zip(rank.state.boxes("master"), usual.state.boxes("master"), strict=True)
    return all(torch.equal(a.tensor, b.tensor) for a, b in pairs)


def test_deferred_weight_gradients_are_counted_where_they_come(rank_pool):
    assert rank_pool(2).run(deferred_job) == [True, True]


def pipeline_job(schedule: Any, steps: int) -> tuple[list[bool], list[Part]]:
    """Whether all reductions had started before the end of each step, and this rank's weights after the last."""
    layout = ParallelConfig(pp=2, pp_schedule=schedule, bucket_size=3000)
    batches = make_batches(8)
    replica = make_replica(layout, DEEP, torch.float64, 32)
    state = replica.state
    assert isinstance(state, FlatBuffers)
    early = []
    for _ in range(steps):
        replica.gradients(batches[replica.mesh.dp.rank :: replica.mesh.dp.size], torch.tensor(1 / 128))
        early.append(len(state.reducer._running) == len(state.buckets))
        state.finish_gradients()
        sgd(state)
    return early, copies_of(state.boxes("master"))


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved_zero_bubble", "zbv", "dualpipev"])
def test_a_pipeline_reduces_before_its_end(rank_pool, schedule):
    """Gradients are counted per micro-batch whatever the order in which a schedule makes them."""
    answers = rank_pool(4).run(pipeline_job, schedule, 3)
    assert all(early == [False, True, True] for early, _ in answers)
    model, batches = build(DEEP, UNSPLIT, torch.float64), make_batches(8)
    for _ in range(3):
        model.zero_grad()
        for batch in batches:
            (loss_of(model, batch, None) / 128).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(parameter.grad, alpha=RATE)
    truth = {piece.name: piece_view(p.detach(), piece) for p, _, piece in iter_pieces(model)}
    compare(whole([part for _, parts in answers for part in parts]), truth, 1e-10, "weight")


class LateWork:
    """A gather that moves nothing before it is waited for."""

    def __init__(self, whole: Tensor, shard: Tensor, axis: Axis) -> None:
        self.whole, self.shard, self.axis = whole, shard.clone(), axis
        whole.fill_(torch.nan)

    def wait(self) -> None:
        self.whole.copy_(all_gather(self.shard, self.axis))


def late_weights_job(name: str) -> tuple[float, float]:
    """A third step's loss: with gathers as they are, and with such that do nothing until they are waited for."""
    losses = []
    original = gathering.start_all_gather_into
    for late in (False, True):
        rank = Rank(name, bucket_size=800)
        rank.step()
        try:
            if late:
                rank.state.settle()
                gathering.start_all_gather_into = LateWork  # type: ignore[assignment]
            rank.step()
            rank.state.start_step(2)
            losses.append(forward_backward(rank.model, rank.mesh, rank.layout, rank.batches, 0.01))
            rank.state.finish_gradients()
            rank.state.release()
        finally:
            gathering.start_all_gather_into = original
    return losses[0], losses[1]


@pytest.mark.parametrize("name", ["llama", "qwen3-tied", "gpt2"])
def test_no_weight_is_used_before_it_is_there(rank_pool, name):
    """The head's matrix too, whose module nobody calls."""
    for usual, late in rank_pool(2).run(late_weights_job, name):
        assert usual == late


def test_one_process_reduces_and_gathers_nothing():
    model = build(MODELS["llama"], UNSPLIT, torch.float32)
    state = FlatBuffers(model, Mesh(device=CPU), torch.float32, ParallelConfig(grad_reduce_dtype="bf16"))
    with trace() as events:
        for _ in range(2):
            state.start_step(1)
            forward_backward(model, Mesh(device=CPU), ParallelConfig(), make_batches(1), 0.01)
            state.finish_gradients()
            sgd(state)
    assert not events.launches
    assert state.local_finite()
