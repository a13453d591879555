"""The steps of `megalite verify` on one process: the trainer's way equals the plain loop."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megalite.config import ModelConfig
from megalite.models.presets import PRESETS
from megalite.parallel.mesh import Mesh
from megalite.train.verify import Verification
from megalite.train.verify_compare import EXACT, measure
from megalite.train.verify_layouts import all_layouts
from megalite.train.verify_run import Task, run_rank


def task_of(model: ModelConfig, dtype: str, name: str = "tp2") -> tuple[Verification, Task]:
    layouts = all_layouts(2)
    verification = Verification(model, layouts, dtype)
    layout = next(layout for layout in layouts if layout.name == name)
    return verification, verification.task(layout, dtype)


@pytest.mark.parametrize("name", ["gpt2-124m", "llama3-8b", "qwen3-0.6b", "mistral-7b"])
def test_one_process_equals_the_plain_loop(name: str) -> None:
    verification, task = task_of(PRESETS[name], "float64")
    truth = verification.truth(task)
    answer, measures = verification.reference(task)
    assert answer.place.axes == {}
    assert max(m.relative for m in measures) < EXACT / 10
    # Something happens: every tensor gets a gradient and moves, and the loss falls.
    for kind, tensors in (("gradient", truth.gradients), ("update", truth.weights)):
        measured = {m.name: m for m in measures if m.kind == kind}
        assert measured.keys() == tensors.keys()
        tiny = {n for n, m in measured.items() if float(m.expected.abs().max()) < 1e-4 * m.scale}
        # Adding the same to all keys changes no attention, but for rotated ones.
        assert all(n.endswith("k_proj.bias") for n in tiny), tiny
    assert truth.losses[0] > truth.losses[1] > truth.losses[2]


def test_one_process_is_reported_as_such() -> None:
    verification, _ = task_of(PRESETS["tiny"], "bf16")
    result = verification.one_process()
    assert result.status == "equal"
    assert list(result.checks) == ["float64", "bf16"]
    bf16 = result.checks["bf16"].worst("gradient")[0]
    assert 1e-4 < bf16.relative < 0.1
    assert result.checks["float64"].worst("gradient")[0].relative < EXACT


def test_truth_is_computed_once() -> None:
    verification, task = task_of(PRESETS["tiny"], "fp32")
    assert verification.truth(task) is verification.truth(dataclasses.replace(task, dtype="float64"))
    other = dataclasses.replace(task, micro_batches=task.micro_batches + 1)
    assert verification.truth(other) is not verification.truth(task)


def test_answers_are_copies() -> None:
    """In float64 the state's own tensors are at hand, and later steps write into them."""
    _, task = task_of(PRESETS["tiny"], "float64")
    answer = run_rank(task, Mesh(device=torch.device("cpu")))
    truth = task_of(PRESETS["tiny"], "float64")[0].truth(task)
    gradients = [m for m in measure([answer], truth) if m.kind == "gradient"]
    assert gradients
    assert all(m.relative < EXACT for m in gradients)
