"""All contenders in one run: first their losses are compared, then they are timed in turns."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers import memory
from benchmarks.peers.contenders import Contender
from benchmarks.peers.job import Job
from benchmarks.peers.processes import Worker, WorkerError
from benchmarks.peers.worker import GEMMS
from megalite.models.families import piece_shapes
from megalite_kernels.memory import allocator

TOLERANCES = {"fp32": 1e-4, "bf16": 5e-3, "fp8": 2e-2}
"""Largest relative difference of any of the first losses from those of the first contender. Seen on llama-60m in bf16:
1e-4 over 512 tokens, 1e-3 over 256, where a step of Adam from nothing follows the sign of each rounding error."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """How much is measured."""

    compared: int
    """Steps whose losses are compared; they also warm up."""
    warmup: int
    """Further steps before the first measured one."""
    rounds: int
    """Turns of each contender."""
    steps_per_round: int
    in_turns: bool = True
    """Everybody stays in memory and takes turns; else one after the other, each with all of its turns."""

    @property
    def total(self) -> int:
        """The most steps that a contender takes: one more a turn where memory had to be given back."""
        return self.compared + self.warmup + self.rounds * (self.steps_per_round + 1)


@dataclasses.dataclass
class Entry:
    """A contender in the run."""

    contender: Contender
    worker: Worker
    losses: list[float] = dataclasses.field(default_factory=list)
    first_step_s: float = 0.0
    times: list[float] = dataclasses.field(default_factory=list)
    answers: list[dict[str, Any]] = dataclasses.field(default_factory=list)


Say = Callable[[str], None]


def compare(
    chosen: list[Contender], job: Job, plan: Plan, logs: Path, say: Say
) -> tuple[list[dict[str, Any]], list[dict[str, str]], dict[str, float]]:
    """Run everybody.

    Args:
        chosen: contenders; the first one's losses are what the others' are compared with.
        job: what they train; its files are written.
        plan: how much is measured.
        logs: folder for their standard error.
        say: called with a line for the person who waits.

    Returns:
        A record of each contender, (name, reason) of each that was not timed, and name → TFLOP/s of the products.
    """
    failed: list[dict[str, str]] = []
    with contextlib.ExitStack() as stack:
        products = stack.enter_context(Worker(GEMMS, job, logs / "gemms.log"))
        products.ready()
        gemms: dict[str, float] = products.ask(do="gemms")["gemms"]
        entries: list[Entry] = []
        for contender in chosen:
            own = stack.enter_context(contextlib.ExitStack())
            try:
                entry = _start(contender, job, plan, logs, own)
                if reason := difference(entry, entries, job):
                    raise WorkerError(reason)
                first, last = entry.losses[0], entry.losses[-1]
                took = entry.first_step_s
                say(f"{contender.name}: first step {took:.1f} s, loss {first:.4f} to {last:.4f}")
                if not plan.in_turns:
                    for number in range(plan.rounds):
                        _turn(entry, plan, first=number == 0)
                    own.close()
                entries.append(entry)
            except WorkerError as error:
                failed.append({"name": contender.name, "reason": str(error)})
                say(f"{contender.name}: not timed: {error}")
                own.close()
        for number in range(plan.rounds if plan.in_turns else 0):
            gemms = products.ask(do="gemms")["gemms"]
            for entry in list(entries):
                try:
                    _turn(entry, plan, first=number == 0)
                except WorkerError as error:
                    failed.append({"name": entry.contender.name, "reason": str(error)})
                    entries.remove(entry)
            say(f"round {number + 1} of {plan.rounds} done")
        gemms = products.ask(do="gemms")["gemms"]
    return [_record(entry, job, plan) for entry in entries], failed, gemms


def _start(
    contender: Contender, job: Job, plan: Plan, logs: Path, stack: contextlib.ExitStack
) -> Entry | str:
    """The contender after the steps whose losses are compared, or why it is not there."""
    worker = stack.enter_context(Worker(contender.name, job, logs / f"{contender.name}.log"))
    worker.ready()
    answer = worker.ask(do="steps", count=1)
    entry = Entry(contender, worker, answer["losses"], answer["seconds"])
    if plan.compared > 1:
        answer = worker.ask(do="steps", count=plan.compared - 1)
        entry.losses += answer["losses"]
    _rest(entry, answer)
    return entry


def fits(job: Job, count: int) -> bool:
    """Whether the state of so many contenders leaves a third of the memory for the one that works.

    14 bytes a parameter while others work: weights, fp32 masters and two moments; peers give gradients back.
    """
    size = sum(math.prod(shape) for shape in piece_shapes(job.model).values())
    if job.device == "cuda":
        whole = torch.cuda.get_device_properties(0).total_memory
    else:
        whole = memory.available_bytes()
    return not whole or 14 * size * count < 2 / 3 * whole


def _rest(entry: Entry, answer: dict[str, Any]) -> None:
    """Let the process give back what is free where the next one might not find enough memory.

    Its next turn then begins with a step that is not counted. On a GPU the cache is always given back.
    """
    needed = 3 * (answer["peak_memory_bytes"])
    if entry.worker.device == "cuda" or memory.available_bytes() < needed:
        entry.worker.ask(do="rest")


def difference(entry: Entry, others: list[Entry], job: Job) -> str:
    """How the contender's losses differ from those of the first one; empty if they agree."""
    if not others:
        return ""
    precision = "fp8" if entry.contender.precision == "fp8" else "fp32" if job.precision == "fp32" else "bf16"
    reference, bound = others[0], TOLERANCES[precision]
    pairs = list(zip(entry.losses, reference.losses, strict=True))
    worst = max(abs(a - b) / abs(b) if a == a else float("inf") for a, b in pairs)
    if worst <= bound:
        return ""
    mine, theirs = ([f"{loss:.5f}" for loss in losses] for losses in (entry.losses, reference.losses))
    return (
        f"its losses {', '.join(mine)} differ from {reference.contender.name}'s {', '.join(theirs)} by up to "
        f"{worst:.1e}, more than {bound:.0e}: it does not train the same"
    )


def _turn(entry: Entry, plan: Plan, *, first: bool) -> None:
    if first and plan.warmup:
        entry.worker.ask(do="steps", count=plan.warmup)
    answer = entry.worker.ask(do="steps", count=plan.steps_per_round)
    entry.times += answer["step_ms"]
    entry.answers.append(answer)
    _rest(entry, answer)


def _record(entry: Entry, job: Job, plan: Plan) -> dict[str, Any]:
    """What was measured of one contender."""
    contender, last = entry.contender, entry.answers[-1]
    peak = max(answer["peak_memory_bytes"] for answer in entry.answers)
    kept = job.keep_pages and contender.keep_pages
    on_cpu = allocator() if kept else "glibc"
    return {
        "name": contender.name,
        "kind": contender.kind,
        "description": contender.description,
        **step_times(entry.times),
        "warmup_steps": plan.compared + plan.warmup,
        "first_step_s": entry.first_step_s,
        "peak_memory_bytes": peak,
        "state_bytes": last["state_bytes"],
        "memory_above_state_bytes": peak - last["state_bytes"],
        "allocator": "cuda caching" if job.device == "cuda" else on_cpu,
        "losses": entry.losses,
        "power_watts": last["power_watts"],
        "clock_mhz": last["clock_mhz"],
    }


def step_times(times: list[float]) -> dict[str, Any]:
    """Percentiles of measured steps in milliseconds."""
    ordered = sorted(times)
    return {
        "step_ms_p10": ordered[len(ordered) // 10],
        "step_ms_p50": statistics.median(ordered),
        "step_ms_p90": ordered[min(len(ordered) - 1, len(ordered) * 9 // 10)],
        "measured_steps": len(ordered),
    }
