"""Steps that run as graphs: nothing of a step enters them but through tensors, and they compute what steps compute."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megalite.config import RunConfig, TrainConfig
from megalite.errors import UserError
from megalite.parallel.mesh import Mesh
from megalite.train.graphed import GraphedStep, static_batch, static_batches
from megalite.train.setup import Session, build_session, validate_layout
from megalite.train.step import StepInputs, StepOutputs
from megalite.train.trainer import Trainer
from tests.helpers.graphs import Recorder, StandIn
from tests.helpers.tiny import make_dataset, tiny_config

CPU = Mesh(device=torch.device("cpu"))
STEPS = 6


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture(autouse=True)
def _no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megalite.train.flops.measure_gemm_tflops", lambda *_, **__: 0.1)


def session_of(dataset: Path, folder: Path, precision: str = "auto") -> Session:
    values = {"steps": STEPS, "global_batch_size": 4, "precision": precision}
    return build_session(tiny_config(dataset, folder, train=values), CPU)


def inputs_of(trainer: Trainer, step: int) -> StepInputs:
    batches = static_batches(trainer.load(step), trainer.config.train.seq_length)
    return StepInputs(batches, torch.tensor(1e-3 * (step + 1)), torch.zeros((), dtype=torch.float64))


def trained(session: Session, graphs: GraphedStep | None) -> list[Tensor]:
    """Results of all steps, the fourth with a gradient that is not finite, and the state after them."""
    trainer, seen = session.trainer, []
    trainer.graphs = graphs
    for step in range(STEPS):
        norm = trainer.model.layers[0].attention_norm.weight
        if step == 3:
            norm.data[0] = torch.inf
        result, stopping = trainer.train_step(step, session.stop)
        if step == 3:
            norm.data[0] = 1.0
        seen += [result.pack(), stopping.clone()]
    for shard in trainer.state.optimizer_shards():
        seen += [shard.weights, shard.exp_avg, shard.exp_avg_sq]
    trainer.loader.close()
    return [*seen, *trainer.guard.state().values(), trainer.optimizer.step_count]


@pytest.mark.parametrize("precision", ["auto", "fp8"])
def test_graphs_train_like_steps(dataset: Path, tmp_path: Path, precision: str) -> None:
    """Six steps, one skipped: losses, weights, moments and the guard's history have the same bits."""
    eager = trained(session_of(dataset, tmp_path / "eager", precision), None)
    session = session_of(dataset, tmp_path / "graphed", precision)
    seq_length = session.config.train.seq_length
    graphs = GraphedStep(session.trainer.compute, seq_length=seq_length, make_graph=StandIn)
    graphed = trained(session, graphs)
    assert graphs.graphs == 1, "other documents need no other graph"
    skipped = eager[2 * 3][3]
    assert skipped == 1
    assert len({float(loss[0]) for loss in eager[0:6:2]}) == 3
    for a, b in zip(eager, graphed, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_two_steps_run_the_same_ops(dataset: Path, tmp_path: Path) -> None:
    """Other documents, another learning rate: the same ops with the same sizes, strides and numbers."""
    session = session_of(dataset, tmp_path / "run")
    trainer = session.trainer
    words = []
    for step in range(3):
        inputs = inputs_of(trainer, step)
        with Recorder() as recorder:
            trainer.compute(inputs)
        if step:  # in the first one the state learns
            # On CPUs alone, where that is free, the loss head looks whether its factor is 1.
            words.append([str(op) for op in recorder.ops if op.name != "aten::_local_scalar_dense"])
    trainer.loader.close()
    assert len(words[0]) > 300
    assert words[0] == words[1]


def test_a_value_that_enters_through_python_is_seen(dataset: Path, tmp_path: Path) -> None:
    """What the stand-in is for: a graph that took a learning rate as a number trains with it for ever."""
    session = session_of(dataset, tmp_path / "run")
    compute = session.trainer.compute

    def careless(inputs: StepInputs) -> StepOutputs:
        return compute(dataclasses.replace(inputs, rate=torch.full((), float(inputs.rate))))

    graphs = GraphedStep(careless, seq_length=32, make_graph=StandIn)
    eager = trained(session_of(dataset, tmp_path / "eager"), None)
    graphed = trained(session, graphs)
    assert torch.equal(eager[2], graphed[2]), "until the second step they are alike"
    assert not torch.equal(eager[-6], graphed[-6])


def test_batches_become_static(dataset: Path, tmp_path: Path) -> None:
    batches = session_of(dataset, tmp_path / "run").trainer.load(0)
    static = static_batches(batches, 32)
    assert {tuple(b.cu_seqlens.shape) for b in static} == {(65,)}
    assert all(b.cu_seqlens.dtype == torch.int32 and b.max_seqlen == 32 for b in static)
    for before, after in zip(batches, static, strict=True):
        count = before.cu_seqlens.numel()
        assert torch.equal(after.cu_seqlens[:count], before.cu_seqlens)
        assert (after.cu_seqlens[count:] == before.tokens.numel()).all()
    many = dataclasses.replace(batches[0], cu_seqlens=torch.arange(66, dtype=torch.int32))
    assert static_batches([many], 32)[0].cu_seqlens.numel() == 129
    with pytest.raises(ValueError, match=r"of 65 documents of at most .* does not fit 64 documents"):
        static_batch(many, 64, 32)


def test_where_it_is_refused(dataset: Path, tmp_path: Path) -> None:
    config = tiny_config(dataset, tmp_path / "run", train={"cuda_graph": True})
    with pytest.raises(UserError, match=r"train\.cuda_graph=true captures the step of one process on a GPU"):
        validate_layout(config, CPU)
    with pytest.raises(UserError, match=r"train\.cuda_graph=true does not go with parallel.zero=3"):
        RunConfig(train=TrainConfig(cuda_graph=True), parallel=dataclasses.replace(config.parallel, zero=3))
