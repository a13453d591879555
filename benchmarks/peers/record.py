"""The JSON record of a run."""

from __future__ import annotations

import importlib.metadata
import os
from typing import Any

import torch

from benchmarks.peers.compare import TOLERANCES, Plan
from benchmarks.peers.job import Job
from megalite.config_values import to_dict
from megalite.train.flops import FlopsPerToken, flops_per_token, table_peak_tflops
from megalite_kernels import environment
from megalite_kernels.timing import device_name

PACKAGES = ("transformers", "litgpt", "torchtitan", "megatron-core", "liger-kernel")
MEMORY = {
    "cpu": "VmHWM over the measured steps minus VmRSS before the model was built, after two steps of a tiny one",
    "ranks": "VmHWM over the measured steps minus VmRSS before the model was built, code loaded since then included",
    "cuda": "peak of torch's allocator over the measured steps",
}


def make_record(
    preset: str,
    job: Job,
    plan: Plan,
    rows: list[dict[str, Any]],
    skipped: list[dict[str, str]],
    gemms: dict[str, float],
) -> dict[str, Any]:
    """Everything about a run; rates are per device.

    Args:
        preset: name of the model.
        job: what was trained.
        plan: how much was measured.
        rows: contenders, without what follows from the step's time.
        skipped: (name, reason) of who was not timed.
        gemms: name → TFLOP/s of matrix products.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    flops = flops_per_token(job.model, job.seq_length)
    tokens = job.global_batch_size * job.seq_length
    measured, table = max(gemms.values()), table_peak_tflops(torch.device(job.device))
    peak = table or measured
    for row in rows:
        add_rates(row, tokens / world, flops, peak, measured)
    facts = environment.facts()
    device = device_name(job.device)
    return {
        "benchmark": "throughput",
        "preset": preset,
        "seq_length": job.seq_length,
        "micro_batch_size": job.micro_batch_size,
        "global_batch_size": job.global_batch_size,
        "tokens_per_step": tokens,
        "precision": job.precision,
        "layout": layout_name(job, world),
        "processes": world,
        "threads": job.threads,
        "clock": job.clock,
        "in_turns": plan.in_turns,
        "rounds": plan.rounds,
        "steps_per_round": plan.steps_per_round,
        "device": device if job.device == "cuda" else "cpu",
        "machine": machine(facts),
        "versions": facts["versions"] | versions(),
        "commit": facts["commit"],
        "flops_per_token_causal": flops.causal,
        "flops_per_token_full": flops.full,
        "flops_terms": flops.terms,
        "gemm_peak_tflops": measured,
        "gemm_shapes": gemms,
        "table_peak_tflops": table,
        "peak_source": "table of dense bf16 figures" if table else "measured matrix product",
        "loss_tolerance": TOLERANCES[job.precision],
        "memory_source": MEMORY["ranks" if world > 1 and job.device == "cpu" else job.device],
        "optimizer": to_dict(job.optimizer),
        "model": to_dict(job.model),
        "contenders": rows,
        "skipped": skipped,
    }


def add_rates(row: dict[str, Any], tokens: float, flops: FlopsPerToken, peak: float, measured: float) -> None:
    """What follows from a contender's median step of so many tokens per device; peaks in TFLOP/s."""
    rate = tokens / (row["step_ms_p50"] / 1e3)
    row["tokens_per_s"] = rate
    row["mfu_causal"] = rate * flops.causal / (peak * 1e12)
    row["mfu_full"] = rate * flops.full / (peak * 1e12)
    row["gemm_fraction"] = rate * flops.causal / (measured * 1e12)


def layout_name(job: Job, world: int) -> str:
    """Such as tp2 or dp2-tp2; empty for one process."""
    if world == 1:
        return ""
    parallel = job.parallel
    sizes = {"dp": parallel.dp_size(world), "tp": parallel.tp, "pp": parallel.pp, "cp": parallel.cp}
    return "-".join(f"{axis}{size}" for axis, size in sizes.items() if size > 1)


def machine(facts: dict[str, Any]) -> dict[str, Any]:
    """The computer."""
    native = facts["native"]
    return {
        "cpu": facts["cpu"],
        "cores": os.cpu_count(),
        "isa": native.get("isa"),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": facts["gpus"],
    }


def versions() -> dict[str, str | None]:
    """Of the peers' packages; None for what is not installed."""
    found: dict[str, str | None] = dict.fromkeys(PACKAGES)
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
