"""Compiled blocks with gradient sinks: the bits of uncompiled ones, one graph for all, no recompilation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megalite.config import ModelConfig, ParallelConfig, RecomputeConfig, RunConfig, TrainConfig
from megalite.data.loader import MicroBatch, pack
from megalite.errors import UserError
from megalite.parallel.data import FlatBuffers
from megalite.parallel.gradients import get_sink
from megalite.parallel.mesh import Mesh
from megalite.train.replay import replay
from megalite.train.run import run_pretraining
from tests.helpers.tiny import make_dataset, read_losses, tiny_config
from tests.parallel.layouts import MODELS
from tests.parallel.replicas import make_replica, parts_of
from tests.parallel.training import descend, valid_labels

TOKENS = 32
STEPS = [[(0, 5, 6, 19), (0,)], [(0, 31), (0, 16)], [(0, 4, 8, 12, 13), (0, 7)]]
"""Where documents start, by step and micro-batch: number and longest length of them change."""
RECOMPUTE = {
    "none": RecomputeConfig(),
    "selective": RecomputeConfig(kind="selective", parts=("attention", "norm", "activation")),
    "full": RecomputeConfig(kind="full"),
}


def batch(starts: tuple[int, ...], seed: int) -> MicroBatch:
    ids = np.random.default_rng(seed).integers(0, 301, (2, TOKENS))
    return pack([ids[0]], [ids[1]], [np.array(starts)])


def train(
    config: ModelConfig, backend: str, dtype: torch.dtype | str = torch.float32, recompute: str = "none"
) -> tuple[list[Tensor], list[int]]:
    """Losses, gradients and weights of all steps; and how many graphs were made until the end of each step."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    more: dict[str, Any] = {"compile_backend": backend, "recompute": RECOMPUTE[recompute]}
    if isinstance(dtype, str):
        dtype, more["fp8"] = torch.bfloat16, "rowwise"
    # Buckets end at other places of each layer: its gradients share other memory with one another.
    replica = make_replica(ParallelConfig(bucket_size=3000), config, dtype, TOKENS, **more)
    seen, graphs = [], []
    for step, micro_batches in enumerate(STEPS):
        batches = [batch(starts, 10 * step + number) for number, starts in enumerate(micro_batches)]
        scale = torch.tensor(1 / valid_labels(batches))
        seen.append(replica.gradients(batches, scale))
        replica.state.finish_gradients()
        seen += [part.value for part in parts_of(replica, "main_grad")]
        with torch.no_grad():
            descend(replica.state, step)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    return seen + [part.value for part in parts_of(replica, "master")], graphs


@pytest.mark.parametrize(
    ("name", "dtype", "recompute"),
    [
        ("qwen3-tied", torch.float32, "full"),
        pytest.param("gpt2", torch.float32, "none", marks=pytest.mark.slow),
        pytest.param("llama", torch.bfloat16, "selective", marks=pytest.mark.slow),
        pytest.param("llama", "fp8", "none", marks=pytest.mark.slow),
    ],
)
def test_every_gradient_has_the_bits_of_the_uncompiled(
    name: str, dtype: torch.dtype | str, recompute: str
) -> None:
    """Three steps of two micro-batches, through main gradients; three layers share the graphs of two."""
    config = dataclasses.replace(MODELS[name], num_layers=3)
    eager, none = train(config, "", dtype, recompute)
    compiled, graphs = train(config, "aot_eager", dtype, recompute)
    assert none == [0, 0, 0]
    # The first layer, which has no residual, and the others; both again when max_seqlen first changes.
    assert graphs == [4, 4, 4], "other documents or other layers made new graphs"
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("name", ["llama", "qwen3-tied", "gpt2"])
def test_inductor_computes_the_same(name: str, recompute: str) -> None:
    eager, _ = train(MODELS[name], "", recompute=recompute)
    compiled, graphs = train(MODELS[name], "inductor", recompute=recompute)
    assert graphs == [4, 4, 4]
    # The order of fp32 sums; a gradient that is zero but for rounding (of the keys' biases) counts by the others.
    largest = max(float(a.abs().max()) for a in eager[1:])
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * largest)


def ranks_job() -> tuple[list[bool], bool, str]:
    """Two ranks that divide the state: were all reductions under way before each step's end; the same bits; trace."""
    early, seen = [], []
    for backend in ("", "aot_eager"):
        config = dataclasses.replace(MODELS["llama"], num_layers=3)
        layout = ParallelConfig(bucket_size=3000)
        replica = make_replica(layout, config, torch.float32, TOKENS, compile_backend=backend)
        state = replica.state
        assert isinstance(state, FlatBuffers)
        order: list[str] = []
        note_order(state, order)
        for step in range(3):
            order.clear()
            # The same documents, which saves a second compilation.
            own = [batch((0, 5, 19), 10 * step + 2 * replica.mesh.dp.rank + number) for number in range(2)]
            replica.gradients(own, torch.tensor(1 / 128))
            early.append(len(state.reducer._running) == len(state.buckets))
            state.finish_gradients()
            with torch.no_grad():
                descend(state, step)
            state.publish()
        seen.append([part.value for part in parts_of(replica, "master")])
        state.release()
    same = all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
    return early, same, " ".join(order)


def note_order(state: FlatBuffers, order: list[str]) -> None:
    """Write down which layer's weight gradients arrived ("layers.1") and when reductions start ("reduce")."""
    launch = state.reducer._launch

    def note_launch() -> None:
        order.append("reduce")
        launch()

    def noted(layer: str, added: Callable[[], None]) -> Callable[[], None]:
        def note() -> None:
            if order[-1:] != [layer]:
                order.append(layer)
            added()

        return note

    state.reducer._launch = note_launch  # type: ignore[method-assign]
    for bucket in state.buckets:
        for slot in bucket.slots:
            sink = get_sink(slot.parameter)
            if sink is not None and slot.name.startswith("layers"):
                sink.added = noted(".".join(slot.name.split(".")[:2]), sink.added)


def test_reductions_start_at_the_edge_of_each_block(rank_pool: Any) -> None:
    for early, same, order in rank_pool(2).run(ranks_job):
        assert early == [False, True, True] * 2, "a step's reductions waited for its end"
        assert same
        second = order[order.rindex("layers.2") :]
        assert second.index("reduce") < second.index("layers.1"), order
        assert second.index("layers.1") < second.index("reduce", second.index("layers.1")), order


def test_what_does_not_compile_is_refused() -> None:
    train = TrainConfig(compile=True)
    for layout, named in (({"tp": 2}, "parallel.tp=2"), ({"zero": 3}, "parallel.zero=3")):
        with pytest.raises(UserError, match=f"train.compile=true does not go with {named}"):
            RunConfig(train=train, parallel=ParallelConfig(**layout))


@pytest.mark.slow
def test_a_compiled_run_validates_samples_and_replays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its losses are those of the uncompiled one; what is not a training step runs uncompiled."""
    monkeypatch.setattr("megalite.train.flops.measure_gemm_tflops", lambda *_, **__: 0.1)
    monkeypatch.setattr("megalite.train.run.write_report", lambda run_dir: run_dir / "report.html")
    mesh, data = Mesh(device=torch.device("cpu")), make_dataset(tmp_path / "set")
    losses = []
    for compiled in (False, True):
        config = tiny_config(data, tmp_path / str(compiled), train={"compile": compiled, "steps": 6})
        outcome = run_pretraining(config, mesh, command="test", config_toml=lambda config: "")
        assert outcome.result["val_loss"] > 0
        losses.append(list(read_losses(tmp_path / str(compiled)).values()))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    findings, _ = replay(config, mesh, 5)
    assert findings.loss == pytest.approx(losses[1][4], rel=1e-5)
