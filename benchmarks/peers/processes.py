"""Contenders in processes of their own, of which one works at a time."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.peers.job import Job

ROOT = Path(__file__).resolve().parents[2]
ANSWER_LIMIT_S = 3600.0
"""Of steps and of getting ready: torch's bf16 products with AVX2 alone make a step of gpt2-124m take 19 minutes."""


class WorkerError(RuntimeError):
    """A contender's process said what went wrong, ended, or did not answer in time."""


class Worker:
    """One process, asked and answered in JSON lines; ended at the end of the block.

    Args:
        name: contender, as the process knows it.
        job: what it trains.
        log: file that gets its standard error.
    """

    def __init__(self, name: str, job: Job, log: Path) -> None:
        self.name, self.device, self.log = name, job.device, log
        paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
            "OMP_NUM_THREADS": str(job.threads),
            "TOKENIZERS_PARALLELISM": "false",
        }
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.peers.worker"],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
            )
        self._buffer = b""
        self._send({"contender": name, "job": job.to_json()})

    def ready(self) -> None:
        """Wait until it is built.

        Raises:
            WorkerError: it is not going to be.
        """
        self._answer(ANSWER_LIMIT_S)

    def ask(self, limit_s: float = ANSWER_LIMIT_S, **request: Any) -> dict[str, Any]:
        """The answer to a request.

        Raises:
            WorkerError: there is none.
        """
        self._send(request)
        return self._answer(limit_s)

    def _send(self, request: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
        except OSError:
            raise WorkerError(self._why()) from None

    def _answer(self, limit_s: float) -> dict[str, Any]:
        assert self.process.stdout is not None
        deadline = time.monotonic() + limit_s
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self.process.stdout], [], [], left)[0]:
                raise WorkerError(f"no answer within {limit_s:.0f} s")
            part = os.read(self.process.stdout.fileno(), 1 << 16)
            if not part:
                raise WorkerError(self._why())
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def _why(self) -> str:
        """What is known of a process that ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=10)
        lines = self.log.read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "no message")
        return f"its process ended with code {self.process.returncode}: {last[:300]}"

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End it: by the end of its input, or, where that does not help, by force."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(timeout=20 if error is None else 2)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
