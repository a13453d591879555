"""Training throughput on this machine, end to end, beside other trainers' in the same run.

    python benchmarks/train_throughput.py --preset llama-60m --output benchmarks/results/throughput.jsonl
    torchrun --nproc-per-node 2 benchmarks/train_throughput.py --preset llama-60m --parallel.tp 2

Every contender runs in a process of its own, from the same initial weights, on the same batches of random tokens,
with the same AdamW. First their losses over a few steps must agree (a contender whose losses differ is named and not
timed); then they take turns of a few steps, so that a slow moment of the machine hits all of them, and only one works
at a time. Models too large to be in memory that often run one after the other; the record says so. The best matrix
product of the device is measured between the turns. Ours is the trainer itself: loader, clipping, guard and all.
Peers that are not installed are listed with the command that installs them; several processes (torchrun) run ours
only.

Memory on CPUs is VmHWM over the measured steps minus what the process held before the model was built, when a tiny
model of the same kind had taken two steps; on GPUs it is the allocator's peak.

A table goes to standard error. One JSON record per run, with everything needed to repeat it, goes to the output, and
with --json to standard output.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.peers.compare import Plan, compare, fits
from benchmarks.peers.contenders import select
from benchmarks.peers.job import Job, cores, write_data, write_weights
from benchmarks.peers.layout import measure_layout
from benchmarks.peers.record import make_record
from benchmarks.peers.table import show
from benchmarks.peers.trainers import our_session
from megalite.config import OptimizerConfig, ParallelConfig
from megalite.errors import UserError
from megalite.models.presets import preset
from megalite.train.flops import choose_precision
from megalite.train.setup import Session


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Measure training throughput of a preset, ours beside others'."""

    preset: str = "llama-60m"
    """Model preset."""
    vocab_size: int = 4096
    """Vocabulary of presets that take it from the data."""
    seq_length: int = 0
    """Tokens per sample; 0 takes the preset's longest, at most 1024."""
    micro_batch_size: int = 0
    """Samples per forward and backward pass; 0 fills 2048 tokens."""
    global_batch_size: int = 0
    """Samples per step; 0 is one micro-batch per data-parallel process."""
    precision: str = "bf16"
    """bf16, fp32, fp8, or auto: bf16 where its matrix product is worth it, else fp32."""
    device: str = "auto"
    """cpu or cuda; auto is the GPU if there is one."""
    threads: int = 0
    """CPU threads; 0 is all cores."""
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)
    """Layout, under torchrun."""
    document_tokens: int = 0
    """Mean length of documents, at whose ends attention ends: peers cannot do that and are left out; 0: none."""
    allocator: str = "kept"
    """On CPUs, for everybody: kept (freed pages stay in the process, as our trainer sets it) or default."""
    warmup: int = 1
    """Steps before the measured ones, after those whose losses are compared."""
    steps: int = 0
    """Measured steps of each contender; 0 is 50 on a GPU and 8 on a CPU."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison(Arguments):
    """Measure training throughput of a preset, ours beside others'."""

    contenders: tuple[str, ...] = ()
    """Who takes part; none: those worth their time; all: everybody."""
    clock: str = "wall"
    """wall, or process: CPU time, steadier, with --threads 1."""
    rounds: int = 0
    """Turns of each contender; 0 is 5 on a GPU and 4 on a CPU."""
    compared: int = 3
    """First steps, whose losses must agree."""
    learning_rate: float = 3e-4
    """Constant."""
    output: str = ""
    """JSONL file to append the record to."""
    json: bool = False
    """Print the record as the last line of standard output."""


def main() -> int:
    """Measure, show the table, append the record to the output; 1 if nothing of ours was timed, 2 if asked wrongly."""
    arguments = tyro.cli(Comparison)
    command = shlex.join(["python", *sys.argv])
    try:
        with tempfile.TemporaryDirectory() as folder:
            record = measure(arguments, Path(folder), command)
    except (UserError, ValueError) as error:
        print(f"train_throughput: error: {error}", file=sys.stderr)
        return 2
    if record is None:  # another rank has it
        return 0
    show(record)
    line = json.dumps(record)
    if arguments.output:
        Path(arguments.output).parent.mkdir(parents=True, exist_ok=True)
        with open(arguments.output, "a", encoding="utf-8") as file:
            file.write(line + "\n")
    if arguments.json:
        print(line)
    return 0 if any(row["kind"] == "ours" for row in record["contenders"]) else 1


def measure(arguments: Comparison, folder: Path, command: str) -> dict[str, Any] | None:
    """The record of one run; None on all but the first of several ranks.

    Raises:
        UserError: options that do not fit together, an unknown preset or contender.
    """
    job, plan = make_job(arguments, folder), make_plan(arguments)
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    if (size := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        job = dataclasses.replace(job, folder=str(folder / os.environ["RANK"]))
        write_data(job, arguments.document_tokens)
        rows, gemms = measure_layout(job, plan)
        skipped = [{"name": "peers", "reason": f"{size} processes: only this trainer has these layouts"}]
    else:
        chosen, skipped = select(arguments.contenders, job)
        if arguments.document_tokens:
            reason = "documents end inside samples, which these models would not see"
            skipped += [{"name": c.name, "reason": reason} for c in chosen if c.kind == "peer"]
            chosen = [c for c in chosen if c.kind == "ours"]
        write_data(job, arguments.document_tokens)
        if any(c.kind == "peer" for c in chosen):
            write_weights(job)
        plan = dataclasses.replace(plan, in_turns=fits(job, len(chosen)))
        if not plan.in_turns:
            print("not all fit in memory together: one after the other", file=sys.stderr)
        rows, failed, gemms = compare(
            chosen, job, plan, folder, lambda line: print(line, file=sys.stderr, flush=True)
        )
        skipped += failed
    if int(os.environ.get("RANK", "0")):
        return None
    return make_record(arguments.preset, job, plan, rows, skipped, gemms) | {
        "time": started,
        "command": command,
    }


def make_job(arguments: Arguments, folder: Path, steps: int = 0) -> Job:
    """The job that the arguments ask for, for at most `steps` steps (0: as many as they ask for).

    Raises:
        UserError: a value that is none of its choices, or does not fit the others.
    """
    choices = {
        "precision": ("auto", "bf16", "fp32", "fp8"),
        "device": ("auto", "cpu", "cuda"),
        "allocator": ("kept", "default"),
    }
    clock = getattr(arguments, "clock", "wall")
    for name, known in choices.items():
        if getattr(arguments, name) not in known:
            raise UserError(f"--{name} {getattr(arguments, name)!r}: use one of {', '.join(known)}")
    device = (
        arguments.device if arguments.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    )
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device cuda: torch {torch.__version__} finds no GPU here; use cpu")
    precision = arguments.precision
    if precision == "auto":
        precision = choose_precision(precision, torch.device(device)).chosen
    if precision == "fp8" and device == "cpu":
        raise UserError("--precision fp8 needs a GPU with fp8 matrix products; use bf16 or fp32")
    threads = arguments.threads or max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if clock not in ("wall", "process") or (clock == "process" and (threads > 1 or device == "cuda")):
        raise UserError(f"--clock {clock!r}: use wall, or process with --threads 1 on a CPU")
    model = preset(arguments.preset)
    model = dataclasses.replace(model, vocab_size=model.vocab_size or arguments.vocab_size)
    length = arguments.seq_length or min(1024, model.max_position_embeddings)
    if not 1 <= length <= model.max_position_embeddings:
        longest = model.max_position_embeddings
        raise UserError(f"--seq-length {length} must be in 1 ... {longest} for {arguments.preset}")
    micro = arguments.micro_batch_size or max(1, 2048 // length)
    replicas = arguments.parallel.dp_size(int(os.environ.get("WORLD_SIZE", "1")))
    size = arguments.global_batch_size or micro * replicas
    if size % (micro * replicas):
        raise UserError(
            f"--global-batch-size {size} must be a multiple of {micro} samples on {replicas} replica(s)"
        )
    return Job(
        folder=str(folder),
        model=model,
        seq_length=length,
        micro_batch_size=micro,
        global_batch_size=size,
        precision=precision,
        device=device,
        threads=threads,
        clock=clock,
        keep_pages=arguments.allocator == "kept",
        steps=steps or make_plan(arguments).total,
        optimizer=OptimizerConfig(learning_rate=getattr(arguments, "learning_rate", 3e-4)),
        parallel=arguments.parallel,
    )


def make_plan(arguments: Arguments) -> Plan:
    """How much is measured."""
    on_gpu = arguments.device == "cuda" or (arguments.device == "auto" and torch.cuda.is_available())
    rounds = getattr(arguments, "rounds", 1) or (5 if on_gpu else 4)
    steps = arguments.steps or (50 if on_gpu else 8)
    compared = getattr(arguments, "compared", 1)
    if min(rounds, steps, compared) < 1 or arguments.warmup < 0:
        raise UserError("--rounds, --steps and --compared must be at least 1, --warmup at least 0")
    return Plan(
        compared=compared, warmup=arguments.warmup, rounds=rounds, steps_per_round=-(-steps // rounds)
    )


@contextmanager
def open_session(arguments: Arguments, folder: Path, steps: int) -> Iterator[Session]:
    """Our trainer of the preset on random tokens, ready for `steps` steps; closed at the end of the block."""
    job = make_job(arguments, folder, steps)
    write_data(job, arguments.document_tokens)
    with our_session(job) as session:
        yield session


if __name__ == "__main__":
    sys.exit(main())
