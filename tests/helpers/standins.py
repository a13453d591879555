"""Stand-ins for a cluster's commands: programs on PATH that write down how they were called."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from tests.helpers.runs import environment

RECORD = """#!{python}
import json, os, sys
with open({log!r}, "a") as file:
    file.write(json.dumps({{"argv": sys.argv[1:], "env": dict(os.environ)}}) + "\\n")
{body}
"""

SCONTROL = """
if sys.argv[1:3] == ["show", "hostnames"]:
    print("127.0.0.1" if sys.argv[3] == "here" else "\\n".join(["node7", "node8"]))
"""

SRUN = """
import signal, subprocess
words = sys.argv[1:]
while words[0].startswith("-"):
    words.pop(0)
tasks = []
for number in range(int(os.environ["SLURM_NTASKS"])):
    place = {"SLURM_PROCID": str(number), "SLURM_LOCALID": str(number)}
    tasks.append(subprocess.Popen(words, env={**os.environ, **place}))
with open(os.environ["TASKS_FILE"], "w") as file:
    file.write(" ".join(str(task.pid) for task in tasks))
codes = [task.wait() for task in tasks]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))  # as srun: the highest, signals above 128
"""
"""Starts the tasks here, and writes their pids into $TASKS_FILE (where Slurm would send signals itself)."""


class Cluster:
    """A folder of stand-ins for torchrun, srun, scontrol and python, and what they were called with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self.tasks_file = folder / "tasks.txt"
        python = folder / "python"
        python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')  # a link would not find its packages
        python.chmod(0o755)

    def install(self, name: str, body: str = "") -> None:
        """Put a command on PATH that records each call, then does `body`."""
        path = self.folder / name
        path.write_text(
            RECORD.format(python=sys.executable, log=str(self.folder / f"{name}.jsonl"), body=body)
        )
        path.chmod(0o755)

    def calls(self, name: str) -> list[dict[str, Any]]:
        """Every call of a command: its `argv` and `env`."""
        log = self.folder / f"{name}.jsonl"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    def environment(self, **extra: str) -> dict[str, str]:
        """This process's environment, with these commands found first."""
        path = os.pathsep.join([str(self.folder), os.environ["PATH"]])
        return environment(PATH=path, TASKS_FILE=str(self.tasks_file), **extra)
