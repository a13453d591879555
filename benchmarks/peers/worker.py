"""The process of one contender: takes requests as JSON lines on standard input, answers on standard output.

    python -m benchmarks.peers.worker

The first line is {"contender": name, "job": ...}. Then {"do": "steps", "count": n}, {"do": "gemms"} or
{"do": "rest"}, until standard input ends. An answer is a JSON object; one with "error" says what went wrong.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers import memory
from benchmarks.peers.contenders import Contender, contenders
from benchmarks.peers.gemms import Gemms
from benchmarks.peers.job import Job, write_data, write_weights
from benchmarks.peers.trainers import Stepper, open_trainer
from megalite_kernels.memory import keep_freed_pages

GEMMS = "gemms"
"""Name of the process that measures matrix products."""


def main() -> None:
    """Answer until there are no more requests."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not come between the answers

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=answers, flush=True)

    first = json.loads(sys.stdin.readline())
    job = Job.from_json(first["job"])
    try:
        with make(first["contender"], job) as handle:
            answer(ready=True)
            for line in sys.stdin:
                request = json.loads(line)
                answer(**handle(**request))
    except Exception as error:
        text = " ".join(str(error).split())
        answer(error=f"{type(error).__name__}: {text[:400]}")
        raise


Handle = Callable[..., dict[str, Any]]


@contextlib.contextmanager
def make(name: str, job: Job) -> Iterator[Handle]:
    """What answers requests to the process called `name`."""
    if job.device == "cpu":
        torch.set_num_threads(job.threads)
    if name == GEMMS:
        gemms = Gemms(job)
        yield lambda do: {"gemms": gemms.measure()}
        return
    contender = contenders(job.model, job.precision)[name]
    if job.device == "cpu" and job.keep_pages and contender.keep_pages:
        keep_freed_pages()
    load_code(job, contender)
    memory.release(job.device)
    baseline = memory.held_bytes(job.device)
    with open_trainer(job, contender) as trainer:
        stepper = Stepper(trainer, job)
        memory.release(job.device)  # what only building needed
        yield Measurement(job, stepper, baseline).handle


def load_code(job: Job, contender: Contender) -> None:
    """Two steps of a tiny model, so that imports, thread pools and the compiler are in memory before the baseline."""
    with tempfile.TemporaryDirectory() as folder:
        tiny = job.tiny(Path(folder))
        write_data(tiny)
        write_weights(tiny)
        with open_trainer(tiny, contender) as trainer:
            for _ in range(tiny.steps):
                trainer.step()
    if contender.compiled:
        torch._dynamo.reset()  # else the next shapes count as a change of these, and become symbolic
    gc.collect()


class Measurement:
    """Steps and what they cost."""

    def __init__(self, job: Job, stepper: Stepper, baseline: int) -> None:
        self.job, self.stepper, self.baseline = job, stepper, baseline
        self.resting = False

    def handle(self, do: str, count: int = 0) -> dict[str, Any]:
        """The answer to a request."""
        if do == "rest":
            memory.release(self.job.device)
            self.resting = True
            return {}
        if self.resting:  # one step brings back memory and caches, and is not counted
            self.stepper.run(1)
            self.resting = False
        memory.reset_peak(self.job.device)
        start = time.perf_counter()
        times, losses = self.stepper.run(count)
        state = self.stepper.trainer.state_bytes()
        peak = max(0, memory.peak_bytes(self.job.device) - self.baseline)
        seconds = time.perf_counter() - start
        return {
            "step_ms": times,
            "losses": losses,
            "seconds": seconds,
            "peak_memory_bytes": peak,
            "state_bytes": state,
            **device_state(self.job),
        }


def device_state(job: Job) -> dict[str, float | None]:
    """Power and clock of the GPU now; None where they cannot be read."""
    if job.device == "cuda":
        with contextlib.suppress(Exception):  # NVML is a package of its own, and not every driver answers
            return {
                "power_watts": torch.cuda.power_draw() / 1e3,
                "clock_mhz": float(torch.cuda.clock_rate()),
            }
    return {"power_watts": None, "clock_mhz": None}


if __name__ == "__main__":
    main()
