"""Bytes that ranks send in a step, by axis: traced below our own code, against the formulas.

    python -m benchmarks.communication_bytes --output benchmarks/results/communication_bytes.jsonl

Processes on this machine's CPU (gloo) take one step in each layout while torch's dispatcher records every collective
and its size (`tests/helpers/trace.py`); `megalite.train.communication` says what it should be. The model is small: the
numbers of bytes are exact at any size. One JSON record per layout; exit code 1 if one of them differs.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
import tyro

from megalite.config import ModelConfig, ParallelConfig
from megalite.config_values import to_dict
from megalite.train.communication import StepShape, step_bytes
from megalite.train.run import commit
from tests.helpers.rank_pool import RankPool
from tests.parallel.layouts import packed_batch
from tests.train.test_communication import DEEP, MICRO_BATCHES, traced_job

AXES = ("tp", "cp", "pp", "dp")
LAYOUTS: tuple[tuple[int, dict[str, Any]], ...] = (
    (2, {"tp": 2}),
    (2, {"tp": 2, "sequence_parallel": False}),
    (4, {"tp": 4}),
    (2, {"cp": 2}),
    (4, {"cp": 4}),
    (2, {"cp": 2, "cp_method": "ulysses"}),
    (2, {"pp": 2}),
    (2, {"pp": 2, "pp_schedule": "interleaved"}),
    (2, {"pp": 2, "pp_schedule": "zbv"}),
    (4, {"zero": 0}),
    (4, {"zero": 1}),
    (4, {"zero": 1, "grad_reduce_dtype": "bf16"}),
    (4, {"zero": 1, "dp_shard": 2}),
    (4, {"zero": 3}),
    (8, {"tp": 2, "pp": 2}),
    (8, {"tp": 2, "cp": 2}),
)
"""Processes and parallel settings."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Count the bytes of a step by axis."""

    model: str = "qwen3-tied"
    """Name of a small model: llama, qwen3-tied, one-kv-head or gpt2."""
    output: str = ""
    """JSONL file to append the records to."""


def main() -> int:
    """Trace every layout; returns the exit code."""
    arguments = tyro.cli(Arguments)
    config = DEEP[arguments.model]
    pools: dict[int, RankPool] = {}
    equal = True
    for processes, settings in LAYOUTS:
        pool = pools.setdefault(processes, RankPool(processes, timeout=240))
        record = measure(pool, processes, ParallelConfig(**settings, bucket_size=3000), config)
        equal &= record["largest_relative_difference"] <= 1e-12
        print(json.dumps(record), flush=True)
        if arguments.output:
            with Path(arguments.output).open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
    for pool in pools.values():
        pool.close()
    return 0 if equal else 1


def measure(pool: RankPool, processes: int, layout: ParallelConfig, config: ModelConfig) -> dict[str, Any]:
    """One step in one layout: bytes of all ranks together, by axis, counted and by formula."""
    tokens = packed_batch().tokens.numel()
    step = StepShape(
        micro_batches=MICRO_BATCHES, micro_batch_tokens=tokens, seq_length=tokens, dtype=torch.float32
    )
    traced, formula = dict.fromkeys(AXES, 0.0), dict.fromkeys(AXES, 0.0)
    for pp_rank, tp_rank, sent in pool.run(traced_job, layout, config):
        expected = step_bytes(config, layout, step, processes=processes, tp_rank=tp_rank)[pp_rank]
        for axis in AXES:
            traced[axis] += getattr(sent, axis)
            formula[axis] += getattr(expected, axis)
    differences = [abs(traced[axis] - formula[axis]) / max(1.0, formula[axis]) for axis in AXES]
    return {
        "benchmark": "communication_bytes",
        "processes": processes,
        "parallel": to_dict(layout),
        "model": to_dict(config),
        "micro_batches": MICRO_BATCHES,
        "micro_batch_tokens": tokens,
        "sent_bytes": traced,
        "formula_bytes": formula,
        "largest_relative_difference": max(differences),
        "formula": "megalite/train/communication.py",
        "torch": torch.__version__,
        "commit": commit(),
        "command": shlex.join(["python", "-m", "benchmarks.communication_bytes", *sys.argv[1:]]),
    }


if __name__ == "__main__":
    sys.exit(main())
