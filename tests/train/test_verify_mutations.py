"""Mistakes planted in the processes of the ranks: each is caught, and what is said points to it.

A plant changes a function for the length of one layout, in the rank's process only; the same layout is equal to
one process before it and after it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import megalite.layers.embedding
import megalite.parallel.data
from megalite.models.presets import PRESETS
from megalite.parallel.context import ContextSplit
from megalite.parallel.gathering import WeightGatherer
from megalite.parallel.gradients import WeightQueue
from megalite.parallel.mesh import ALONE
from megalite.parallel.pipeline import Pipeline
from megalite.parallel.reduction import _Reduction
from megalite.train.replica import Replica
from megalite.train.trainer import count_valid_tokens
from megalite.train.verify import Result, Verification, run_layout
from megalite.train.verify_explain import Finding
from megalite.train.verify_layouts import all_layouts
from megalite.train.verify_pool import Pool

Patch = pytest.MonkeyPatch


def norm_weights_not_summed(patch: Patch) -> None:
    """Under sequence parallelism each rank has the gradients of its own tokens."""
    patch.setattr(megalite.parallel.data, "sum_partial", lambda boxes, tp: None)


def tied_weight_counted_twice(patch: Patch) -> None:
    """Both ends of the pipeline hold the embedding, and the norm adds up both."""
    right = megalite.parallel.data.box_copies
    patch.setattr(
        megalite.parallel.data,
        "box_copies",
        lambda boxes, mesh, copies: right(boxes, dataclasses.replace(mesh, tied=ALONE), copies),
    )


def tied_gradients_not_summed(patch: Patch) -> None:
    """Each end of the pipeline keeps the gradient of its own use of the embedding."""
    patch.setattr(megalite.parallel.data, "all_reduce_sum", lambda tensor, axis: tensor)


def vocabulary_off_by_one(patch: Patch) -> None:
    """Ranks after the first look up the row before the right one."""
    right = megalite.layers.embedding.vocab_embedding

    def wrong(ids: Any, weight: Any, first_row: int, split: Any) -> Any:
        return right(ids, weight, first_row + (1 if first_row else 0), split)

    patch.setattr(megalite.layers.embedding, "vocab_embedding", wrong)


def mean_of_means(patch: Patch) -> None:
    """Every data-parallel rank divides by its own number of labels, and the means are averaged."""
    right = Replica.gradients

    def wrong(self: Replica, batches: Any, scale: Any, *more: Any) -> Any:
        return right(self, batches, 1.0 / (count_valid_tokens(batches).double() * self.mesh.dp.size), *more)

    patch.setattr(Replica, "gradients", wrong)


def wrong_zigzag(patch: Patch) -> None:
    """The two chunks of a rank of the ring come in the other order than attention takes them to be in."""
    right = ContextSplit.own_tokens
    patch.setattr(ContextSplit, "own_tokens", lambda self, x: torch.cat(right(self, x).chunk(2)[::-1]))


def swapped_micro_batches(patch: Patch) -> None:
    """The labels and documents of two micro-batches change places on their way to later stages."""
    right = Pipeline.run

    def wrong(self: Pipeline, batches: Any) -> None:
        extras = [batches[1].extra, batches[0].extra, *(batch.extra for batch in batches[2:])]
        return right(
            self, [dataclasses.replace(b, extra=extra) for b, extra in zip(batches, extras, strict=True)]
        )

    patch.setattr(Pipeline, "run", wrong)


def missing_bucket(patch: Patch) -> None:
    """The bucket of the norms is never reduced."""
    right = _Reduction.__init__

    def wrong(self: Any, bucket: Any, shard: Any, replicate: Any, wire: Any) -> None:
        alone = () if bucket.decay else (ALONE, ALONE)
        right(self, bucket, *(alone or (shard, replicate)), wire)

    patch.setattr(_Reduction, "__init__", wrong)


def weights_not_gathered(patch: Patch) -> None:
    """After an update each rank of ZeRO-1 goes on with the old weights of the others."""
    patch.setattr(WeightGatherer, "start", lambda self: None)


def weight_gradients_lost(patch: Patch) -> None:
    """A zero-bubble schedule forgets what waits in the queue."""
    patch.setattr(WeightQueue, "take", lambda self: self._waiting.clear() or (lambda: None))


@dataclasses.dataclass(frozen=True)
class Expected:
    """A plant, where it shows, and what is said first."""

    plant: Callable[[Patch], None]
    layout: str
    kind: str
    name: str
    said: str = ""
    model: str = "qwen3-0.6b"
    """Tied, with qk-norms and fewer key heads than queries."""


CASES = [
    Expected(norm_weights_not_summed, "tp2-sp", "gradient", "final_norm.weight", "a missing sum over tp"),
    Expected(tied_weight_counted_twice, "pp2-1f1b", "grad norm", "step 1"),
    Expected(tied_gradients_not_summed, "pp2-1f1b", "gradient", "embedding.weight", "a missing sum over pp"),
    Expected(vocabulary_off_by_one, "tp2", "output", "embedding (micro-batch 0)"),
    Expected(mean_of_means, "dp2-zero0", "gradient", "head.weight", model="llama3-8b"),
    Expected(mean_of_means, "dp2-zero1", "output gradient", "final_norm (micro-batch 1)"),
    Expected(wrong_zigzag, "cp2-ring", "output", "layers.0.attention (micro-batch 0)"),
    Expected(swapped_micro_batches, "pp2-1f1b", "output", "layers.0.attention (micro-batch 0)"),
    Expected(swapped_micro_batches, "pp2-interleaved", "output", "layers.0.attention (micro-batch 0)"),
    Expected(missing_bucket, "dp2-zero0", "gradient", "final_norm.weight", "a missing sum over dp"),
    Expected(missing_bucket, "dp2-zero1", "gradient", "final_norm.weight"),
    Expected(weights_not_gathered, "dp2-zero1", "update", "embedding.weight"),
    Expected(weight_gradients_lost, "pp2-zbv", "gradient", "layers.4.mlp.down_proj.weight", "never arrives"),
]
PLANTS = {case.plant.__name__: case.plant for case in CASES}


def planted_layout(job: Any, device: torch.device) -> Any:
    """In a rank's process: `run_layout` with a mistake."""
    name, task = job
    with Patch.context() as patch:
        PLANTS[name](patch)
        return run_layout(task, device)


class Planted:
    """A pool whose ranks make a mistake."""

    def __init__(self, pool: Pool, plant: str) -> None:
        self.pool, self.plant = pool, plant

    def run(self, world: int, work: Any, job: Any, **more: Any) -> list[Any]:
        assert work is run_layout
        return self.pool.run(world, planted_layout, (self.plant, job), **more)


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool(
        2,
        timeout_s=60.0,
        preload=("torch.distributed.pipelining.schedules", "tests.train.test_verify_mutations"),
    ) as made:
        yield made


@pytest.fixture(scope="module")
def verifications() -> dict[str, Verification]:
    return {
        name: Verification(PRESETS[name], all_layouts(2), "float64") for name in ("qwen3-0.6b", "llama3-8b")
    }


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.plant.__name__}-{case.layout}")
def test_a_planted_mistake_is_caught(
    case: Expected, pool: Pool, verifications: dict[str, Verification]
) -> None:
    verification = verifications[case.model]
    layout = next(layout for layout in all_layouts(2) if layout.name == case.layout)
    result: Result = verification.run(layout, Planted(pool, case.plant.__name__))  # type: ignore[arg-type]
    assert result.status == "wrong", result
    finding = result.finding
    assert isinstance(finding, Finding)
    assert (finding.kind, finding.name) == (case.kind, case.name), finding.lines()
    assert case.said in finding.hint, finding.lines()
    assert finding.error > 1e6 * finding.limit  # not a matter of rounding
    sound = verification.run(layout, pool)
    assert sound.status == "equal", sound
