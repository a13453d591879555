"""FSDP2 on several ranks against one process: loss, every gradient, the norm, weights after three steps."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch

from megalite.config import ParallelConfig, RecomputeConfig, RunConfig
from megalite.errors import ExitCode
from megalite.parallel.data import FlatBuffers
from megalite.parallel.fsdp import ShardedModules
from megalite.parallel.make_state import make_state
from megalite.parallel.mesh import Mesh, mesh_of_group
from megalite.parallel.random import initialize
from megalite.parallel.tensor import UNSPLIT
from megalite.train.generate import generate
from megalite.train.replica import build_replica
from megalite.train.run import run_pretraining
from tests.helpers.tiny import cheap_surroundings, make_dataset, read_losses, tiny_config
from tests.helpers.trace import trace
from tests.parallel import layouts
from tests.parallel.layouts import MODELS, build
from tests.parallel.states import (
    CPU,
    FOUR_IN_MATRIX,
    IN_TURN,
    STATE_MODELS,
    TOLERANCE,
    assert_same,
    check,
    compare,
    forward_backward,
    make_batches,
    one_process,
    put_together,
    sgd,
    steps_on_rank,
)
from tests.parallel.training import assert_layout_equals


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", STATE_MODELS)
@pytest.mark.parametrize("ranks", FOUR_IN_MATRIX)
def test_fully_sharded(rank_pool, ranks, name, dtype):
    check(rank_pool, ranks, name, dtype, zero=3)


@pytest.mark.parametrize(("layout", "name"), IN_TURN)
def test_with_other_axes(rank_pool, layout, name):
    """Four ranks; dp takes what is left. Without ranks to divide over it is plain data parallelism."""
    check(rank_pool, 4, name, torch.float64, zero=3, **layout)


TWO_STAGES = ["interleaved", "zbv"]
"""On each rank, as dualpipev has in tests/parallel/test_matrix.py."""


@pytest.mark.parametrize("schedule", ["1f1b", *(pytest.param(s, marks=pytest.mark.slow) for s in TWO_STAGES)])
def test_with_a_pipeline(rank_pool, schedule):
    """Several forward passes before the first backward pass. Weight gradients are not put off: there are no sinks."""
    deep = dataclasses.replace(MODELS["qwen3-tied"], num_layers=4)
    batches = make_batches(8)
    assert_layout_equals(rank_pool(4).run, ParallelConfig(zero=3, pp=2, pp_schedule=schedule), deep, batches)


def average(state: ShardedModules) -> None:
    """What FSDP2 does if it is not told otherwise."""
    for unit in state._units:
        unit.set_gradient_divide_factor(float(state.mesh.data.size))


def test_averaged_gradients_are_caught(rank_pool):
    batches, truth = make_batches(4), one_process("llama", torch.float64, make_batches(4))
    job = (ParallelConfig(zero=3), "llama", torch.float64, batches, 3, None, average)
    got = put_together(rank_pool(2).run(steps_on_rank, *job))
    with pytest.raises(AssertionError, match="step 0, gradient of"):
        assert_same(got, truth, 1e-10)


def publish_job() -> list[float]:
    """Losses without gradients: before an update, after it, and after it was published."""
    layout = ParallelConfig(zero=3)
    mesh = mesh_of_group(layout, CPU)
    model = build(MODELS["llama"], UNSPLIT, torch.float32)
    state = make_state(model, mesh, torch.float32, layout)
    (batch,) = make_batches(1)
    losses = []
    with torch.no_grad():
        losses.append(float(layouts.loss_of(model, batch, None)))
        for box in state.boxes("master"):
            if box.piece.name == "head.weight":
                box.tensor.zero_()
        losses.append(float(layouts.loss_of(model, batch, None)))
        state.publish()
        losses.append(float(layouts.loss_of(model, batch, None)))
    return losses


def test_published_weights_are_used(rank_pool):
    """What a forward pass without a backward pass has gathered stays gathered until new weights are published."""
    for before, stale, after in rank_pool(2).run(publish_job):
        assert before == stale, "if this is no longer so, publish need not do anything"
        assert after != before


def test_bf16_weights_give_the_gradients_that_flat_buffers_give(rank_pool):
    """The same products on the same rounded weights; here their gradients are rounded to bf16 before they are added.

    Flat buffers with remainders would round ties away from zero.
    """
    batches, jobs = make_batches(4), [ParallelConfig(zero=zero) for zero in (1, 3)]
    flat, sharded = (
        put_together(
            rank_pool(2).run(
                partial(steps_on_rank, remainders=False),
                job,
                "llama",
                torch.float32,
                batches,
                1,
                torch.bfloat16,
            )
        )
        for job in jobs
    )
    assert sharded.losses == flat.losses
    compare(sharded.gradients[0], flat.gradients[0], 2.0**-8, "gradient of")


def test_bf16_on_the_wire(rank_pool):
    batches = make_batches(4)
    usual, narrow = (
        put_together(
            rank_pool(2).run(
                steps_on_rank,
                ParallelConfig(zero=3, grad_reduce_dtype=wire),
                "llama",
                torch.float32,
                batches,
                1,
            )
        )
        for wire in ("fp32", "bf16")
    )
    compare(narrow.gradients[0], usual.gradients[0], 2.0**-8, "gradient of")
    differing = [n for n, g in narrow.gradients[0].items() if not torch.equal(g, usual.gradients[0][n])]
    assert len(differing) == len(usual.gradients[0]), "nothing was rounded"


def finite_job() -> list[bool]:
    """Rank 1 has a NaN in its gradient, in the second step only: what each rank says of its own."""
    layout = ParallelConfig(zero=3)
    mesh = mesh_of_group(layout, CPU)
    model = build(MODELS["llama"], UNSPLIT, torch.float32)
    state = make_state(model, mesh, torch.float32, layout)
    batches = make_batches(4)[mesh.dp.rank :: 2]
    said = []
    for step in range(3):
        scale = torch.nan if step == 1 and mesh.rank == 1 else 0.01
        state.start_step(2)
        forward_backward(model, mesh, layout, batches, scale)
        state.finish_gradients()
        said.append(bool(state.local_finite()))
    return said


def test_only_the_rank_that_went_bad_says_so(rank_pool):
    assert rank_pool(2).run(finite_job) == [[True, True, True], [True, False, True]]


def bytes_job(dtype: torch.dtype) -> tuple[dict[str, int], int, int]:
    layout = ParallelConfig(zero=3)
    mesh = mesh_of_group(layout, CPU)
    model = build(MODELS["llama"], UNSPLIT, torch.float32)
    state = make_state(model, mesh, dtype, layout)
    assert isinstance(state, ShardedModules)
    batches = make_batches(4)[mesh.dp.rank :: 2]
    for _ in range(2):
        state.start_step(2)
        with trace() as events:
            forward_backward(model, mesh, layout, batches, 0.01)
        state.finish_gradients()
        sgd(state)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    blocks = sum(size for name, size in sizes.items() if name.startswith("layers."))
    kinds = {kind: events.bytes_of(kind) for kind in ("all_gather", "reduce_scatter")}
    return kinds, blocks, sum(sizes.values()) - blocks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_of_a_step(rank_pool, dtype):
    """In each of two micro-batches: blocks gathered twice, the rest once; every gradient scattered, in fp32."""
    for kinds, blocks, rest in rank_pool(2).run(bytes_job, dtype):
        assert kinds == {
            "all_gather": 2 * (2 * blocks + rest) * dtype.itemsize,
            "reduce_scatter": 2 * (blocks + rest) * 4,
        }


def recompute_job(recompute: RecomputeConfig) -> list[torch.Tensor]:
    layout = ParallelConfig(zero=3)
    mesh = mesh_of_group(layout, CPU)
    batches = make_batches(4)[mesh.dp.rank :: 2]
    replica = build_replica(
        MODELS["llama"],
        layout,
        mesh,
        dtype=torch.float32,
        micro_batch_tokens=32,
        fill=lambda model: initialize(model, seed=3),
        recompute=recompute,
    )
    replica.gradients(batches, torch.tensor(0.01))
    replica.state.finish_gradients()
    return [box.tensor.clone() for box in replica.state.boxes("main_grad")]


def test_layers_are_made_again_with_their_weights_there(rank_pool):
    usual = rank_pool(2).run(recompute_job, RecomputeConfig(kind="none"))
    mlp = RecomputeConfig(kind="selective", parts=("mlp",))
    for recompute in (RecomputeConfig(kind="selective"), mlp, RecomputeConfig(kind="full")):
        for got, expected in zip(rank_pool(2).run(recompute_job, recompute), usual, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def sample_job(dtype: torch.dtype) -> list[int]:
    layout = ParallelConfig(zero=3)
    replica = build_replica(
        MODELS["llama"],
        layout,
        mesh_of_group(layout, CPU),
        dtype=dtype,
        micro_batch_tokens=32,
        fill=lambda model: initialize(model, seed=3),
    )
    return generate(replica, [1, 2, 3], max_new_tokens=5, temperature=0.8, seed=5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_texts_are_sampled(rank_pool, dtype):
    expected = generate(
        build(MODELS["llama"], UNSPLIT, dtype), [1, 2, 3], max_new_tokens=5, temperature=0.8, seed=5
    )
    assert rank_pool(2).run(sample_job, dtype) == [expected, expected]


def test_one_process_has_nothing_to_divide():
    model = build(MODELS["llama"], UNSPLIT, torch.float32)
    state = make_state(model, Mesh(device=CPU), torch.float32, ParallelConfig(zero=3))
    assert isinstance(state, FlatBuffers)


def train_on_rank(config: RunConfig) -> int:
    mesh = mesh_of_group(config.parallel, CPU)
    with cheap_surroundings():
        return run_pretraining(config, mesh, command="test", config_toml=lambda config: "").code


def test_a_run_trains_validates_samples_saves_and_resumes(rank_pool, tmp_path):
    """Losses as with ZeRO-1; stopped half-way and resumed as ZeRO-1, the other half too."""
    dataset = make_dataset(tmp_path / "data")
    losses = {}
    for name, zeros in {"flat": (1, 1), "sharded": (3, 3), "mixed": (3, 1)}.items():
        for steps, zero in zip((6, 12), zeros, strict=True):
            config = tiny_config(
                dataset,
                tmp_path / name,
                train={"steps": steps},
                schedule={"kind": "constant", "warmup": 3},
            )
            config = dataclasses.replace(config, parallel=ParallelConfig(zero=zero, bucket_size=2000))
            assert set(rank_pool(2).run(train_on_rank, config)) == {ExitCode.DONE}
        losses[name] = read_losses(tmp_path / name)
        assert sorted(losses[name]) == list(range(1, 13))
    for name in ("sharded", "mixed"):
        for step, loss in losses["flat"].items():
            assert losses[name][step] == pytest.approx(loss, rel=1e-5), (name, step)
