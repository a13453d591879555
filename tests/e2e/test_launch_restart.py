"""A rank is killed under torchrun: the agent starts all again, and no loss differs from an undisturbed run's.

Nor do the undisturbed ranks' losses differ from those of one process.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megalite.train.runlog import read_records
from tests.helpers.ranks import free_port, ranks, wait_until
from tests.helpers.runs import ROOT, command, environment, run, write_config
from tests.helpers.tiny import make_dataset, read_losses, tiny_values

STEPS = 30


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "set")


def config(folder: Path, dataset: Path) -> str:
    values = tiny_values(
        dataset,
        folder / "run",
        train={"steps": STEPS, "log_interval": 1},
        eval={"interval": 0, "samples": 0},
        checkpoint={"interval": 5},
    )
    values["parallel"] = {"timeout_s": 60.0}
    return str(write_config(folder / "c.toml", values))


@pytest.fixture(scope="module")
def undisturbed(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Losses of two ranks that nobody kills."""
    folder = tmp_path_factory.mktemp("whole")
    with ranks(command("pretrain", config(folder, dataset)), 2, folder) as run:
        wait_until(lambda: all(process.poll() is not None for process in run.processes), "the end", [])
        assert [process.returncode for process in run.processes] == [0, 0], run.said(0)
    return read_losses(folder / "run")


def torchrun(nodes: int, config_file: str) -> list[subprocess.Popen[str]]:
    """The agents of two ranks, one agent per node."""
    meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--rdzv-id=test"]
    where = ["--standalone"] if nodes == 1 else [*meeting, "--local-addr=127.0.0.1", f"--nnodes={nodes}"]
    words = [*where, f"--nproc-per-node={2 // nodes}", "--max-restarts=2", "-m", "megalite", "pretrain"]
    return [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *words, config_file],
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for _ in range(nodes)
    ]


def rank_process(agents: list[int], rank: int) -> int:
    """The pid of a rank among the agents' children."""
    for agent in agents:
        for child in Path(f"/proc/{agent}/task/{agent}/children").read_text().split():
            if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
                return int(child)
    raise AssertionError(f"no process of rank {rank}")


def test_two_ranks_give_the_losses_of_one_process(dataset, undisturbed, tmp_path):
    done = run("pretrain", config(tmp_path, dataset))
    assert done.returncode == 0, done.stderr
    alone = read_losses(tmp_path / "run")
    assert len(alone) == STEPS
    assert max(abs(undisturbed[s] - alone[s]) / alone[s] for s in range(1, 21)) < 1e-5


@pytest.mark.timeout(600)
@pytest.mark.parametrize("nodes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_torchrun_restarts_a_killed_rank_and_repeats_every_loss(nodes, dataset, undisturbed, tmp_path):
    agents = torchrun(nodes, config(tmp_path, dataset))
    try:
        wait_until(lambda: any((tmp_path / "run" / "checkpoints").glob("step_*")), "a checkpoint", agents)
        os.kill(rank_process([agent.pid for agent in agents], 1), signal.SIGKILL)
        said = [agent.communicate(timeout=300)[1] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()  # nothing, where it ended; else its ranks follow
    assert [agent.returncode for agent in agents] == [0] * nodes, "\n".join(said)
    events = [record["kind"] for record in read_records(tmp_path / "run" / "events.jsonl")]
    assert events.count("resume") == 1, events
    assert any("rank 1 on host" in text and "is gone" in text for text in said), "\n".join(said)
    losses = read_losses(tmp_path / "run")
    assert len(losses) == STEPS
    assert losses == undisturbed
