"""One rank of four dies or hangs: the others end in time and name the rank, its host, and what they waited in."""

from __future__ import annotations

import os
import re
import signal
import socket
from pathlib import Path

import pytest

from megalite.train.runlog import read_records
from tests.helpers.ranks import ranks, wait_until
from tests.helpers.runs import command, write_config
from tests.helpers.tiny import make_dataset, tiny_values

LOST = 69
DOING = r"in [a-z_]+ over [a-z]+ \(collective \d+, step \d+\)"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "set")


def endless(folder: Path, dataset: Path, timeout_s: float) -> list[str]:
    """The command of a run that will not finish while the test lasts."""
    values = tiny_values(
        dataset,
        folder / "run",
        train={"steps": 1_000_000, "log_interval": 1},
        eval={"interval": 0, "samples": 0},
        checkpoint={"interval": 0},
    )
    values["parallel"] = {"timeout_s": timeout_s, "tp": 2}
    return command("pretrain", str(write_config(folder / "c.toml", values)))


def training(folder: Path) -> bool:
    metrics = folder / "run" / "metrics.jsonl"
    return metrics.exists() and len(read_records(metrics)) >= 3


# A rank says every second where it is, so the last that was heard may be from before its first step.
HEARD = r", last heard of in [a-z_]+ over [a-z]+ \(collective \d+(, step \d+)?\)"


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("victim", "number", "timeout_s", "limit", "says"),
    [
        pytest.param(2, signal.SIGKILL, 600.0, 30.0, f"is gone{HEARD}", id="killed"),
        pytest.param(
            0, signal.SIGKILL, 600.0, 30.0, "is gone, and the run's store with it", id="killed with the store",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            2, signal.SIGSTOP, 10.0, 60.0, f"(does not answer|has not answered for 10 s){HEARD}", id="stopped",
            marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_one_of_four(victim, number, timeout_s, limit, says, dataset, tmp_path):
    with ranks(endless(tmp_path, dataset, timeout_s), 4, tmp_path) as run:
        wait_until(lambda: training(tmp_path), "the third step", run.processes)
        os.kill(run.processes[victim].pid, number)
        codes, seconds = run.wait(but=victim, timeout=2 * limit)
        print(f"all ended {seconds:.1f} s after {number.name}")
        for rank in sorted({0, 1, 2, 3} - {victim}):
            host = re.escape(socket.gethostname())
            expected = rf"rank {victim} on host {host} {says}; rank {rank} was {DOING}"
            assert re.search(expected, run.said(rank)), run.said(rank)
    assert codes == [LOST] * 3
    assert seconds < limit
