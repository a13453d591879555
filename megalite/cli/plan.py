"""``megalite plan CONFIG.toml --processes N [--any.field value ...]``: what a run will be, before it is started."""

from __future__ import annotations

import dataclasses
import json
from itertools import groupby
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from megalite.cli.config_file import parse_run
from megalite.config import RunConfig
from megalite.errors import ExitCode, UserError
from megalite.train.plan import Alternative, RunPlan, plan_run
from megalite.train.schedule_plot import Words, save_schedule

MEMORY_TERMS = ("weights", "gradients", "optimizer", "activations")
"""Columns of the memory table; what else there is stands under "other"."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanArguments(RunConfig):
    """Check a run's configuration for a number of processes, starting none: megalite plan CONFIG.toml --processes N

    Prints the mesh, the layers of each pipeline rank, the idle time of the schedule by simulation and that of every
    other schedule, the bytes each rank sends in a step, and its memory. Any field of the run can be overridden.
    """

    processes: int = 1
    """Processes (GPUs) of the run."""
    draw: str = ""
    """Draw the pipeline's schedule into this file: .png, .svg or .pdf."""
    json: bool = False
    """Print one JSON object and nothing else."""


def main(argv: list[str]) -> int:
    """Run the command; returns the exit code."""
    arguments, config = parse_run(PlanArguments, argv, prog="megalite plan")
    plan = plan_run(config, arguments.processes)
    if arguments.draw:
        _draw(plan, Path(arguments.draw))
    if arguments.json:
        print(json.dumps(as_json(plan), allow_nan=False))
    else:
        show(plan, Console(highlight=False))
    return ExitCode.DONE


def _draw(plan: RunPlan, path: Path) -> None:
    if plan.timeline is None:
        raise UserError(f"--draw {path}: parallel.pp=1 has no schedule to draw")
    parallel = plan.config.parallel
    stages = f" × {parallel.stages_per_rank} stages" if parallel.stages_per_rank > 1 else ""
    words = Words(
        title=f"{parallel.pp_schedule}: {parallel.pp} ranks{stages}, {plan.micro_batches} micro-batches",
        subtitle=f"{plan.config.preset or plan.config.name}, {plan.config.model.num_layers} layers; "
        f"{plan.timeline.bubble:.1%} of the time idle, transfers taken as free",
        time="time, in forward passes of one layer",
        memory="micro-batches · layers kept",
    )
    save_schedule(plan.timeline, words, path)


def show(plan: RunPlan, console: Console) -> None:
    """Print a plan as tables."""
    for name, text in facts(plan):
        console.print(f"[bold]{name:<11}[/]{text}", soft_wrap=True)
    console.print()
    for table in (_ranks(plan), _schedules(plan), _traffic(plan), _memory(plan)):
        if table is not None:
            console.print(table)
    if plan.timeline is not None:
        console.print(
            "kept: most micro-batches · layers whose activations a rank holds at one time", style="dim"
        )
        console.print("idle: by the FLOPs of the stages, with transfers that take no time", style="dim")


def facts(plan: RunPlan) -> list[tuple[str, str]]:
    """What there is one of."""
    config, parallel, train = plan.config, plan.config.parallel, plan.config.train
    name = config.preset or config.name
    samples = train.global_batch_size
    mesh = (
        f"{plan.processes} processes = tp {parallel.tp} · cp {parallel.cp} · dp {plan.dp} · pp {parallel.pp}"
    )
    step = f"{samples} samples of {train.seq_length} tokens, {samples * train.seq_length:,} in all"
    batches = f"{plan.micro_batches} micro-batches of {train.micro_batch_size} on each data-parallel rank"
    lines = [
        (
            "model",
            f"{name}: {config.model.num_layers} layers, {plan.parameters / 1e9:.3g} billion parameters",
        ),
        ("mesh", f"{mesh}, tp innermost; {_zero(plan)}"),
        ("step", f"{step}; {batches}"),
    ]
    if plan.timeline is not None:
        idle, kept = f"{plan.timeline.bubble:.2%}", f"{max(plan.timeline.peak_bytes):.0f}"
        stages = f"{parallel.stages_per_rank} stages a rank, " if parallel.stages_per_rank > 1 else ""
        promise = f"{idle} of the time idle, at most {kept} micro-batches · layers kept, no deadlock"
        lines.append(("schedule", f"{parallel.pp_schedule}, {stages}simulated: {promise}"))
    fullest = max(plan.memory, key=lambda memory: memory.total)
    lines.append(("memory", f"{_gb(fullest.total)} GB on the fullest rank"))
    return lines


def _zero(plan: RunPlan) -> str:
    parallel = plan.config.parallel
    data = plan.dp * parallel.cp
    shard = (parallel.dp_shard or plan.dp) * parallel.cp
    if data == 1:
        return "one holder of each weight"
    if parallel.zero == 0:
        return f"{data} ranks with the same weights, nothing divided"
    what = "optimizer state" if parallel.zero == 1 else "weights, gradients and optimizer state"
    return f"{what} divided over {shard} of {data} ranks with the same weights"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for number, name in enumerate(columns):
        table.add_column(name, justify="left" if number == 0 else "right", no_wrap=True)
    return table


def _ranks(plan: RunPlan) -> Table:
    table = _table(
        "Pipeline ranks" if plan.stages.pp > 1 else "Layers",
        "rank",
        "stages",
        "layers",
        "FLOPs",
        "idle",
        "kept",
    )
    table.columns[1].justify = table.columns[2].justify = "left"
    table.columns[2].no_wrap = False
    for rank, share in enumerate(plan.shares):
        own = plan.stages.stages_of(rank)
        parts = ["embedding"] if 0 in own else []
        parts += [_span(plan.stages.layers[stage]) for stage in own]
        parts += ["head"] if plan.stages.num_stages - 1 in own else []
        line = None if plan.timeline is None else plan.timeline.ranks[rank]
        idle = "" if plan.timeline is None else f"{plan.timeline.bubble_of(rank):.1%}"
        kept = "" if line is None else f"{line.peak_bytes:.0f}"
        table.add_row(str(rank), " ".join(map(str, own)), ", ".join(parts), f"{share:.1%}", idle, kept)
    return table


def _span(layers: range) -> str:
    return str(layers[0]) if len(layers) == 1 else f"{layers[0]}–{layers[-1]}"


def _schedules(plan: RunPlan) -> Table | None:
    if not plan.alternatives:
        return None
    table = _table("Schedules, simulated", "schedule", "stages", "idle", "kept", "")
    table.columns[4].justify, table.columns[4].no_wrap = "left", False
    for other in sorted(plan.alternatives, key=lambda one: (one.bubble is None, one.bubble)):
        chosen = other.schedule == plan.config.parallel.pp_schedule
        numbers = ("–", "–") if other.bubble is None else (f"{other.bubble:.2%}", f"{other.peak_layers:.0f}")
        note = "configured" if chosen else _short(other)
        table.add_row(
            other.schedule, str(other.stages_per_rank), *numbers, note, style="bold" if chosen else None
        )
    return table


def _short(other: Alternative) -> str:
    """Why not, without what the row says already."""
    before, needs, after = other.reason.partition(": ")[0].partition("needs ")
    return f"needs {after}" if needs else before


def _traffic(plan: RunPlan) -> Table | None:
    if all(one.total == 0 for one in plan.sent):
        return None
    table = _table("GB that each rank sends in a step", "rank", "tp", "cp", "pp", "dp", "total")
    for ranks, sent in _alike([(one.tp, one.cp, one.pp, one.dp, one.total) for one in plan.sent]):
        table.add_row(ranks, *(_gb(value) for value in sent))
    return table


def _memory(plan: RunPlan) -> Table:
    table = _table("GB that each rank needs", "rank", *MEMORY_TERMS, "other", "total")
    rows = []
    for memory in plan.memory:
        terms = [float(memory.terms[name]) for name in MEMORY_TERMS]
        rows.append((*terms, memory.total - sum(terms), float(memory.total)))
    for ranks, values in _alike(rows):
        table.add_row(ranks, *(_gb(value) for value in values))
    return table


def _alike(rows: list[tuple[float, ...]]) -> list[tuple[str, tuple[float, ...]]]:
    """Neighbouring equal rows as one: ("1–2", values)."""
    groups = [
        [number for number, _ in group] for _, group in groupby(enumerate(rows), key=lambda pair: pair[1])
    ]
    return [(_span(range(group[0], group[-1] + 1)), rows[group[0]]) for group in groups]


def _gb(value: float) -> str:
    return "–" if value == 0 else f"{value / 1e9:.2f}" if value >= 1e7 else f"{value / 1e9:.2g}"


def as_json(plan: RunPlan) -> dict[str, Any]:
    """A plan as plain values."""
    parallel, timeline = plan.config.parallel, plan.timeline
    return {
        "processes": plan.processes,
        "mesh": {"tp": parallel.tp, "cp": parallel.cp, "dp": plan.dp, "pp": parallel.pp},
        "micro_batches": plan.micro_batches,
        "schedule": parallel.pp_schedule if parallel.pp > 1 else None,
        "bubble": None if timeline is None else timeline.bubble,
        "ranks": [
            {
                "rank": rank,
                "stages": list(plan.stages.stages_of(rank)),
                "layers": [list(plan.stages.layers[stage]) for stage in plan.stages.stages_of(rank)],
                "flops_share": share,
                "bubble": None if timeline is None else timeline.bubble_of(rank),
                "peak_micro_batch_layers": None if timeline is None else timeline.peak_bytes[rank],
                "sent_bytes": dataclasses.asdict(plan.sent[rank]),
                "memory_bytes": {**plan.memory[rank].terms, "total": plan.memory[rank].total},
            }
            for rank, share in enumerate(plan.shares)
        ],
        "schedules": [dataclasses.asdict(other) for other in plan.alternatives],
    }
