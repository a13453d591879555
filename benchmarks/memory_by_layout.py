"""Peak memory of a training step in several layouts, measured on every rank, against the estimate.

    python benchmarks/memory_by_layout.py --output benchmarks/results/memory_by_layout.jsonl

Each layout runs in processes of its own, started by torchrun. A process first takes a step with a tiny model in the
same layout, which loads all code and connects all groups, and throws it away; what it then occupies is the baseline.
It builds the model, takes one step (lazily made buffers exist then), resets the peak, and takes another step:

- CPU: measured = VmHWM after the step - VmRSS of the baseline. The kernel resets VmHWM (5 into /proc/self/clear_refs)
  and counts touched pages only. Every tensor of 64 kB or more is mapped and unmapped (MALLOC_MMAP_THRESHOLD_ in the
  processes' environment), so that freed memory does not count. Temporary copies inside gloo do count, and are not in
  the estimate: its reduce-scatter copies its input, an all-gather its output.
- GPU: measured = torch.cuda.max_memory_allocated after the step - memory_allocated of the baseline.

One JSON record per layout, with the terms of each pipeline rank's estimate.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from megalite.config import ModelConfig, OptimizerConfig, ParallelConfig, RecomputeConfig
from megalite.config_values import to_dict
from megalite.data.loader import MicroBatch, pack
from megalite.models.presets import preset
from megalite.optim.adamw import AdamW
from megalite.parallel.collectives import barrier, gather_objects
from megalite.parallel.mesh import Mesh, close_mesh, make_mesh
from megalite.parallel.random import initialize
from megalite.train.memory_activations import Job
from megalite.train.memory_estimate import estimate_memory
from megalite.train.process import environment
from megalite.train.replica import build_replica
from megalite.train.run import commit
from megalite_kernels.memory import release_freed_pages

SELECTIVE = RecomputeConfig(kind="selective", parts=("norm", "activation", "attention"))
FULL = RecomputeConfig(kind="full")
LAYOUTS: dict[str, tuple[int, dict[str, Any], RecomputeConfig]] = {
    "one": (1, {}, RecomputeConfig()),
    "one-selective": (1, {}, SELECTIVE),
    "one-full": (1, {}, FULL),
    "one-budget": (1, {}, RecomputeConfig(kind="budget", budget_gb=0.1)),
    "dp2-zero0": (2, {"zero": 0}, RecomputeConfig()),
    "dp2-zero1": (2, {"zero": 1}, RecomputeConfig()),
    "dp2-zero1-bf16": (2, {"zero": 1, "grad_reduce_dtype": "bf16"}, RecomputeConfig()),
    "dp2-zero3": (2, {"zero": 3}, RecomputeConfig()),
    "tp2": (2, {"tp": 2, "sequence_parallel": False}, RecomputeConfig()),
    "tp2-sp": (2, {"tp": 2}, RecomputeConfig()),
    "tp2-sp-selective": (2, {"tp": 2}, SELECTIVE),
    "cp2-ring": (2, {"cp": 2}, RecomputeConfig()),
    "cp2-ulysses": (2, {"cp": 2, "cp_method": "ulysses"}, RecomputeConfig()),
    "pp2-gpipe": (2, {"pp": 2, "pp_schedule": "gpipe"}, RecomputeConfig()),
    "pp2-1f1b": (2, {"pp": 2}, RecomputeConfig()),
    "pp2-1f1b-full": (2, {"pp": 2}, FULL),
    "pp2-interleaved": (2, {"pp": 2, "pp_schedule": "interleaved"}, RecomputeConfig()),
    "pp2-zbv": (2, {"pp": 2, "pp_schedule": "zbv"}, RecomputeConfig()),
    "tp2-pp2-dp2": (8, {"tp": 2, "pp": 2}, RecomputeConfig()),
}
"""Name → processes, parallel settings, recomputation."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Measure peak memory by layout."""

    layouts: tuple[str, ...] = tuple(name for name, (size, _, _) in LAYOUTS.items() if size <= 2)
    """Names from LAYOUTS."""
    preset: str = ""
    """Model preset; empty: 8 layers of 256, which two CPU cores train in seconds."""
    tokens: int = 1024
    """Tokens of a micro-batch."""
    micro_batches: int = 4
    """Of each data-parallel rank in a step."""
    precision: str = "fp32"
    """fp32 or bf16."""
    device: str = "auto"
    """auto, cpu or cuda."""
    bucket_size: int = 1_000_000
    """parallel.bucket_size; small, because gloo copies what it reduces."""
    output: str = ""
    """JSONL file to append the records to."""
    worker: str = ""
    """Used by the benchmark itself: the layout that this process is part of."""


def main() -> None:
    """Run each layout in its own processes; print the records and append them to the output."""
    arguments = tyro.cli(Arguments)
    if arguments.worker:
        work(arguments)
        return
    unknown = set(arguments.layouts) - set(LAYOUTS)
    if unknown:
        raise SystemExit(f"unknown layouts {sorted(unknown)}: use {', '.join(LAYOUTS)}")
    for name in arguments.layouts:
        record = launch(arguments, name)
        line = json.dumps(record)
        if arguments.output and "error" not in record:
            Path(arguments.output).parent.mkdir(parents=True, exist_ok=True)
            with open(arguments.output, "a", encoding="utf-8") as file:
                file.write(line + "\n")
        print(line, flush=True)


def launch(arguments: Arguments, name: str) -> dict[str, Any]:
    """The record that the first process of a layout writes, or what went wrong."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "record.json"
        values = dataclasses.asdict(arguments) | {"worker": name, "output": str(answer), "layouts": (name,)}
        options = [
            part
            for key, value in values.items()
            for part in (
                f"--{key.replace('_', '-')}",
                *(value if isinstance(value, tuple) else (str(value),)),
            )
        ]
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = [*start, f"--nproc-per-node={LAYOUTS[name][0]}", __file__, *options]
        limits = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_MMAP_MAX_": "1000000", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=os.environ | limits, capture_output=True, text=True, check=False)
        if done.returncode or not answer.exists():
            return {"benchmark": "memory_by_layout", "layout": name, "error": done.stderr[:4000]}
        return json.loads(answer.read_text()) | {"command": shlex.join(["python", *sys.argv])}


def work(arguments: Arguments) -> None:
    """One process of a layout: measure, and let the first one write the record."""
    _, settings, recompute = LAYOUTS[arguments.worker]
    parallel = ParallelConfig(**settings, bucket_size=arguments.bucket_size)
    mesh = make_mesh(parallel, arguments.device)
    model = benchmark_model(arguments.preset)
    dtype = torch.bfloat16 if arguments.precision == "bf16" else torch.float32
    job = Job(
        model=model,
        parallel=parallel,
        world_size=mesh.world.size,
        tokens=arguments.tokens,
        num_microbatches=arguments.micro_batches,
        itemsize=dtype.itemsize,
        recompute=recompute,
        gpu=mesh.device.type == "cuda",
    )
    estimates = [memory.terms | {"total": memory.total} for memory in estimate_memory(job)]
    small = {"hidden_size": 64, "ffn_hidden_size": 64, "vocab_size": 256, "num_attention_heads": 4}
    tiny = dataclasses.replace(model, **small, num_key_value_heads=2, head_dim=16)
    plain = RecomputeConfig() if recompute.kind == "budget" else recompute
    peak_of_step(dataclasses.replace(job, model=tiny, tokens=64, recompute=plain), mesh, dtype)
    baseline = occupied(mesh)
    measured = peak_of_step(job, mesh, dtype) - baseline
    ranks = gather_objects({"pp_rank": mesh.pp.rank, "measured_bytes": measured}, mesh.world)
    for rank in ranks:
        rank["estimated_bytes"] = estimates[rank["pp_rank"]]["total"]
        rank["measured_over_estimated"] = rank["measured_bytes"] / rank["estimated_bytes"]
    if mesh.is_first:
        record = facts(arguments, job, mesh) | {
            "ranks": ranks,
            "estimates": estimates,
            "baseline_bytes": baseline,
        }
        Path(arguments.output).write_text(json.dumps(record))
    close_mesh(mesh)


def benchmark_model(name: str) -> ModelConfig:
    """The preset, or a small Llama with a vocabulary that does not outweigh its layers."""
    if name:
        model = preset(name)
        return dataclasses.replace(model, vocab_size=model.vocab_size or 4096)
    return ModelConfig(
        vocab_size=4096,
        num_layers=8,
        hidden_size=256,
        ffn_hidden_size=768,
        num_attention_heads=8,
        num_key_value_heads=4,
    )


def peak_of_step(job: Job, mesh: Mesh, dtype: torch.dtype) -> int:
    """Most memory occupied during the second step of a freshly built model."""
    replica = build_replica(
        job.model,
        job.parallel,
        mesh,
        dtype=dtype,
        micro_batch_tokens=job.tokens,
        fill=lambda model: initialize(model, seed=0),
        recompute=job.recompute,
        num_microbatches=job.num_microbatches,
    )
    optimizer = AdamW(replica.state, OptimizerConfig(), mesh.world)
    batches = [random_batch(job, mesh, number).to(mesh.device) for number in range(job.num_microbatches)]
    one, keep = torch.ones((), device=mesh.device), torch.zeros((), dtype=torch.bool, device=mesh.device)
    for _ in range(2):
        release_freed_pages()
        barrier(mesh.world)
        reset_peak(mesh)
        replica.gradients(batches, one / (job.tokens * job.num_microbatches))
        replica.state.finish_gradients()
        replica.grad_norm()
        optimizer.step(one * 1e-4, one, keep)
        replica.state.publish()
        peak = peak_memory(mesh)
    replica.state.release()
    del replica, optimizer, batches
    release_freed_pages()
    return peak


def random_batch(job: Job, mesh: Mesh, number: int) -> MicroBatch:
    """One packed micro-batch of this data-parallel rank, four documents."""
    generator = np.random.default_rng((mesh.dp.rank, number))
    ids = generator.integers(0, job.model.vocab_size, job.tokens + 1)
    starts = np.arange(0, job.tokens, -(-job.tokens // 4))
    return pack([ids[:-1]], [ids[1:]], [starts])


def occupied(mesh: Mesh) -> int:
    """Bytes that this process occupies now."""
    return torch.cuda.memory_allocated(mesh.device) if mesh.device.type == "cuda" else status_bytes("VmRSS")


def reset_peak(mesh: Mesh) -> None:
    """The peak is what is occupied now."""
    if mesh.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(mesh.device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(mesh: Mesh) -> int:
    """Most bytes occupied since the reset."""
    if mesh.device.type == "cuda":
        torch.cuda.synchronize(mesh.device)
        return torch.cuda.max_memory_allocated(mesh.device)
    return status_bytes("VmHWM")


def status_bytes(key: str) -> int:
    """A size from /proc/self/status; its VmHWM is of this process alone, getrusage's maximum also of its parent."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {key}: peak memory on a CPU is measured on Linux only")


def facts(arguments: Arguments, job: Job, mesh: Mesh) -> dict[str, Any]:
    """What was measured, and where."""
    return {
        "benchmark": "memory_by_layout",
        "layout": arguments.worker,
        "parallel": to_dict(job.parallel),
        "recompute": to_dict(job.recompute),
        "model": to_dict(job.model),
        "processes": mesh.world.size,
        "tokens": job.tokens,
        "micro_batches": job.num_microbatches,
        "precision": arguments.precision,
        "versions": environment(mesh, job.parallel),
        "commit": commit(),
    }


if __name__ == "__main__":
    main()
