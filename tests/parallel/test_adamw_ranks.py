"""AdamW on every kind of state: the same weights, moments and statistics as in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megalite.config import OptimizerConfig, ParallelConfig
from megalite.optim.adamw import AdamW
from megalite.parallel.make_state import make_state
from megalite.parallel.mesh import Mesh, mesh_of_group
from megalite.parallel.tensor import TensorSplit
from tests.parallel.layouts import MODELS, build
from tests.parallel.states import CPU, Part, compare, copies_of, forward_backward, make_batches, whole

# Without a large eps, Adam makes ± the learning rate out of gradients that are rounding errors.
CONFIG = OptimizerConfig(eps=0.1, weight_decay=0.1)
KINDS: tuple[Any, ...] = ("master", "exp_avg", "exp_avg_sq")


def adamw_job(layout: ParallelConfig) -> tuple[dict[str, list[Part]], tuple[float, float]]:
    """Three steps, of which the second is skipped: this rank's state, and the update ratio and weight norm."""
    mesh = mesh_of_group(layout, CPU) if dist.is_initialized() else Mesh(device=CPU)
    model = build(MODELS["qwen3-tied"], TensorSplit(mesh.tp, mesh.tp.size > 1), torch.float32)
    state = make_state(model, mesh, torch.float32, layout)
    optimizer = AdamW(state, CONFIG, mesh.world)
    batches = make_batches(4)[mesh.dp.rank :: mesh.dp.size]
    for step in range(3):
        state.start_step(len(batches))
        forward_backward(model, mesh, layout, batches, 0.1)
        state.finish_gradients()
        rate, clip = torch.tensor(0.1), torch.tensor(0.5)
        optimizer.step(rate, clip, torch.tensor(step == 1))
        state.publish()
    assert optimizer.step_count == 2
    return {kind: copies_of(state.boxes(kind)) for kind in KINDS}, optimizer.update_ratio(0.1)


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (2, {"zero": 0}),
        (2, {"zero": 1}),
        (2, {"zero": 3}),
        (4, {"zero": 1, "tp": 2}),
        (4, {"zero": 3, "tp": 2}),
        (4, {"zero": 1, "dp_shard": 2}),
    ],
    ids=str,
)
def test_steps_equal_one_process(rank_pool, ranks, layout):
    state, statistics = adamw_job(ParallelConfig())
    truth: dict[str, dict[str, Tensor]] = {kind: whole(parts) for kind, parts in state.items()}
    answers = rank_pool(ranks).run(adamw_job, ParallelConfig(bucket_size=800, **layout))
    for kind in KINDS:
        got = whole([part for state, _ in answers for part in state[kind]])
        compare(got, truth[kind], 1e-5, kind)
    for _, (ratio, weight_norm) in answers:
        assert ratio == pytest.approx(statistics[0], rel=1e-5)
        assert weight_norm == pytest.approx(statistics[1], rel=1e-6)
    decayed = [w for name, w in truth["master"].items() if w.dim() == 2]
    exact = torch.cat([w.flatten() for w in decayed]).double().norm().item()
    assert statistics[1] == pytest.approx(exact, rel=1e-6)
