"""The ranks of one run as plain processes, as a launcher without an agent (Slurm) starts them; to kill some of them."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from tests.helpers.runs import ROOT, environment


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Ranks:
    """Processes that run one command with the variables of torchrun's ranks; their output goes to files."""

    def __init__(self, command: list[str], count: int, folder: Path) -> None:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count)}
        self.outputs = [folder / f"rank_{rank}.txt" for rank in range(count)]
        self.processes = []
        for rank, output in enumerate(self.outputs):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count)}
            with output.open("w") as file:
                self.processes.append(
                    subprocess.Popen(
                        command, env=environment(**address, **place), stdout=file, stderr=file, cwd=ROOT
                    )
                )

    def wait(self, but: int, timeout: float) -> tuple[list[int], float]:
        """Exit codes of all ranks but one, and the seconds until the last of them ended."""
        start = time.monotonic()
        others = [process for rank, process in enumerate(self.processes) if rank != but]
        codes = [process.wait(timeout=max(0.1, start + timeout - time.monotonic())) for process in others]
        return codes, time.monotonic() - start

    def said(self, rank: int) -> str:
        """What a rank has printed so far."""
        return self.outputs[rank].read_text()


@contextlib.contextmanager
def ranks(command: list[str], count: int, folder: Path) -> Iterator[Ranks]:
    """Start them; whatever still runs at the end is killed."""
    started = Ranks(command, count, folder)
    try:
        yield started
    finally:
        for process in started.processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
            process.wait()


def wait_until(
    condition: Callable[[], bool], what: str, processes: Iterable[subprocess.Popen[str]], timeout: float = 300
) -> None:
    """Wait for a condition, which processes that run bring about.

    Raises:
        AssertionError: it did not come true in time, or one of the processes ended before.
    """
    deadline = time.monotonic() + timeout
    while not condition():
        ended = [process.args for process in processes if process.poll() is not None]
        assert not ended, f"ended before {what}: {ended}"
        assert time.monotonic() < deadline, f"{what} did not happen within {timeout:g} s"
        time.sleep(0.01)
