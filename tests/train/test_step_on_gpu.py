"""What only a GPU can show of a step: that it waits for nothing and allocates nothing, and that graphs compute it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megalite.parallel.mesh import Mesh
from megalite.train.setup import Session, build_session, prepare_process
from tests.helpers.tiny import make_dataset, tiny_config

pytestmark = pytest.mark.gpu
MODEL = {"hidden_size": 128, "ffn_hidden_size": 256}
"""Heads of 32, which the GPU's kernels take."""
WARM = 4
"""Steps until every kernel is compiled and every graph captured."""
STEPS = 12


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("megalite.train.flops.measure_gemm_tflops", lambda *_, **__: 0.1)
    stream = torch.cuda.current_stream()
    yield
    torch.cuda.set_stream(stream)
    torch.cuda.set_sync_debug_mode("default")
    torch.use_deterministic_algorithms(False)


def session_of(dataset: Path, folder: Path, **train: Any) -> Session:
    values = {"steps": STEPS, "device": "cuda", "precision": "bf16", **train}
    config = tiny_config(dataset, folder, train=values, model=MODEL)
    mesh = Mesh(device=torch.device("cuda", torch.cuda.current_device()))
    prepare_process(config, mesh)
    return build_session(config, mesh)


def run(session: Session, steps: range) -> list[torch.Tensor]:
    """Results of some steps, still on the device."""
    return [session.trainer.train_step(step, session.stop)[0].pack() for step in steps]


def losses(session: Session) -> torch.Tensor:
    """Loss and gradient norm of all steps."""
    packed = run(session, range(STEPS))
    session.trainer.loader.close()
    return torch.stack(packed)[:, :2].cpu()


def test_graphs_train_like_steps(dataset: Path, tmp_path: Path) -> None:
    eager = losses(session_of(dataset, tmp_path / "eager"))
    session = session_of(dataset, tmp_path / "graphed", cuda_graph=True)
    graphed = losses(session)
    assert session.trainer.graphs is not None
    assert session.trainer.graphs.graphs == 1
    assert eager[-1, 0] < eager[0, 0]
    torch.testing.assert_close(graphed, eager, rtol=1e-5, atol=0)  # the same kernels in the same order


def test_compiled_blocks_train_like_blocks(dataset: Path, tmp_path: Path) -> None:
    eager = losses(session_of(dataset, tmp_path / "eager"))
    compiled = losses(session_of(dataset, tmp_path / "compiled", compile=True))
    torch.testing.assert_close(compiled, eager, rtol=2e-2, atol=0)  # bf16, rounded at other places


@pytest.mark.parametrize("cuda_graph", [False, True], ids=["steps", "graphs"])
def test_a_steady_step_waits_for_nothing_and_allocates_nothing(
    dataset: Path, tmp_path: Path, cuda_graph: bool
) -> None:
    """Between two progress lines: torch raises at the first wait, and asks the driver for no memory."""
    session = session_of(dataset, tmp_path / "run", cuda_graph=cuda_graph)
    trainer = session.trainer
    packed = run(session, range(WARM))
    torch.cuda.synchronize()
    before = asked(trainer.mesh.device)
    torch.cuda.set_sync_debug_mode("error")
    packed += run(session, range(WARM, STEPS))
    torch.cuda.set_sync_debug_mode("default")
    assert asked(trainer.mesh.device) == before
    assert torch.isfinite(torch.stack(packed)).all()
    trainer.loader.close()


def asked(device: torch.device) -> list[int]:
    """How often memory was asked of the driver, given back or run out of."""
    stats = torch.cuda.memory_stats(device)
    return [stats[name] for name in ("num_device_alloc", "num_device_free", "num_alloc_retries", "num_ooms")]
