"""A pipeline's idle time, measured, against what the simulator says of the same passes.

    python benchmarks/pipeline_bubble.py --output benchmarks/results/pipeline_bubble.jsonl

Starts --pp ranks on this machine (gloo, one thread each) and runs steps of every schedule on random tokens. In every
other step the duration of each pass is noted, and the time a transfer takes is measured between the steps; from their
medians the simulator predicts the length of the steps in between, which is measured, and their idle time: the share of
all ranks' time in which no pass runs. One JSON record per schedule. With more ranks than cores the times mean nothing.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
import torch.distributed as dist
import tyro
from torch.distributed.pipelining import PipelineStage

from megalite.config import ModelConfig, ParallelConfig
from megalite.config_parallel import SINGLE_STAGE, V_SHAPED, Schedule
from megalite.data.loader import MicroBatch, pack
from megalite.errors import UserError
from megalite.parallel.action_table import schedule_table
from megalite.parallel.collectives import barrier, gather_objects, receive, send
from megalite.parallel.mesh import Axis, Mesh, mesh_of_group
from megalite.parallel.random import initialize
from megalite.parallel.simulate import StageTimes, Timeline, simulate
from megalite.train.process import environment
from megalite.train.replica import build_replica
from megalite_kernels.timing import device_name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Measure the idle time of pipeline schedules and compare it with the simulator's."""

    pp: int = 2
    """Pipeline ranks, one thread each; not more than cores."""
    schedules: str = "all"
    """Comma-separated, or all."""
    stages: int = 2
    """Stages per rank of the schedules that take any number."""
    micro_batches: int = 8
    """Of a step."""
    layers: int = 8
    hidden_size: int = 256
    vocab_size: int = 1024
    """Small: the head then weighs less than a layer."""
    tokens: int = 256
    """Of a micro-batch."""
    warmup: int = 3
    """Steps before the measured ones."""
    steps: int = 50
    """Measured steps; as many more in which the passes are timed."""
    output: str = ""
    """JSONL file to append the records to."""


@dataclasses.dataclass(frozen=True, slots=True)
class RankTimes:
    """What one rank saw of one schedule."""

    passes: dict[tuple[int, str], float]
    """(stage, F B I or W) → median seconds of a pass."""
    calls: dict[tuple[int, str], int]
    """How many of them a step has."""
    starts: list[float]
    ends: list[float]
    """Seconds on the machine's clock at which this rank began and ended each measured step."""
    send_s: float


def main() -> None:
    """Measure, print one line per schedule, and append the records."""
    arguments = tyro.cli(Arguments)
    if arguments.pp < 2:
        raise SystemExit(f"--pp {arguments.pp}: a pipeline has at least 2 ranks")
    cores = len(os.sched_getaffinity(0))
    if arguments.pp > cores:
        print(f"{arguments.pp} ranks share {cores} cores: the times mean nothing", file=sys.stderr)
    command = shlex.join(["python", *sys.argv])
    with tempfile.TemporaryDirectory() as folder:
        where = (arguments, command, str(Path(folder) / "store"))
        torch.multiprocessing.spawn(run_rank, where, nprocs=arguments.pp)


def run_rank(rank: int, arguments: Arguments, command: str, store: str) -> None:
    """One rank's whole life."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=arguments.pp)
    for layout in layouts(arguments):
        seen = measure(arguments, layout)
        everyone: list[RankTimes] = gather_objects(seen, Axis(arguments.pp, rank, dist.group.WORLD))
        if rank == 0:
            report(arguments, layout, everyone, command)
    dist.barrier()
    dist.destroy_process_group()


def layouts(arguments: Arguments) -> Iterator[ParallelConfig]:
    """The schedules asked for, those that do not fit left out with a word."""
    names = get_args(Schedule) if arguments.schedules == "all" else arguments.schedules.split(",")
    for name in names:
        stages = 0 if name in (*SINGLE_STAGE, *V_SHAPED) else arguments.stages
        layout = ParallelConfig(pp=arguments.pp, pp_schedule=name, pp_stages=stages)
        try:
            layout.validate_model(model_of(arguments))
            layout.validate_microbatches(arguments.micro_batches)
        except UserError as error:
            print(f"{name} left out: {error}", file=sys.stderr)
            continue
        yield layout


def model_of(arguments: Arguments) -> ModelConfig:
    """A Llama of the given size."""
    return ModelConfig(
        vocab_size=arguments.vocab_size,
        num_layers=arguments.layers,
        hidden_size=arguments.hidden_size,
        ffn_hidden_size=11 * arguments.hidden_size // 4,
        num_attention_heads=max(1, arguments.hidden_size // 64),
    )


def measure(arguments: Arguments, layout: ParallelConfig) -> RankTimes:
    """Run all steps of one schedule on this rank."""
    mesh = mesh_of_group(layout, torch.device("cpu"))
    replica = build_replica(
        model_of(arguments),
        layout,
        mesh,
        dtype=torch.float32,
        micro_batch_tokens=arguments.tokens,
        fill=lambda model: initialize(model, seed=1),
    )
    batches, scale = [random_batch(arguments)] * arguments.micro_batches, torch.ones(())
    noted: dict[tuple[int, str], list[float]] = defaultdict(list)
    starts, ends, sends = [], [], []
    for step in range(arguments.warmup + 2 * arguments.steps):
        barrier(mesh.world)
        if step < arguments.warmup:
            replica.gradients(batches, scale)
        elif (step - arguments.warmup) % 2:
            starts.append(time.perf_counter())
            replica.gradients(batches, scale)
            ends.append(time.perf_counter())
        else:
            with timed_passes(lambda stage, kind, seconds: noted[stage, kind].append(seconds)):
                replica.gradients(batches, scale)
            sends.append(transfer_seconds(arguments, mesh.pp))
    replica.state.release()
    return RankTimes(
        passes={key: statistics.median(seconds) for key, seconds in noted.items()},
        calls={key: len(seconds) // arguments.steps for key, seconds in noted.items()},
        starts=starts,
        ends=ends,
        send_s=statistics.median(sends),
    )


def random_batch(arguments: Arguments) -> MicroBatch:
    """One document of random tokens; time does not depend on what they say."""
    tokens = np.random.default_rng(0).integers(0, arguments.vocab_size, size=arguments.tokens)
    return pack([tokens], [tokens], [np.array([0])])


@contextmanager
def timed_passes(note: Callable[[int, str, float], None]) -> Iterator[None]:
    """Time each pass that the engine runs in the block; waiting for inputs is outside of them."""
    names = ("forward_one_chunk", "backward_one_chunk", "backward_weight_one_chunk")
    originals = {name: getattr(PipelineStage, name) for name in names}

    def timed(name: str) -> Callable[..., Any]:
        def run(stage: Any, *args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = originals[name](stage, *args, **kwargs)
            kind = {"forward_one_chunk": "F", "backward_weight_one_chunk": "W"}.get(
                name, "B" if kwargs.get("full_backward", True) else "I"
            )
            note(stage.stage_index, kind, time.perf_counter() - start)
            return result

        return run

    for name in names:
        setattr(PipelineStage, name, timed(name))
    try:
        yield
    finally:
        for name in names:
            setattr(PipelineStage, name, originals[name])


def transfer_seconds(arguments: Arguments, axis: Axis) -> float:
    """Half the time in which a residual stream goes from the first rank to the second and back."""
    stream = torch.zeros(arguments.tokens, arguments.hidden_size)
    start = time.perf_counter()
    if axis.rank == 0:
        send(stream, axis, 1)
        receive(stream, axis, 1)
    elif axis.rank == 1:
        receive(stream, axis, 0)
        send(stream, axis, 0)
    return (time.perf_counter() - start) / 2


def predict(arguments: Arguments, layout: ParallelConfig, ranks: list[RankTimes]) -> Timeline:
    """The simulator's timeline of a step."""
    passes = {key: seconds for rank in ranks for key, seconds in rank.passes.items()}

    def of(kind: str, other: str = "") -> tuple[float, ...]:
        stages = range(layout.num_stages)
        return tuple(passes.get((stage, kind), passes.get((stage, other), 0.0)) for stage in stages)

    table = schedule_table(layout.pp_schedule, layout.pp, layout.stages_per_rank, arguments.micro_batches)
    send_s = statistics.median(rank.send_s for rank in ranks[:2])
    times = StageTimes(of("F"), of("I"), of("W"), send=send_s, backward=of("B"))
    return simulate(table, times)


def report(arguments: Arguments, layout: ParallelConfig, ranks: list[RankTimes], command: str) -> None:
    """Print a line and append the record of one schedule."""
    facts = {"machine": machine(layout), "command": command}
    record = (
        record_of(arguments, layout, ranks)
        | facts
        | {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    )
    print(
        f"{layout.pp_schedule:<24} step {record['step_ms_p50']:8.1f} ms, simulated {record['simulated_step_ms']:8.1f}; "
        f"idle {record['bubble']:6.1%}, simulated {record['simulated_bubble']:6.1%} "
        f"(even stages: {record['even_bubble']:6.1%})",
        flush=True,
    )
    if arguments.output:
        Path(arguments.output).parent.mkdir(parents=True, exist_ok=True)
        with open(arguments.output, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def record_of(arguments: Arguments, layout: ParallelConfig, ranks: list[RankTimes]) -> dict[str, Any]:
    """Measured and simulated numbers of one schedule."""
    predicted = predict(arguments, layout, ranks)
    # All ranks read one clock: from the first that begins to the last that ends.
    begins, ends = (
        zip(*(rank.starts for rank in ranks), strict=True),
        zip(*(r.ends for r in ranks), strict=True),
    )
    steps = sorted(max(e) - min(b) for b, e in zip(begins, ends, strict=True))
    busy = sum(seconds * rank.calls[key] for rank in ranks for key, seconds in rank.passes.items())
    even = simulate(
        schedule_table(layout.pp_schedule, layout.pp, layout.stages_per_rank, arguments.micro_batches),
        StageTimes.even(layout.num_stages),
    )
    step = statistics.median(steps)
    return {
        "benchmark": "pipeline_bubble",
        "schedule": layout.pp_schedule,
        "pp": layout.pp,
        "stages_per_rank": layout.stages_per_rank,
        "micro_batches": arguments.micro_batches,
        "step_ms_p10": 1e3 * steps[len(steps) // 10],
        "step_ms_p50": 1e3 * step,
        "step_ms_p90": 1e3 * steps[len(steps) * 9 // 10],
        "simulated_step_ms": 1e3 * predicted.makespan,
        "bubble": 1 - busy / (layout.pp * step),
        "simulated_bubble": predicted.bubble,
        "simulated_exposed": predicted.exposed,
        "even_bubble": even.bubble,
        "passes_ms": {
            f"{stage}{kind}": 1e3 * seconds
            for rank in ranks
            for (stage, kind), seconds in rank.passes.items()
        },
        "send_ms": 1e3 * statistics.median(rank.send_s for rank in ranks[:2]),
        "measured_steps": len(steps),
        "model": dataclasses.asdict(model_of(arguments)),
        "tokens": arguments.tokens,
    }


def machine(layout: ParallelConfig) -> dict[str, Any]:
    """What the numbers were measured on."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short=12", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    facts = environment(Mesh(device=torch.device("cpu")), layout)
    own = {key: facts[key] for key in ("megalite", "torch", "numpy", "python", "device", "isa", "threads")}
    cores = len(os.sched_getaffinity(0))
    return {"cpu": device_name(), "cores": cores, "commit": commit.stdout.strip(), **own}


if __name__ == "__main__":
    main()
