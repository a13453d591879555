"""An independent check: Megatron's own model, layers, schedule and optimizer with the same weights and tokens."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megalite.config import IGNORE_INDEX, ModelConfig, ParallelConfig
from megalite.parallel.pieces import iter_pieces, piece_view
from megalite.parallel.tensor import TensorSplit
from tests.helpers.rank_pool import RankPool
from tests.oracle.megatron_model import Optimizer, Step, megatron_steps
from tests.oracle.megatron_on_cpu import REASON
from tests.oracle.weights import Part, from_megatron, put_parts_together, to_megatron
from tests.parallel.layouts import MODELS as OURS
from tests.parallel.layouts import (
    Outcome,
    assert_equal,
    build,
    layout_job,
    one_process,
    packed_batch,
    put_together,
)

pytestmark = pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason=REASON)

MODELS = {name: replace(config, vocab_size=304) for name, config in OURS.items()}
"""Megatron trains the rows that pad its vocabulary, ours are never read: so no padding, for any tp up to 4."""
RANKS = 4
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2-dp2": {"tp": 2, "sequence_parallel": False},
    "tp2-sp-dp2": {"tp": 2},
    "tp4-sp": {"tp": 4},
    "pp2-dp2": {"pp": 2},
    "tp2-sp-pp2": {"tp": 2, "pp": 2},
}
CASES = [
    pytest.param(layout, model, marks=[] if model == "llama" or layout == "tp2-sp-pp2" else pytest.mark.slow)
    for layout in LAYOUTS
    for model in MODELS
]
"""One model in every layout, and every model in one; the others are slow."""
TOLERANCE = 1e-5
"""Of the model's largest gradient, in fp32, the only type in which Megatron's loss is computed. Seen: 5e-7."""
BATCHES = [packed_batch(seed=seed) for seed in range(4)]
VALID = sum(int((batch.labels != IGNORE_INDEX).sum()) for batch in BATCHES)
SGD = Optimizer("sgd", learning_rate=0.5)


@pytest.fixture(scope="module")
def megatron() -> Iterator[Any]:
    """``megatron(layout, model, steps, optimizer)`` runs on four ranks in which nothing but Megatron runs."""
    pool = RankPool(RANKS)

    def run(layout: ParallelConfig, model: str, num_steps: int, optimizer: Optimizer) -> Run:
        config = MODELS[model]
        weights = to_megatron(initial_weights(config), config, layout.tp)
        answers = pool.run(megatron_steps, layout, config, weights, [BATCHES] * num_steps, optimizer)
        return Run(answers, config, layout.tp)

    yield run
    pool.close()


class Run:
    """Megatron's answers in our words, for a sum of losses rather than a mean, as our layouts give them."""

    def __init__(self, answers: list[list[Step]], config: ModelConfig, tp: int) -> None:
        self.answers, self.config, self.tp = answers, config, tp

    def outcome(self, step: int) -> Outcome:
        steps = [answer[step] for answer in self.answers]
        losses, norms = {step.loss for step in steps}, {step.norm for step in steps}
        assert len(losses) == len(norms) == 1, (losses, norms)
        gradients = self._ours([step.gradients for step in steps])
        whole = {name: gradient * VALID for name, gradient in gradients.items()}
        return Outcome(losses.pop() * VALID, norms.pop() * VALID, whole)

    def weights(self, step: int) -> dict[str, Tensor]:
        return self._ours([answer[step].weights for answer in self.answers])

    def _ours(self, parts: list[list[Part]]) -> dict[str, Tensor]:
        return from_megatron(put_parts_together(parts), self.config, self.tp)


def initial_weights(config: ModelConfig) -> dict[str, Tensor]:
    model = build(config, TensorSplit(), torch.float32)
    return {piece.name: piece_view(p.detach(), piece).clone() for p, _, piece in iter_pieces(model)}


@pytest.mark.parametrize(("name", "model"), CASES)
def test_megatron_agrees(megatron: Any, rank_pool: Any, name: str, model: str) -> None:
    config, layout = MODELS[model], ParallelConfig(**LAYOUTS[name])
    theirs = megatron(layout, model, 1, SGD).outcome(0)
    assert_equal(one_process(config, torch.float32, BATCHES), theirs, TOLERANCE)
    if layout.pp == 1:
        answers = rank_pool(RANKS).run(layout_job, layout, config, torch.float32, BATCHES)
        assert_equal(put_together(answers), theirs, TOLERANCE)


@pytest.mark.parametrize("model", ["llama", "qwen3-tied"])
def test_distributed_optimizer(megatron: Any, model: str) -> None:
    """Two AdamW steps of four data-parallel ranks: what each rank's reduce-scatter gave it, and the new weights."""
    adam = Optimizer("adam", 1e-3, weight_decay=0.1, eps=1e-4, distributed=True)
    run, config = megatron(ParallelConfig(), model, 2, adam), MODELS[model]
    assert_equal(one_process(config, torch.float32, BATCHES), run.outcome(0), TOLERANCE)


def test_the_maps_between_the_weights_are_inverse() -> None:
    for config in MODELS.values():
        weights = initial_weights(config)
        for tp in (1, 2, 4):
            back = from_megatron(to_megatron(weights, config, tp), config, tp)
            assert back.keys() == weights.keys()
            assert all(torch.equal(back[name], weight) for name, weight in weights.items())
