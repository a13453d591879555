"""Contract: kill a run at any moment, start it again, and the losses are the same to the last bit."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest

from megalite.train.checkpoint import read_manifest, verify_folder
from megalite.train.runlog import read_records
from tests.helpers.runs import run, run_and_signal, write_config
from tests.helpers.tiny import make_dataset, read_losses, tiny_values

pytestmark = pytest.mark.timeout(600)  # minutes where the machine is shared; half of one where it is not
STEPS = 40


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "set")


def make_config(path: Path, dataset: Path, run_dir: Path, **sections: dict) -> Path:
    values = tiny_values(
        dataset,
        run_dir,
        **{
            "train": {"steps": STEPS, "log_interval": 1, "precision": "bf16", **sections.pop("train", {})},
            "checkpoint": {"interval": 3},
            "eval": {"interval": 0, "samples": 0},
            **sections,
        },
    )
    return write_config(path, values)


@pytest.fixture(scope="module")
def uninterrupted(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Losses of a run that nobody kills."""
    folder = tmp_path_factory.mktemp("whole")
    done = run("pretrain", str(make_config(folder / "c.toml", dataset, folder / "run")))
    assert done.returncode == 0, done.stderr
    losses = read_losses(folder / "run")
    assert len(losses) == STEPS
    return losses


def wait_for_progress(run_dir: Path, chooser: random.Random):
    """A condition that comes true at a random moment after the process has begun to make progress.

    Half of the kills aim at a save: they wait for the temporary folder of a checkpoint.
    """
    seen = {path.name for path in (run_dir / "checkpoints").glob("step_*")}
    aim_at_save = chooser.random() < 0.5
    delay = chooser.uniform(0.0, 0.15)
    start: list[float] = []

    def condition() -> bool:
        folder = run_dir / "checkpoints"
        if aim_at_save:
            return any(folder.glob(".writing_*"))
        fresh = any(path.name not in seen for path in folder.glob("step_*"))
        if fresh and not start:
            start.append(time.monotonic())
        return bool(start) and time.monotonic() - start[0] > delay

    return condition, aim_at_save


def kill_until_done(
    tmp_path: Path, dataset: Path, kills: int, seed: int
) -> tuple[dict[int, float], int, int]:
    """Losses of a run killed (at most) `kills` times; how many kills hit, and how many of them a save."""
    chooser = random.Random(seed)
    run_dir = tmp_path / "killed"
    config = make_config(tmp_path / "killed.toml", dataset, run_dir)
    hits = in_save = 0
    for _ in range(kills):
        condition, _ = wait_for_progress(run_dir, chooser)
        code, error = run_and_signal("pretrain", str(config), number=signal.SIGKILL, when=condition)
        if code != -signal.SIGKILL:
            assert code == 0, error
            break
        hits += 1
        in_save += any((run_dir / "checkpoints").glob(".writing_*"))
    done = run("pretrain", str(config))
    assert done.returncode == 0, done.stderr
    return read_losses(run_dir), hits, in_save


def test_killed_runs_repeat_every_loss_bit_for_bit(dataset, uninterrupted, tmp_path):
    losses, hits, _ = kill_until_done(tmp_path, dataset, kills=2, seed=1)  # one aims at a save
    assert hits == 2
    assert losses == uninterrupted


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twenty_kills_some_of_them_during_a_save(dataset, uninterrupted, tmp_path):
    total = saves = attempt = 0
    while total < 20 or saves < 3:
        folder = tmp_path / str(attempt)
        folder.mkdir()
        losses, hits, in_save = kill_until_done(folder, dataset, kills=8, seed=100 + attempt)
        assert losses == uninterrupted
        total, saves, attempt = total + hits, saves + in_save, attempt + 1
    print(f"{total} kills, {saves} of them during a save, over {attempt} runs")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits_with_75(number, dataset, uninterrupted, tmp_path):
    run_dir = tmp_path / "run"
    config = make_config(tmp_path / "c.toml", dataset, run_dir, checkpoint={"interval": 0})

    def progressing() -> bool:
        return (run_dir / "metrics.jsonl").exists() and len(read_records(run_dir / "metrics.jsonl")) >= 3

    code, error = run_and_signal("pretrain", str(config), number=number, when=progressing)
    assert code == 75, error
    assert "run the same command again" in error
    events = read_records(run_dir / "events.jsonl")
    assert events[-1]["kind"] == "preempt"
    assert events[-1]["signal"] == number.name
    saved = run_dir / "checkpoints" / f"step_{events[-1]['step']:08d}"
    verify_folder(saved, read_manifest(saved))
    if number == signal.SIGTERM:  # what follows is the same for both
        done = run("pretrain", str(config), "--json")
        assert done.returncode == 0, done.stderr
        assert read_losses(run_dir) == uninterrupted
