"""Our trainer over several processes that torchrun started: each measures itself, the first has the record."""

from __future__ import annotations

from typing import Any

from benchmarks.peers import memory
from benchmarks.peers.compare import Plan, step_times
from benchmarks.peers.contenders import OURS
from benchmarks.peers.gemms import Gemms
from benchmarks.peers.job import Job
from benchmarks.peers.trainers import Ours, Stepper, our_session
from benchmarks.peers.worker import device_state
from megalite.parallel.collectives import barrier, gather_objects
from megalite_kernels.memory import allocator

PASSES = 3
"""Over the matrix products, of which the best rate counts."""


def measure_layout(job: Job, plan: Plan) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The record of our trainer in the job's layout, and the products of the first process.

    Memory is that of the process with the largest peak. On a CPU what the process held before counts as nothing,
    and code that is loaded in the first step does count.
    """
    baseline = memory.held_bytes(job.device)
    with our_session(job) as session:
        world = session.trainer.mesh.world
        stepper = Stepper(Ours(session), job)
        first, losses = stepper.run(plan.compared)
        if plan.warmup:
            stepper.run(plan.warmup)
        products, gemms = Gemms(job), {}
        for _ in range(PASSES if session.trainer.mesh.is_first else 0):
            gemms = products.measure()
        barrier(world)
        memory.reset_peak(job.device)
        times, _ = stepper.run(plan.rounds * plan.steps_per_round)
        own = max(0, memory.peak_bytes(job.device) - baseline), stepper.trainer.state_bytes()
        peak, state = max(gather_objects(own, world))
    on_cpu = allocator() if job.keep_pages else "glibc"
    row = {
        "name": "megalite",
        "kind": "ours",
        "description": OURS,
        **step_times(times),
        "warmup_steps": plan.compared + plan.warmup,
        "first_step_s": first[0] / 1e3,
        "peak_memory_bytes": peak,
        "state_bytes": state,
        "memory_above_state_bytes": peak - state,
        "allocator": "cuda caching" if job.device == "cuda" else on_cpu,
        "losses": losses,
        **device_state(job),
    }
    return [row], gemms
