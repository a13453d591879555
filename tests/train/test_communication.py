"""The formulas of bytes sent, against what ranks were seen to send."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megalite.config import ModelConfig, ParallelConfig
from megalite.errors import UserError
from megalite.layers.recompute import FULL, KEEP, Recompute
from megalite.models.presets import preset
from megalite.parallel.mesh import Axis, Mesh
from megalite.parallel.stages import plan_stages
from megalite.train.communication import StepBytes, StepShape, step_bytes
from megalite_kernels.ops.fp8_linear import Scaling
from tests.helpers.trace import Events, Launch, trace
from tests.parallel.layouts import MODELS, packed_batch
from tests.parallel.replicas import make_replica

MICRO_BATCHES = 4
DEEP = {name: replace(config, num_layers=5) for name, config in MODELS.items()}


MLP = Recompute(mlp=True)


def traced_job(
    layout: ParallelConfig, config: ModelConfig, again: Recompute = KEEP, fp8: Scaling | None = None
) -> tuple[int, int, StepBytes]:
    """(pipeline rank, tensor rank, what this rank sent in a step), the scalars of a step left out."""
    batch = packed_batch()
    replica = make_replica(layout, config, torch.float32, batch.tokens.numel(), fp8=fp8)
    replica.model.recompute = dict.fromkeys(range(config.num_layers), again)
    with trace() as events:
        replica.gradients([batch] * MICRO_BATCHES, torch.ones(()))
        replica.state.finish_gradients()
        replica.state.publish()
    mesh = replica.mesh
    replica.state.release()
    return mesh.pp.rank, mesh.tp.rank, by_axis(events, mesh)


def by_axis(events: Events, mesh: Mesh) -> StepBytes:
    sent = {"tp": 0.0, "cp": 0.0, "pp": 0.0, "dp": 0.0}
    for launch in events.launches:
        if launch.bytes > 8:  # a flag, a loss or a count
            sent[axis_of(launch, mesh)] += launch.sent_bytes
    return StepBytes(**sent)


def axis_of(launch: Launch, mesh: Mesh) -> str:
    """Axis whose group it is. Where cp and the data axis are one group, only attention sends between ranks."""

    def ranks(axis: Axis) -> tuple[int, ...]:
        return () if axis.group is None else tuple(dist.get_process_group_ranks(axis.group))

    if launch.kind in ("send", "recv_", "recv", "all_to_all") and launch.group == ranks(mesh.cp):
        return "cp"
    groups = {"tp": (mesh.tp,), "pp": (mesh.pp, mesh.tied), "dp": (mesh.shard, mesh.replicate, mesh.data)}
    found = [name for name, axes in groups.items() if launch.group in map(ranks, axes)]
    assert len(found) == 1, f"{launch} belongs to {found}"
    return found[0]


LAYOUTS: list[dict[str, Any]] = [
    {"tp": 2},
    {"tp": 2, "sequence_parallel": False},
    {"tp": 2, "tp_chunks": 3},
    {"cp": 2},
    {"cp": 2, "cp_method": "ulysses"},
    {"pp": 2},
    {"pp": 2, "pp_schedule": "zbv"},
    {"pp": 2, "pp_schedule": "interleaved_zero_bubble"},
    {"zero": 1},
    {"zero": 0},
    {"grad_reduce_dtype": "bf16"},
    {"zero": 3},
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", ["qwen3-tied", "gpt2"])
def test_what_two_ranks_send_is_what_the_formulas_say(
    rank_pool: Any, layout: dict[str, Any], name: str
) -> None:
    check(rank_pool, ParallelConfig(**layout, bucket_size=3000), DEEP[name], 2)


@pytest.mark.parametrize(
    "layout",
    [
        {"tp": 4},
        {"tp": 2, "pp": 2},
        {"cp": 2, "tp": 2, "cp_method": "ring", "zero": 0},
        {"pp": 2, "pp_schedule": "interleaved"},
        {"dp_shard": 2},
        {"dp_shard": 2, "zero": 3},
        {"cp": 2, "zero": 3, "grad_reduce_dtype": "bf16"},
        {"cp": 4},
    ],
    ids=str,
)
def test_what_four_ranks_send(rank_pool: Any, layout: dict[str, Any]) -> None:
    check(rank_pool, ParallelConfig(**layout, bucket_size=3000), DEEP["qwen3-tied"], 4)


@pytest.mark.parametrize("again", [FULL, MLP], ids=["full", "mlp"])
@pytest.mark.parametrize("layout", [{"tp": 2}, {"tp": 2, "sequence_parallel": False}, {"cp": 2}], ids=str)
def test_what_is_made_again_is_sent_again(rank_pool: Any, layout: dict[str, Any], again: Recompute) -> None:
    check(rank_pool, ParallelConfig(**layout), DEEP["gpt2"], 2, again)


@pytest.mark.parametrize(
    ("sequence", "scaling", "again"),
    [
        (True, "rowwise", KEEP),
        (True, "rowwise", MLP),
        (True, "rowwise", FULL),
        (True, "tensorwise", KEEP),
        (False, "rowwise", KEEP),
    ],
)
def test_tokens_that_are_gathered_in_fp8(
    rank_pool: Any, sequence: bool, scaling: Scaling, again: Recompute
) -> None:
    check(rank_pool, ParallelConfig(tp=2, sequence_parallel=sequence), DEEP["llama"], 2, again, scaling)


def check(
    rank_pool: Any,
    layout: ParallelConfig,
    config: ModelConfig,
    world: int,
    again: Recompute = KEEP,
    fp8: Scaling | None = None,
) -> None:
    """Equal on every rank and axis; gradients that are parts of sums are not cut evenly, but in all as said."""
    tokens = packed_batch().tokens.numel()
    step = StepShape(
        micro_batches=MICRO_BATCHES,
        micro_batch_tokens=tokens,
        seq_length=tokens,
        dtype=torch.float32,
        made_again=frozenset(range(config.num_layers if again.full else 0)),
        mlp_made_again=frozenset(range(config.num_layers if again.mlp else 0)),
        rowwise_fp8=fp8 == "rowwise",
    )
    answers = rank_pool(world).run(traced_job, layout, config, again, fp8)
    total, expected_total = 0.0, 0.0
    for pp_rank, tp_rank, sent in answers:
        expected = step_bytes(config, layout, step, processes=world, tp_rank=tp_rank)[pp_rank]
        assert (sent.cp, sent.pp, sent.dp) == pytest.approx(
            (expected.cp, expected.pp, expected.dp), rel=1e-12
        )
        total, expected_total = total + sent.tp, expected_total + expected.tp
    assert total == pytest.approx(expected_total, rel=1e-12)
    assert sum(sent.total for _, _, sent in answers) > 0


def test_bytes_of_a_published_model() -> None:
    """Llama 3 70B, tp 8, pp 4 on 512 GPUs, 4096 tokens: the terms, written out again in numbers."""
    layout = ParallelConfig(tp=8, pp=4, bucket_size=10**12)
    step = StepShape(micro_batches=16, micro_batch_tokens=4096, seq_length=4096)
    sent = step_bytes(preset("llama3-70b"), layout, step, processes=512)
    activation = 4096 * 8192 * 2
    assert [round(one.pp) for one in sent] == [16 * n * activation // 8 for n in (1, 2, 2, 1)]
    layers = len(plan_stages(preset("llama3-70b"), layout, 4096).layers[1])
    norms = 1e-4  # of the whole
    assert sent[1].tp == pytest.approx(16 * 10 * layers * activation * 7 / 8, rel=norms)
    assert all(one.cp == 0 for one in sent)
    parameters = sum(one.dp for one in sent) * 8 / (6 * 15 / 16)
    assert parameters == pytest.approx(70.55e9, rel=0.01)


def test_what_does_not_fit_is_said() -> None:
    step = StepShape(micro_batches=1, micro_batch_tokens=32, seq_length=32)
    with pytest.raises(UserError, match="needs a multiple of 2 processes"):
        step_bytes(DEEP["gpt2"], ParallelConfig(tp=2), step, processes=3)
    with pytest.raises(UserError, match="must divide"):
        step_bytes(DEEP["gpt2"], ParallelConfig(tp=3), step, processes=3)
