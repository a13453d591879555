"""Start training runs the way people do: as processes, killed, resumed, under torchrun."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import tomli_w

ROOT = Path(__file__).resolve().parents[2]


def environment(**extra: str) -> dict[str, str]:
    """This process's environment with the source tree importable and one thread."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "200", **extra}


def command(*arguments: str, processes: int = 0) -> list[str]:
    """``megalite ARGUMENTS``, under torchrun when `processes` is given."""
    if not processes:
        return [sys.executable, "-m", "megalite", *arguments]
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m", "megalite"]
    return [sys.executable, "-m", *launcher, *arguments]


def run(
    *arguments: str, processes: int = 0, timeout: float = 200, **extra: str
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        command(*arguments, processes=processes),
        env=environment(**extra),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        cwd=ROOT,
    )


def write_config(path: Path, values: dict[str, Any]) -> Path:
    """Write configuration values as TOML."""
    path.write_text(tomli_w.dumps(values))
    return path


def run_and_signal(
    *arguments: str, number: signal.Signals, when: Any, timeout: float = 200
) -> tuple[int, str]:
    """Start a command, send it a signal once `when()` is true; returns the exit code and standard error.

    The command may end by itself first.
    """
    process = subprocess.Popen(
        command(*arguments),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    deadline = time.monotonic() + timeout
    while process.poll() is None and not when():
        assert time.monotonic() < deadline, "the condition for the signal never came true"
        time.sleep(0.002)
    if process.poll() is None:
        process.send_signal(number)
    _, error = process.communicate(timeout=timeout)
    return process.returncode, error
