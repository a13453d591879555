"""Has anything become slower? Measures again and compares with the committed records of the same kind of machine.

    python -m benchmarks.check [--throughput llama-60m/bf16,...] [--ops swiglu,...] [--require] [--json]

Only ratios to what is measured in the same run are compared (tokens/s over the best other trainer's, the share of the
measured GEMM peak; an op beside plain torch, torch.compile, a copy or a product), so that a noisy hour or another
clock speed changes both sides. A ratio below its limit is measured a second time, and the better of the two counts.

Exit codes: 0 nothing is slower, or nothing is recorded for this kind of machine (2 then, with --require); 1 a benchmark
failed; 2 wrong arguments; 4 something is slower.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from benchmarks.kernels.__main__ import benchmarks, with_paths
from benchmarks.records import RESULTS, Machine, Record, machine_of, read
from benchmarks.targets import Target, kernel_targets, throughput_targets

ROOT = Path(__file__).resolve().parents[1]
FLOOR = 0.10
"""Least part by which a ratio may fall: the same code, measured twice in quiet minutes, differs by up to 5 %."""
CEILING = 0.30
"""Most, whatever spread was recorded: one busy moment while recording must not allow everything afterwards."""
THROUGHPUT_SHAPES = "llama-60m/bf16"
HOT = {
    "rms_norm": "rms_norm residual",
    "swiglu": "swiglu",
    "attention": "attention causal",
    "linear_cross_entropy": "linear_cross_entropy",
    "adamw": "adamw_",
}
"""Ops measured by default, and of each the case that a training step calls: together about three minutes."""
LIMIT_S = 1200
"""No single benchmark gets more than this."""


class BenchmarkFailed(Exception):
    """A benchmark ended with an error, or took too long."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One ratio, as committed and as measured now."""

    metric: str
    committed: float
    now: float
    limit: float

    @property
    def slower(self) -> bool:
        """Below the limit."""
        return self.now < self.limit


Measure = Callable[[Target], Sequence[Record]]


def compare(target: Target, fresh: Sequence[Record]) -> list[Comparison]:
    """Every ratio that both the committed and the fresh records have."""
    now = target.ratios(fresh, target.committed)
    found = []
    for name, ratio in target.ratios(target.committed, fresh).items():
        if name in now:
            allowed = min(CEILING, max(FLOOR, ratio.spread))
            limit = ratio.value * (1 - allowed)
            found.append(Comparison(f"{target.name}: {name}", ratio.value, now[name].value, limit))
    return found


def differences(committed: Sequence[Record], fresh: Sequence[Record]) -> list[str]:
    """Versions that are not those of the record: a ratio may have moved by what others changed."""
    before, now = committed[-1].get("versions", {}), fresh[-1].get("versions", {})
    changed = [name for name in before if name in now and before[name] != now[name]]
    return [f"recorded with {name} {before[name]}, here {now[name]}" for name in changed]


def checked(target: Target, measure: Measure) -> list[Comparison]:
    """Measure and compare; once more, if something seems slower."""
    fresh = measure(target)
    found = compare(target, fresh)
    for line in (
        differences(target.committed, fresh)
        if found
        else [f"{target.name}: nothing in common with the record"]
    ):
        print(f"  {line}")
    if not any(comparison.slower for comparison in found):
        return found
    print(f"  {target.name}: something seems slower; measuring once more", flush=True)
    again = {comparison.metric: comparison.now for comparison in compare(target, measure(target))}
    return [replace(c, now=max(c.now, again.get(c.metric, c.now))) for c in found]


def run(target: Target) -> list[Record]:
    """Run a target's benchmark in its own process.

    Raises:
        BenchmarkFailed: it ended with an error or took more than `LIMIT_S`.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / target.output
        command = [sys.executable, *target.command, "--output", str(path)]
        print(f"  {target.name}: {shlex.join(['python', *target.command])}", flush=True)
        try:
            ended = subprocess.run(
                command,
                timeout=LIMIT_S,
                check=False,
                env=with_paths(),
                cwd=ROOT,
                capture_output=True,
                text=True,
            )
        except subprocess.TimeoutExpired as error:
            raise BenchmarkFailed(f"{target.name} took more than {LIMIT_S} s") from error
        if ended.returncode:
            last = "\n".join((ended.stdout + ended.stderr).strip().splitlines()[-15:])
            raise BenchmarkFailed(f"{target.name} ended with exit code {ended.returncode}:\n{last}")
        return read(path)


def this_machine() -> Machine:
    """Where this process runs, in the terms of a kernel's record."""
    import torch

    from megalite_kernels import environment
    from megalite_kernels.timing import device_name

    kind = "cuda" if torch.cuda.is_available() else "cpu"
    native = environment.native_library()
    facts = {"isa": native.get("isa"), "threads": torch.get_num_threads()}
    return machine_of({"device_type": kind, "device": device_name(kind), **facts})


def as_table(comparisons: Sequence[Comparison]) -> str:
    """One line for each ratio."""
    width = max(len(comparison.metric) for comparison in comparisons)
    lines = [f"  {'ratio (more is better)':<{width}}{'committed':>11}{'now':>9}{'limit':>9}"]
    for c in comparisons:
        mark = "✗" if c.slower else "✓"
        lines.append(f"{mark} {c.metric:<{width}}{c.committed:>11.3f}{c.now:>9.3f}{c.limit:>9.3f}")
    return "\n".join(lines)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Arguments of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.check", description="Has anything become slower?"
    )
    parser.add_argument(
        "--throughput", default=THROUGHPUT_SHAPES, help="PRESET/PRECISION,...; empty for none"
    )
    parser.add_argument("--peers", type=int, default=1, help="strongest other trainers to run beside ours")
    parser.add_argument("--rounds", type=int, default=2, help="of each trainer")
    parser.add_argument(
        "--ops",
        default=None,
        help=f"all cases of these ops, or 'all'; empty for none; by default {', '.join(HOT)}",
    )
    parser.add_argument("--dtypes", default="bf16", help="of the ops")
    parser.add_argument("--seconds", type=float, default=10.0, help="of timed rounds for one op, about")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the committed records")
    parser.add_argument("--require", action="store_true", help="exit 2 if there is nothing to compare with")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    return parser.parse_args(argv)


def ops_of(text: str | None) -> Mapping[str, str]:
    """Name to cases (all, if empty) of the ops to measure.

    Raises:
        ValueError: one of them has no benchmark.
    """
    if text is None:
        return HOT
    names = benchmarks() if text == "all" else [name.strip() for name in text.split(",") if name.strip()]
    if unknown := [name for name in names if name not in benchmarks()]:
        raise ValueError(f"op {unknown[0]!r} has no benchmark: use some of {', '.join(benchmarks())}")
    return dict.fromkeys(names, "")


def main(argv: Sequence[str] | None = None, measure: Measure = run, here: Machine | None = None) -> int:
    """Measure what is recorded for this kind of machine, and say what is slower."""
    arguments = parse(argv)
    here = here or this_machine()
    shapes = [shape for shape in arguments.throughput.split(",") if shape]
    try:
        ops = ops_of(arguments.ops)
        targets = throughput_targets(arguments.results, shapes, arguments.peers, arguments.rounds, here)
        targets += kernel_targets(arguments.results, ops, arguments.dtypes, arguments.seconds, here)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    absent = sorted(
        {*(shape.replace("/", " ") for shape in shapes), *ops} - {target.name for target in targets}
    )
    if absent:
        print(f"not recorded for {here}, so not compared: {', '.join(absent)}", flush=True)
    try:
        comparisons = [comparison for target in targets for comparison in checked(target, measure)]
    except BenchmarkFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return report(comparisons, absent, here, arguments)


def report(
    comparisons: Sequence[Comparison], absent: Sequence[str], here: Machine, asked: argparse.Namespace
) -> int:
    """Print what was found; the exit code."""
    slower = [comparison for comparison in comparisons if comparison.slower]
    if comparisons:
        print(as_table(comparisons))
        print(
            f"{len(slower)} of {len(comparisons)} ratios are below their limit"
            if slower
            else "nothing is slower"
        )
    else:
        print(f"no committed result of {here} to compare with: make bench, make bench-kernels record some")
    if asked.json:
        found = {"machine": str(here), "compared": len(comparisons), "not_compared": list(absent)}
        print(json.dumps(found | {"slower": [asdict(comparison) for comparison in slower]}))
    if slower:
        return 4
    return 2 if asked.require and not comparisons else 0


if __name__ == "__main__":
    sys.exit(main())
