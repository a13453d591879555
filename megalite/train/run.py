"""One pre-training run from start to finish: set up, train, validate, report."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megalite.config import RunConfig
from megalite.config_values import to_dict
from megalite.data.dataset import open_prepared
from megalite.errors import ExitCode
from megalite.models.families import piece_shapes
from megalite.parallel.collectives import barrier
from megalite.parallel.mesh import Mesh
from megalite.train.baselines import compute_baselines
from megalite.train.flops import table_peak_tflops
from megalite.train.process import environment
from megalite.train.report import write_report
from megalite.train.runlog import RunLog, read_records
from megalite.train.setup import Session, build_session, prepare_process
from megalite_kernels import explain

PROFILED_STEPS = range(3, 6)
"""Steps after the start of the process that `train.profile` records: past warm-up, few enough to open."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended."""

    code: ExitCode
    result: dict[str, Any]
    """Contents of result.json; empty if the run is to be continued."""


def run_pretraining(
    config: RunConfig, mesh: Mesh, *, command: str, config_toml: Callable[[RunConfig], str]
) -> Outcome:
    """Train until the last step or a signal, then write what the run has to show.

    Running the same command again continues from the newest checkpoint, and does nothing to a finished run.

    Args:
        config: the run.
        mesh: the processes.
        command: how it was started, for the records.
        config_toml: turns the settled configuration into the text of config.toml.

    Raises:
        UserError: wrong input; DivergedError: too many skipped steps.
        OSError: files cannot be written; every earlier checkpoint is intact.
    """
    started = time.perf_counter()
    prepare_process(config, mesh)
    session = build_session(config, mesh)
    trainer = session.trainer
    try:
        with session.stop, _profiler(session) as after_step:
            setup = time.perf_counter() - started
            _announce(session, command, setup, config_toml(session.config))
            training = time.perf_counter()
            finished = trainer.train(session.stop, after_step)
            session.saver.wait()
            times = {"setup_seconds": setup, "train_seconds": time.perf_counter() - training}
            barrier(mesh.world)
        if not finished:
            trainer.log.event("preempt", trainer.completed_steps, signal=session.stop.name)
            trainer.progress.say(
                f"{session.stop.name or 'a signal'}: saved after step {trainer.completed_steps}"
            )
            return Outcome(ExitCode.PREEMPTED, {})
        result = finish(session, times) if mesh.is_first else {}
        return Outcome(ExitCode.DONE, result)
    finally:
        session.saver.join()
        trainer.loader.close()
        trainer.progress.close()
        trainer.tensorboard.close()


def finish(session: Session, times: dict[str, float]) -> dict[str, Any]:
    """Baselines, report and result of a finished run; repeated harmlessly when the run is started again."""
    config, trainer, log = session.config, session.trainer, session.trainer.log
    run_dir = log.directory
    baselines_file = run_dir / "baselines.json"
    if not baselines_file.exists():
        log.write_json("baselines.json", compute_baselines(config.data.datasets))
    baselines = json.loads(baselines_file.read_text(encoding="utf-8"))
    if not (run_dir / "result.json").exists():
        log.event("finish", trainer.completed_steps)
    result = summarise(session, baselines) | times | {"report": str(run_dir / "report.html")}
    log.write_json("result.json", result)
    write_report(run_dir)
    return result


def summarise(session: Session, baselines: dict[str, Any]) -> dict[str, Any]:
    """The machine-readable result of a run (documented in the README)."""
    run_dir = session.trainer.log.directory
    metrics = read_records(run_dir / RunLog.METRICS)
    evals = read_records(run_dir / RunLog.EVALS)
    steady = metrics[min(len(metrics) // 10, 10) :]  # past warm-up
    seconds = sum(r["step_ms"] for r in steady) / 1e3
    tokens = sum(r["tokens_per_s"] * r["step_ms"] / 1e3 for r in steady)
    rate = tokens / seconds if seconds else None
    utilisation = session.trainer.metrics.utilisation(rate or 0.0)
    losses = [r["loss"] for r in metrics[-50:] if r["loss"] is not None]
    last_eval = evals[-1] if evals else {}
    checkpoint = session.saver.last_saved or session.resumed_from
    return {
        "run_dir": str(run_dir),
        "steps": session.trainer.completed_steps,
        "tokens": session.config.train.tokens_before(session.trainer.completed_steps),
        "train_loss": sum(losses) / len(losses) if losses else None,
        "val_loss": last_eval.get("val_loss"),
        "val_bits_per_byte": last_eval.get("val_bits_per_byte"),
        "gzip_bits_per_byte": baselines["gzip_bits_per_byte"],
        "xz_bits_per_byte": baselines["xz_bits_per_byte"],
        "tokens_per_s": rate,
        **utilisation,
        "gemm_peak_tflops": session.precision.gemm_peak_tflops,
        "peak_memory_bytes": max((r["peak_memory_bytes"] for r in metrics), default=None),
        "checkpoint": str(checkpoint),
    }


def _announce(session: Session, command: str, setup_s: float, config_toml: str) -> None:
    """Write run.json and config.toml, log the start, and say what is about to happen."""
    trainer, log = session.trainer, session.trainer.log
    if not log.enabled:
        return
    (log.directory / "config.toml").write_text(config_toml, encoding="utf-8")
    facts = run_facts(session, command, setup_s)
    log.write_json("run.json", facts)
    kind = "resume" if session.resumed_from else "start"
    details = {"changed": list(session.changed_environment)} if session.resumed_from else {}
    log.event(
        kind,
        trainer.completed_steps,
        environment=environment(trainer.mesh, session.config.parallel),
        **details,
    )
    missing = sorted(
        {why for choice in explain(trainer.mesh.device.type) for why in choice.passed_over.values()}
    )
    if missing:
        trainer.progress.say(
            f"slower than it could be, some kernels run on plain torch: {'; '.join(missing)}"
        )
    if session.changed_environment:
        changes = "; ".join(session.changed_environment)
        trainer.progress.say(
            f"not the environment of the checkpoint ({changes}): losses may differ in the last bits"
        )
    count = facts["parameters"]["total"]
    precision = session.precision
    trainer.progress.say(
        f"{session.config.name}: {count / 1e6:.2f}M parameters, {session.config.train.steps} steps, "
        f"{precision.chosen} ({precision.reason}), GEMM peak {precision.gemm_peak_tflops:.3f} TFLOP/s, "
        f"{trainer.mesh.world_size} process(es), {kind} at step {trainer.completed_steps}"
    )


def run_facts(session: Session, command: str, setup_s: float) -> dict[str, Any]:
    """Everything about a run that does not change while it goes on (run.json)."""
    config, precision, mesh = session.config, session.precision, session.trainer.mesh
    total = sum(math.prod(shape) for shape in piece_shapes(config.model).values())
    embedding = config.model.vocab_size * config.model.hidden_size
    folders = open_prepared(config.data.datasets)
    splits = [folder.split("train") for folder in folders]
    train_tokens, train_bytes = sum(s.tokens for s in splits), sum(s.bytes for s in splits)
    table = table_peak_tflops(mesh.device)
    versions = environment(mesh, config.parallel)
    return {
        "name": config.name,
        "command": command,
        "versions": {k: versions[k] for k in ("python", "torch", "numpy", "megalite")},
        "commit": commit(),
        "machine": {
            "cpu": _cpu_name(),
            "cores": os.cpu_count(),
            "threads": versions["threads"],
            "isa": versions["isa"],
            "memory_bytes": _memory_bytes(),
            "device": versions["device"],
            "processes": mesh.world_size,
        },
        "precision": {
            "requested": precision.requested,
            "chosen": precision.chosen,
            "reason": precision.reason,
            "gemm_fp32_gflops": precision.gemm_fp32_tflops * 1e3,
            "gemm_bf16_gflops": precision.gemm_bf16_tflops * 1e3,
            "gemm_fp8_gflops": precision.gemm_fp8_tflops * 1e3,
        },
        "gemm_peak_tflops": precision.gemm_peak_tflops,
        "table_peak_tflops": table,
        "peak_source": "table of dense bf16 figures" if table else "measured matrix product",
        "peak_fp8_tflops": session.trainer.metrics.peak.fp8 / mesh.world_size / 1e12,
        "flops_terms": session.flops.terms,
        "flops_fp8_share": session.flops.fp8_share,
        "flops_again": session.flops.again,
        "flops_per_token_causal": session.flops.causal,
        "flops_per_token_full": session.flops.full,
        "parameters": {
            "total": total,
            "matmul": round((session.flops.full - session.flops.terms["attention_full"]) / 6),
            "embedding": embedding,
        },
        "model": to_dict(config.model),
        "data": {
            "paths": [spec.path for spec in config.data.datasets],
            "tokenizer_fingerprint": session.trainer.tokenizer.fingerprint,
            "train_tokens": train_tokens,
            "train_bytes": train_bytes,
            "documents": sum(s.documents for s in splits),
            "bytes_per_token": train_bytes / max(1, train_tokens),
        },
        "setup_s": setup_s,
    }


@contextlib.contextmanager
def _profiler(session: Session) -> Iterator[Callable[[int], None]]:
    """Record a few steps into trace.json of the run directory if `train.profile` asks for it."""
    trainer = session.trainer
    if not session.config.train.profile or not trainer.mesh.is_first:
        yield lambda step: None
        return
    path = trainer.log.directory / "trace.json"
    activities = [torch.profiler.ProfilerActivity.CPU]
    if trainer.mesh.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    schedule = torch.profiler.schedule(
        wait=PROFILED_STEPS.start - 1, warmup=1, active=len(PROFILED_STEPS), repeat=1
    )
    write: Callable[[Any], None] = lambda profile: profile.export_chrome_trace(str(path))  # noqa: E731
    with torch.profiler.profile(activities=activities, schedule=schedule, on_trace_ready=write) as profile:
        yield lambda step: profile.step()


def commit() -> str:
    """Commit of the source tree that runs, with a + if it is modified; empty outside a checkout."""
    folder = Path(__file__).resolve().parent
    try:
        run = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty=+", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return run.stdout.strip() if run.returncode == 0 else ""


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None
