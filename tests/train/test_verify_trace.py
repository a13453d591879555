"""What goes through the layers is recorded on every rank, at its place, and equals one process."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch

from megalite.config import ParallelConfig
from megalite.models.presets import PRESETS
from megalite.parallel.mesh import Axis, Mesh
from megalite.train.verify import Verification, run_layout
from megalite.train.verify_compare import EXACT, measure
from megalite.train.verify_layouts import all_layouts
from megalite.train.verify_pool import Pool
from megalite.train.verify_run import trace_truth
from megalite.train.verify_trace import rows_here, runs_of

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool(2, preload=("torch.distributed.pipelining.schedules", "megalite.train.verify")) as made:
        yield made


@pytest.mark.parametrize("name", ["tp2", "tp2-sp", "cp2-ring", "pp2-1f1b", "pp2-zbv", "dp2-zero1"])
@pytest.mark.parametrize("model", ["gpt2-124m", "llama3-8b"])
def test_all_outputs_and_their_gradients(name: str, model: str, pool: Pool) -> None:
    layouts = all_layouts(2)
    layout = next(layout for layout in layouts if layout.name == name)
    verification = Verification(PRESETS[model], layouts, "float64")
    task = dataclasses.replace(verification.task(layout, "float64"), trace=True)
    answers = pool.run(2, run_layout, task)
    traced = trace_truth(task)
    measures = measure(answers, verification.truth(task), traced)
    assert max(m.relative for m in measures) < EXACT
    modules = 4 * task.model.num_layers + 2 + (task.model.position == "learned")
    for kind in ("output", "output gradient"):
        found = [m for m in measures if m.kind == kind]
        assert len(found) == modules * layout.dp
        assert all(float(m.expected.abs().max()) > 0 for m in found)
    order = [(m.kind, m.name.partition(" ")[0]) for m in measures if "gradient" in m.kind]
    # A module's output comes before its weights, and both before what the backward pass reaches later.
    assert order.index(("output gradient", "layers.1.mlp")) < order.index(
        ("gradient", "layers.1.mlp.up_proj.weight")
    )
    assert order.index(("gradient", "layers.1.mlp.up_proj.weight")) < order.index(
        ("output gradient", "layers.1.mlp_norm")
    )
    assert order[-1] == ("gradient", "embedding.weight")


def test_rows_of_a_rank() -> None:
    ring = Mesh(CPU, cp=Axis(2, 1), tp=Axis(2, 0))
    # Of four chunks of 4 tokens the second rank has the middle two, of which the first half goes to its first tp rank.
    assert rows_here(ring, ParallelConfig(cp=2, tp=2), (0, 16)) == [4, 5, 6, 7]
    assert rows_here(ring, ParallelConfig(cp=2, tp=2, sequence_parallel=False), (0, 16)) == list(range(4, 12))
    outer = dataclasses.replace(ring, cp=Axis(2, 0), tp=Axis())
    assert rows_here(outer, ParallelConfig(cp=2), (0, 16)) == [0, 1, 2, 3, 12, 13, 14, 15]
    assert list(runs_of([0, 1, 2, 3, 12, 13])) == [(0, 0, 4), (4, 12, 2)]
    assert list(runs_of([])) == []
