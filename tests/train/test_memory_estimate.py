"""The memory estimate against models built on the meta device, and against what tiny ones really keep."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from megalite.config import ModelConfig, ParallelConfig, RecomputeConfig
from megalite.errors import UserError
from megalite.models.blocks import ModelPart
from megalite.models.presets import preset
from megalite.models.transformer import Transformer
from megalite.parallel.gradients import WeightQueue, get_sink
from megalite.parallel.mesh import Axis
from megalite.parallel.tensor import TensorSplit
from megalite.train.memory_activations import (
    Job,
    activation_peaks,
    recompute_choices,
    stage_bytes,
    weight_factors,
)
from megalite.train.memory_estimate import (
    RankMemory,
    estimate_memory,
    layer_parameters,
    outer_parameters,
    worst_rank,
)
from tests.helpers.kept import Watch
from tests.parallel.layouts import MODELS, loss_of, packed_batch
from tests.parallel.replicas import make_replica

GB = 1e9
KINDS = {
    "none": RecomputeConfig(kind="none"),
    "auto": RecomputeConfig(),
    "norm": RecomputeConfig(kind="selective", parts=("norm",)),
    "activation": RecomputeConfig(kind="selective", parts=("activation",)),
    "attention": RecomputeConfig(kind="selective", parts=("attention",)),
    "selective": RecomputeConfig(kind="selective"),
    "mlp": RecomputeConfig(kind="selective", parts=("mlp",)),
    "full": RecomputeConfig(kind="full"),
}
TOKENS = 64


def meta_parameters(model: ModelConfig, parallel: ParallelConfig, job: Job, rank: int) -> int:
    """Elements of the weights of one rank, by building it."""
    plan = job.stages
    own = plan.stages_of(rank)
    part = ModelPart(
        tuple(layer for stage in own for layer in plan.layers[stage]), 0 in own, plan.num_stages - 1 in own
    )
    split = TensorSplit(Axis(parallel.tp, 0), parallel.tp > 1)
    built = Transformer(model, split, part=part, device="meta")
    return sum(parameter.numel() for parameter in built.parameters())


@pytest.mark.parametrize("name", ["gpt2-1.5b", "llama3-8b", "llama3-70b", "qwen3-0.6b", "qwen2.5-0.5b"])
@pytest.mark.parametrize(
    "parallel",
    [
        ParallelConfig(),
        ParallelConfig(pp=4),
        ParallelConfig(pp=2, pp_schedule="zbv"),
        ParallelConfig(pp=2, pp_schedule="interleaved"),
    ],
    ids=["one", "1f1b", "zbv", "interleaved"],
)
def test_parameters_are_those_of_the_built_model(name: str, parallel: ParallelConfig) -> None:
    model = preset(name)
    divides = 8 if model.num_attention_heads % 8 == 0 else 5 if model.num_attention_heads % 5 == 0 else 2
    for tp in (1, divides):
        layout = dataclasses.replace(parallel, tp=tp)
        job = Job(model=model, parallel=layout, world_size=tp * layout.pp, tokens=1024, num_microbatches=4)
        for memory in estimate_memory(job):
            assert memory.parameters == meta_parameters(model, layout, job, memory.pp_rank)


@pytest.mark.parametrize("name", MODELS)
def test_parameters_of_small_models(name: str) -> None:
    built = Transformer(MODELS[name], device="meta")
    layers = MODELS[name].num_layers * layer_parameters(MODELS[name])
    assert layers + outer_parameters(MODELS[name]) == sum(p.numel() for p in built.parameters())


def kept_by(model: ModelConfig, parallel: ParallelConfig, recompute: RecomputeConfig) -> int:
    """Bytes that a whole forward pass leaves, measured; the batch itself was there before."""
    replica = make_replica(parallel, model, torch.float32, TOKENS, recompute=recompute)
    batch, watch, one = packed_batch(TOKENS), Watch(), torch.ones(())
    with watch:
        loss = loss_of(replica.model, batch, None, one)
    kept = watch.alive_at_rest(loss, batch.tokens, batch.labels)
    loss.backward()
    return kept


# Not in the formula: the scalars around the loss, and the batch's own offsets.
SCALARS = 64


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "qwen3-tied", "gpt2"])
def test_kept_bytes_of_a_whole_model(name: str, kind: str) -> None:
    job = Job(
        model=MODELS[name],
        parallel=ParallelConfig(),
        world_size=1,
        tokens=TOKENS,
        itemsize=4,
        recompute=KINDS[kind],
        gpu=False,
    )
    assert kept_by(MODELS[name], job.parallel, KINDS[kind]) == pytest.approx(stage_bytes(job)[0], abs=SCALARS)


def kept_by_kinds(model: ModelConfig, parallel: ParallelConfig) -> list[int]:
    return [kept_by(model, parallel, recompute) for recompute in KINDS.values()]


@pytest.mark.parametrize("sequence", [True, False])
@pytest.mark.parametrize("name", ["llama", "qwen3-tied", "gpt2"])
def test_kept_bytes_over_two_tensor_parallel_ranks(rank_pool: Any, name: str, sequence: bool) -> None:
    parallel = ParallelConfig(tp=2, sequence_parallel=sequence)
    job = Job(model=MODELS[name], parallel=parallel, world_size=2, tokens=TOKENS, itemsize=4, gpu=False)
    expected = [stage_bytes(dataclasses.replace(job, recompute=kind))[0] for kind in KINDS.values()]
    for kept in rank_pool(2).run(kept_by_kinds, MODELS[name], parallel):
        assert kept == pytest.approx(expected, abs=SCALARS)


def waiting_for_weights(model: ModelConfig, parallel: ParallelConfig) -> int:
    """Bytes that wait for a W pass after a backward pass with nothing else left."""
    replica = make_replica(parallel, model, torch.float32, TOKENS)
    queue = WeightQueue()
    for layer in replica.model.layers.parameters():
        if (sink := get_sink(layer)) is not None:
            sink.queue = queue
    batch, watch, one = packed_batch(TOKENS), Watch(), torch.ones(())
    with watch:
        loss = loss_of(replica.model, batch, None, one)
        loss.backward()
    kept = watch.alive_at_rest(loss)
    queue.take()()
    return kept


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_what_waits_for_the_weight_pass(rank_pool: Any, name: str) -> None:
    one = Job(model=MODELS[name], parallel=ParallelConfig(), world_size=1, tokens=TOKENS, itemsize=4)
    assert waiting_for_weights(one.model, one.parallel) == pytest.approx(weight_factors(one, 2), abs=SCALARS)
    two = dataclasses.replace(one, parallel=ParallelConfig(tp=2), world_size=2)
    for kept in rank_pool(2).run(waiting_for_weights, two.model, two.parallel):
        assert kept == pytest.approx(weight_factors(two, 2), abs=SCALARS)


LLAMA_8B = preset("llama3-8b")


def job_of(model: ModelConfig = LLAMA_8B, count: int = 8, **layout: Any) -> Job:
    parallel = ParallelConfig(**layout)
    world = layout.get("tp", 1) * layout.get("pp", 1) * layout.get("cp", 1) * 4
    return Job(model=model, parallel=parallel, world_size=world, tokens=8192, num_microbatches=count)


def test_state_is_divided_as_zero_says() -> None:
    terms: dict[int, RankMemory] = {zero: estimate_memory(job_of(zero=zero))[0] for zero in (0, 1, 3)}
    count = terms[0].parameters
    assert (terms[0].weights, terms[0].gradients, terms[0].optimizer) == (2 * count, 4 * count, 10 * count)
    assert (terms[1].weights, terms[1].gradients, terms[1].optimizer) == (
        2 * count,
        4 * count,
        10 * count // 4,
    )
    assert (terms[3].weights, terms[3].gradients, terms[3].optimizer) == (count, count, 2 * count)
    assert terms[1].gathered == 0
    assert 0 < terms[3].gathered < terms[1].weights
    alone = dataclasses.replace(job_of(zero=3), world_size=1)
    assert estimate_memory(alone) == estimate_memory(dataclasses.replace(job_of(zero=0), world_size=1))
    fp32 = dataclasses.replace(job_of(zero=1), itemsize=4)
    assert estimate_memory(fp32)[0].optimizer == 2 * count  # the master is the weights' own slice
    half = estimate_memory(job_of(zero=1, dp_shard=2))[0]
    assert half.optimizer == 5 * count
    whole = dataclasses.replace(job_of(zero=1), remainders=False)
    assert estimate_memory(whole)[0].optimizer == 3 * count  # fp32 masters


def test_fp8_copies_are_counted_where_they_are_kept() -> None:
    """Llama 3 8B: 6.98e9 numbers of the layers' matrices at two bytes; half of them on each of two ranks."""

    def quantized(**layout: Any) -> int:
        return estimate_memory(dataclasses.replace(job_of(**layout), fp8_copies=True))[0].quantized

    assert quantized() == pytest.approx(13.96 * GB, rel=2e-3)
    assert quantized(tp=2) == pytest.approx(13.96 / 2 * GB, rel=2e-3)
    assert (quantized(count=1), quantized(zero=3)) == (0, 0)
    assert estimate_memory(job_of())[0].quantized == 0


def test_schedules_keep_their_micro_batches() -> None:
    """1F1B keeps pp - rank micro-batches, GPipe all."""
    one = dataclasses.replace(job_of(pp=4), num_microbatches=8)
    sizes = stage_bytes(one)
    assert activation_peaks(one) == tuple(size * (4 - rank) for rank, size in enumerate(sizes))
    assert activation_peaks(job_of(pp=4, pp_schedule="gpipe")) == tuple(8 * size for size in sizes)
    few = dataclasses.replace(one, num_microbatches=4)
    assert activation_peaks(few) == activation_peaks(one)


@pytest.mark.parametrize(
    "schedule", ["interleaved", "interleaved_zero_bubble", "zbv", "dualpipev", "looped_bfs"]
)
def test_every_schedule_has_an_estimate(schedule: str) -> None:
    memories = estimate_memory(job_of(pp=4, pp_schedule=schedule, count=16))
    assert len(memories) == 4
    assert all(value >= 0 for memory in memories for value in memory.terms.values())
    assert worst_rank(job_of(pp=4, pp_schedule=schedule, count=16)) in memories


def test_sequence_parallelism_divides_the_stream() -> None:
    with_sp, without = (activation_peaks(job_of(tp=4, sequence_parallel=on))[0] for on in (True, False))
    # Per layer: both norms' inputs and outputs and their statistics, on a quarter of the tokens.
    layers = LLAMA_8B.num_layers * (4 * 4096 * 2 + 2 * 4) * 8192 * 3 // 4
    rest = (2 * 4096 * 2 + 4) * 8192 * 3 // 4  # final norm and hidden states
    assert without - with_sp == layers + rest


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "interleaved", "zbv"])
def test_budget_holds_at_every_ranks_peak(schedule: str) -> None:
    """Each pipeline rank fits on its own; with 1F1B earlier ranks keep more micro-batches, and recompute more."""
    plain = job_of(pp=4, pp_schedule=schedule)
    # What a zero-bubble schedule's weight passes wait for cannot be made again: three quarters of the peak here.
    budget = max(activation_peaks(plain)) * (0.8 if schedule == "zbv" else 0.45)
    job = dataclasses.replace(plain, recompute=RecomputeConfig(kind="budget", budget_gb=budget / GB))
    peaks = activation_peaks(job)
    assert 0.9 * budget < max(peaks) <= budget
    choices = recompute_choices(job)
    layers = [
        [choices[layer] for stage in job.stages.stages_of(rank) for layer in job.stages.layers[stage]]
        for rank in range(4)
    ]
    recomputed = [sum(choice.mlp + 2 * choice.full for choice in own) for own in layers]
    if schedule == "1f1b":
        assert recomputed == sorted(recomputed, reverse=True)
        assert recomputed[0] > recomputed[-1]
    tight = dataclasses.replace(job, recompute=RecomputeConfig(kind="budget", budget_gb=0.1))
    with pytest.raises(UserError, match=r"budget_gb=0\.1 is less than"):
        estimate_memory(tight)


def test_known_totals() -> None:
    """Llama 3 8B on one of 8 GPUs, by hand: 8.03e9 parameters at 2 + 4 + 10/8 bytes are 58.2 GB of state."""
    job = Job(model=LLAMA_8B, parallel=ParallelConfig(), world_size=8, tokens=8192)
    memory = worst_rank(job)
    assert memory.parameters == pytest.approx(8.03e9, rel=1e-3)
    assert memory.weights + memory.gradients + memory.optimizer == pytest.approx(58.2 * GB, rel=1e-3)
    # 32 layers · 8192 tokens · (2·(4·4096 + 6144 + 4096 + 3·14336) + 4·(2 + 32)) bytes; of the final norm its
    # input and one statistic, of the loss dx, and tables of angles.
    layers = 32 * 8192 * (2 * (4 * 4096 + 6144 + 4096 + 3 * 14336) + 4 * 34)
    assert memory.activations - layers == 8192 * (2 * 4096 * 2 + 4 + 128 * 4)
    # ZeRO-3 has no main gradients to add to: that of a head of 128,256 rows waits in fp32.
    divided = worst_rank(dataclasses.replace(job, parallel=ParallelConfig(zero=3)))
    assert divided.activations - memory.activations == 128256 * 4096 * 4


def test_workspace_of_what_is_made_again() -> None:
    """By hand, from f = 512 and H = 32: a handover lets the MLP's backward pass write over what it reads."""
    tokens, wide, stream = 1024, 1024 * 512 * 2, 1024 * 32 * 2
    model = dataclasses.replace(MODELS["llama"], ffn_hidden_size=512)

    def workspace(kind: str, gpu: bool) -> int:
        parallel = ParallelConfig()
        job = Job(model=model, parallel=parallel, world_size=1, tokens=tokens, recompute=KINDS[kind], gpu=gpu)
        return worst_rank(job).workspace

    for gpu in (False, True):
        mlp, none = workspace("mlp", gpu), workspace("none", gpu)
        assert workspace("auto", gpu) == none - (0 if gpu else 2 * wide)  # gate and up
        # The norm's output and statistic; on GPUs gate, up and the activation's output beside their gradients too.
        assert mlp - none == stream + tokens * 4 + (3 * wide if gpu else 0)


def test_gradients_that_lend_their_memory() -> None:
    """By hand: the head's and the last layer's are there with all activations, at the backward pass's end all are."""
    model = MODELS["llama"]

    def estimate(tokens: int, **settings: Any) -> RankMemory:
        values = {"num_microbatches": 1, "gpu": False, **settings}
        parallel = ParallelConfig(bucket_size=1)  # by default so small a model lends nothing
        return worst_rank(Job(model=model, parallel=parallel, world_size=1, tokens=tokens, **values))

    every = estimate(64, num_microbatches=2).gradients
    assert every == 4 * estimate(64).parameters
    for other in ({"gpu": True}, {"compiled": True}):
        assert estimate(64, **other).gradients == every
    last = 4 * (384 * 32 + layer_parameters(model))  # 301 padded rows of 32
    assert estimate(1 << 16).gradients == last < every
    few = estimate(1)  # a token's activations are less than the memory of a layer's gradients
    assert few.gradients + few.activations + few.workspace == every + 32 * 2 + 4 * model.size_per_head
