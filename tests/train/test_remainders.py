"""Masters as bf16 weights and 16 bits more: the run, its checkpoints and its restarts are those of whole masters.

The only difference is where a master lies half-way between two bf16 numbers: with remainders its weight is the one
farther from zero. Runs with whole masters are given that rule here, and must then agree to the last bit.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megalite.config import ParallelConfig, RunConfig
from megalite.errors import ExitCode
from megalite.optim import adamw
from megalite.parallel import buckets, pieces
from megalite.parallel.data import FlatBuffers
from megalite.parallel.mesh import Mesh, mesh_of_group
from megalite.train.checkpoint import MANIFEST
from megalite.train.memory_activations import Job
from megalite.train.memory_estimate import estimate_memory
from megalite.train.run import run_pretraining
from megalite.train.setup import build_session
from megalite_kernels import adamw_
from megalite_kernels.reference.adamw import split
from tests.helpers.tiny import cheap_surroundings, make_dataset, read_losses, tiny_config

CPU = Mesh(device=torch.device("cpu"))
EARLIER, STEPS = 3, 6


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture(autouse=True)
def _surroundings() -> Iterator[None]:
    with cheap_surroundings():
        yield


def round_ties_away(patch: Callable[[Any, str, Any], None]) -> None:
    """Let whole masters be rounded to weights as remainders are."""

    def step(weights: Tensor, master: Tensor | None, *state: Tensor, **options: Any) -> None:
        adamw_(weights, master, *state, **options)
        if master is not None:
            weights.copy_(split(master)[0])

    write_values = pieces.write_values

    def copy(state: FlatBuffers) -> None:
        for bucket in state.buckets:
            if bucket.master is not None:
                bucket.weights[bucket.own].copy_(split(bucket.master)[0])
        state.publish()
        state.settle()

    def write(live: Tensor, remainder: Tensor | None, values: Tensor) -> None:
        write_values(
            live, torch.empty_like(live, dtype=torch.int16) if remainder is None else remainder, values
        )

    patch(adamw, "adamw_", step)
    patch(FlatBuffers, "copy_master_to_weights", copy)
    patch(buckets, "write_values", write)


def config_of(dataset: Path, run_dir: Path, *, remainders: bool, steps: int, **layout: Any) -> RunConfig:
    config = tiny_config(
        dataset,
        run_dir,
        train={"precision": "bf16", "steps": steps, "global_batch_size": 4, "micro_batch_size": 2},
        schedule={"kind": "constant", "warmup": 1},
        optimizer={"learning_rate": 3e-3, "store_param_remainders": remainders},
        eval={"interval": 0, "samples": 0, "max_tokens": 64},
    )
    return dataclasses.replace(config, parallel=ParallelConfig(**layout))


def run(config: RunConfig, mesh: Mesh = CPU) -> None:
    assert run_pretraining(config, mesh, command="test", config_toml=lambda config: "").code is ExitCode.DONE


def run_on_rank(config: RunConfig) -> None:
    with cheap_surroundings(), pytest.MonkeyPatch.context() as patch:
        if not config.optimizer.store_param_remainders:
            round_ties_away(patch.setattr)
        run(config, mesh_of_group(config.parallel, torch.device("cpu")))


def stored(run_dir: Path) -> dict[str, Any]:
    """Fingerprints of everything that the last checkpoint holds, and the bytes of its tensor files."""
    folder = sorted((run_dir / "checkpoints").glob("step*"))[-1]
    manifest = json.loads((folder / MANIFEST).read_text())
    files = {
        str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))
    }
    assert files
    return {"tensors": manifest["tensors"], "trainer": manifest["trainer"], "files": files}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("second", [True, False])
def test_a_run_is_that_of_whole_masters_wherever_it_changes(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: bool, second: bool
) -> None:
    """The same losses and the same checkpoint as an uninterrupted run with remainders, to the last bit."""
    run(config_of(dataset, tmp_path / "whole", remainders=True, steps=STEPS))
    round_ties_away(monkeypatch.setattr)
    run(config_of(dataset, tmp_path / "parts", remainders=first, steps=EARLIER))
    run(config_of(dataset, tmp_path / "parts", remainders=second, steps=STEPS))
    assert read_losses(tmp_path / "parts") == read_losses(tmp_path / "whole")
    assert len(read_losses(tmp_path / "whole")) == STEPS
    assert stored(tmp_path / "parts") == stored(tmp_path / "whole")


@pytest.mark.parametrize("zero", [0, 1])
def test_ranks_that_divide_the_state(dataset: Path, tmp_path: Path, rank_pool: Any, zero: int) -> None:
    """Two ranks with and without remainders; then one process goes on from their checkpoint, in both forms."""
    for remainders in (True, False):
        layout = {"zero": zero, "bucket_size": 1000}
        name = tmp_path / str(remainders)
        config = config_of(dataset, name, remainders=remainders, steps=EARLIER, **layout)
        rank_pool(2).run(run_on_rank, config)
    assert read_losses(tmp_path / "True") == read_losses(tmp_path / "False")
    assert stored(tmp_path / "True") == stored(tmp_path / "False")
    for remainders in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            round_ties_away(patch.setattr)
            run(config_of(dataset, tmp_path / str(remainders), remainders=not remainders, steps=STEPS))
    assert read_losses(tmp_path / "True") == read_losses(tmp_path / "False")
    assert stored(tmp_path / "True") == stored(tmp_path / "False")


@pytest.mark.parametrize(
    ("precision", "remainders", "expected"),
    [("bf16", True, 16), ("fp8", True, 16), ("bf16", False, 18), ("fp32", True, 16)],
)
def test_bytes_of_a_parameter(
    dataset: Path, tmp_path: Path, precision: str, remainders: bool, expected: int
) -> None:
    """All that is allocated, and what the estimate says of it; but for what is padding."""
    config = tiny_config(
        dataset,
        tmp_path,
        train={"precision": precision},
        optimizer={"store_param_remainders": remainders},
        model={"hidden_size": 64, "ffn_hidden_size": 128},
    )
    trainer = build_session(config, CPU).trainer
    trainer.loader.close()
    held = {}
    for group in trainer.state.groups:  # type: ignore[attr-defined]
        tensors = [group.weights, group.moments, group.master, group.remainder]
        for tensor in [*tensors, *(bucket.main_grad for bucket in group.buckets)]:
            if tensor is not None:
                held[tensor.data_ptr()] = tensor.nbytes
        assert all(shard.values.dtype == torch.float32 for shard in group.shards())
    elements = sum(group.weights.numel() for group in trainer.state.groups)  # type: ignore[attr-defined]
    assert sum(held.values()) == expected * elements
    job = Job(
        model=trainer.config.model,
        parallel=ParallelConfig(),
        world_size=1,
        tokens=64,
        itemsize=4 if precision == "fp32" else 2,
        remainders=remainders,
    )
    (memory,) = estimate_memory(job)
    assert memory.weights + memory.gradients + memory.optimizer == expected * memory.parameters


def test_the_update_ratio_is_that_of_whole_masters(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    round_ties_away(monkeypatch.setattr)
    found = []
    for remainders in (True, False):
        config = config_of(dataset, tmp_path / str(remainders), remainders=remainders, steps=4)
        session = build_session(config, CPU)
        session.trainer.train_step(0, session.stop)
        found.append(session.trainer.optimizer.update_ratio(1e-3))
        session.trainer.loader.close()
    assert found[0] == found[1]
    assert found[0][0] > 0
