"""The layouts that are proven equal to one process, and the models they are proven with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, get_args

import torch

from megalite.config import ModelConfig, ParallelConfig
from megalite.config_parallel import Schedule
from megalite.data.loader import MicroBatch
from megalite.errors import UserError
from tests.parallel.layouts import MODELS as SHAPES
from tests.parallel.layouts import packed_batch
from tests.parallel.training import Training, train_alone

STEPS = 3
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)
# At the usual 0.02 the gradients of queries and keys are a thousandth of the largest: errors in them would be small
# against it. At 0.1 they are a tenth.
MODELS: dict[str, ModelConfig] = {
    name: replace(config, init_std=0.1)
    for name, config in (SHAPES | {"four-kv-heads": replace(SHAPES["llama"], num_key_value_heads=4)}).items()
}


@dataclass(frozen=True)
class Case:
    """One layout on so many processes."""

    ranks: int
    layout: tuple[tuple[str, Any], ...]

    @property
    def parallel(self) -> ParallelConfig:
        return ParallelConfig(**dict(self.layout))

    @property
    def dp(self) -> int:
        return self.parallel.dp_size(self.ranks)

    @property
    def num_layers(self) -> int:
        """One more than stages, so that stages are uneven; without a pipeline two."""
        return self.parallel.num_stages + 1 if self.parallel.pp > 1 else 2

    @property
    def num_batches(self) -> int:
        """Micro-batches of a step on all ranks of dp together: more than fit into a pipeline at once."""
        parallel = self.parallel
        if parallel.pp == 1:
            return 2 * self.dp if self.dp < 4 else self.dp
        whole_rounds = parallel.stages_per_rank > 1
        return self.dp * (2 * parallel.pp if whole_rounds else parallel.pp + 1)

    def fits(self, model: ModelConfig) -> bool:
        """Whether the model's heads can be cut this way."""
        try:
            self.parallel.validate_model(replace(model, num_layers=self.num_layers))
        except UserError:
            return False
        return True

    def __str__(self) -> str:
        short = {"pp_schedule": "", "cp_method": "", "sequence_parallel": "sp"}
        return "-".join([f"dp{self.dp}", *(f"{short.get(key, key)}{value}" for key, value in self.layout)])


def spread(ranks: int, **layout: Any) -> Case:
    """A case, written as the settings of `ParallelConfig`."""
    return Case(ranks, tuple(layout.items()))


TENSOR = [spread(tp, tp=tp, sequence_parallel=sp) for tp in (2, 4) for sp in (False, True)]
PIPELINE = [spread(pp, pp=pp, pp_schedule=schedule) for pp in (2, 4) for schedule in SCHEDULES]
CONTEXT = [spread(cp, cp=cp, cp_method=method) for cp in (2, 4) for method in ("ring", "ulysses")]
DATA = [spread(dp, zero=zero) for dp in (1, 2, 4) for zero in (0, 1, 3)]
MIXED = [
    spread(4, tp=2, zero=3),
    spread(4, tp=2, cp=2),
    spread(4, pp=2, cp=2, pp_schedule="1f1b", cp_method="ulysses"),
    spread(4, tp=2, pp=2, pp_schedule="zbv", zero=0),
    spread(4, pp=2, pp_schedule="interleaved", zero=1, bucket_size=2000),
    spread(8, tp=2, pp=2, pp_schedule="1f1b", zero=1),
    spread(8, tp=2, pp=4, pp_schedule="interleaved_zero_bubble"),
    spread(8, tp=4, pp=2, pp_schedule="looped_bfs", sequence_parallel=False),
    spread(8, tp=2, cp=2, pp=2, pp_schedule="dualpipev"),
    spread(8, cp=2, pp=2, pp_schedule="zbv", cp_method="ulysses", zero=1),
    spread(8, pp=4, pp_schedule="dualpipev", zero=1),
    spread(8, pp=2, pp_schedule="gpipe", zero=3),
    spread(8, tp=2, cp=2, zero=1, tp_chunks=2),
    spread(8, tp=4, zero=3),
    spread(8, tp=2, zero=1, dp_shard=2, bucket_size=2000),
    spread(8, cp=4, zero=3),
    spread(8, cp=2, zero=3, dp_shard=2),
    spread(8, zero=1, dp_shard=4),
    spread(4, pp=2, pp_schedule="dualpipev", zero=3),
]
"""On 4 and 8 processes; with small buckets, hierarchical sharding, chunked products, ZeRO-3 under pipelines."""
CASES = [*TENSOR, *PIPELINE, *CONTEXT, *DATA, *MIXED]


def full() -> Iterator[tuple[Case, str]]:
    """Every layout with every model that it fits."""
    return ((case, name) for case in CASES for name, config in MODELS.items() if case.fits(config))


def fast() -> Iterator[tuple[Case, str]]:
    """Every layout with one model, those of an axis with one after the other; tensor parallelism with two."""
    names = list(MODELS)
    for cases, each in ((TENSOR, 2), (PIPELINE, 1), (CONTEXT, 1), (DATA, 1), (MIXED, 1)):
        turn = 0
        for case in cases:
            for _ in range(each):
                fitting = [name for name in names[turn:] + names[:turn] if case.fits(MODELS[name])]
                yield case, fitting[0]
                turn = (names.index(fitting[0]) + 1) % len(names)


@cache
def batches(count: int) -> list[MicroBatch]:
    """Micro-batches with documents of different lengths and masks of different density."""
    return [packed_batch(seed=seed) for seed in range(count)]


@cache
def truth(name: str, num_layers: int, num_batches: int, dtype: torch.dtype) -> Training:
    """What one process computes; many layouts share it."""
    return train_alone(replace(MODELS[name], num_layers=num_layers), dtype, batches(num_batches), steps=STEPS)
