"""What every kernel benchmark shares: arguments, the variants that run here, records, and the printed table.

    python -m benchmarks.kernels.bench_rms_norm --output benchmarks/results/kernels

One JSON record per variant, case, shape, dtype and pass, with the floor of bytes and FLOPs beside each time,
and everything needed to repeat it.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.cuda_check import CUDA_FIRST, cuda_ops
from benchmarks.kernels.peers import Peer
from megalite_kernels import environment
from megalite_kernels.cases import cases_of
from megalite_kernels.cases.base import Case, Shape
from megalite_kernels.doctor import name_of, speed_as_json
from megalite_kernels.memory import keep_freed_pages
from megalite_kernels.speed import BOTH, COMPILED, COPY, EAGER, OURS, PRODUCT, Speed, compiled, measure_case
from megalite_kernels.timing import device_name

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CUDA = "cuda"
"""Variant: ours, on CUDA kernels wherever there are some, whatever `PREFERENCE` says."""
RESULTS = "benchmarks/results/kernels"


@dataclass(frozen=True, slots=True)
class Benchmark:
    """The benchmark of one public op."""

    op: str
    peers: Mapping[str, Sequence[Peer]] = field(default_factory=dict)
    """By case name: other packages' ways to do the same."""
    more_shapes: Mapping[str, Mapping[str, Sequence[Shape]]] = field(default_factory=dict)
    """By case name and device type: shapes beside those of the contract."""

    def shapes(self, case: Case, device: str) -> list[Shape]:
        """Training shapes of a case on a device type."""
        return [*case.shapes(device), *self.more_shapes.get(case.name, {}).get(device, ())]


@dataclass(frozen=True, slots=True)
class Arguments:
    """Of the command line."""

    device: str
    dtypes: tuple[str, ...]
    seconds: float
    compile: bool
    cases: tuple[str, ...]
    output: str


def parse(argv: Sequence[str] | None, description: str) -> Arguments:
    """Arguments of one benchmark."""
    parser = argparse.ArgumentParser(description=description)
    add_arguments(parser)
    parser.add_argument("--cases", default="", help="comma-separated names of cases; all by default")
    values = parser.parse_args(argv)
    dtypes = tuple(name for name in values.dtypes.split(",") if name)
    if unknown := [name for name in dtypes if name not in DTYPES]:
        parser.error(f"dtype {unknown[0]!r} is not known: use some of {', '.join(DTYPES)}")
    if values.device == "cuda" and not torch.cuda.is_available():
        parser.error("device 'cuda' is not here: torch finds no GPU on this machine")
    cases = tuple(name.strip() for name in values.cases.split(",") if name.strip())
    return Arguments(values.device, dtypes, values.seconds, not values.no_compile, cases, values.output)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What a single benchmark and all of them take."""
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=here, choices=("cpu", "cuda"), help=f"default {here}")
    parser.add_argument("--dtypes", default="bf16,fp32", help="comma-separated: bf16, fp16, fp32")
    parser.add_argument("--seconds", type=float, default=15.0, help="of timed rounds for one op, about")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--output", default="", help=f"folder for OP.jsonl, for example {RESULTS}")


def main(benchmark: Benchmark, argv: Sequence[str] | None = None) -> int:
    """Measure, print a table, and append the records to the output folder."""
    arguments = parse(argv, f"Time {benchmark.op} against plain torch, torch.compile and other packages.")
    keep_freed_pages()
    facts = record_facts(arguments)
    print(
        f"{benchmark.op} on {facts['device']}, torch {facts['versions']['torch']}, commit {facts['commit']}"
    )
    say_what_is_missing(benchmark, arguments.device)
    cases = [case for case in cases_of(benchmark.op) if not arguments.cases or case.name in arguments.cases]
    work = [
        (case, shape, dtype)
        for case in cases
        for shape in benchmark.shapes(case, arguments.device)
        for dtype in arguments.dtypes
        if DTYPES[dtype] in case.dtypes
    ]
    if not work:
        names = ", ".join(case.name for case in cases_of(benchmark.op))
        print(f"nothing to measure: cases of {benchmark.op} are {names}", file=sys.stderr)
        return 2
    failures = 0
    for case, shape, dtype in work:
        speeds = measured(benchmark, case, shape, dtype, arguments, arguments.seconds / len(work))
        if speeds:
            print_table(case, shape, dtype, speeds)
            records = [speed_as_json(speed) | {"op": case.op} | facts for speed in speeds]
            write(arguments.output, benchmark.op, records)
        else:
            failures += 1
    return 1 if failures else 0


def measured(
    benchmark: Benchmark, case: Case, shape: Shape, dtype: str, arguments: Arguments, budget_s: float
) -> list[Speed]:
    """Speeds of all variants; if one of them fails, of fewer: without peers, then ours alone, then none."""
    variants = variants_of(case, benchmark.peers.get(case.name, ()), arguments, dtype)
    own = {name: variants[name] for name in (OURS, CUDA, EAGER, COMPILED) if name in variants}
    sets = [variants, *([own] if len(own) < len(variants) else []), {OURS: case.ours}]
    for chosen in sets:
        torch.compiler.reset()  # else the eighth shape or dtype of one function would silently run uncompiled
        try:
            return measure_case(
                case, shape, DTYPES[dtype], chosen, device=arguments.device, budget_s=budget_s,
                backends={CUDA: CUDA_FIRST},
            )  # fmt: skip
        except Exception as error:  # a variant that fails must not lose the others
            first = (str(error).strip().splitlines() or [""])[0]
            names = ", ".join(chosen)
            print(
                f"\n{case.name} {dtype} {dict(shape)}: one of {names} failed: {type(error).__name__}: {first}"
            )
    return []


def variants_of(
    case: Case, peers: Sequence[Peer], arguments: Arguments, dtype: str
) -> dict[str, Callable[..., Any]]:
    """Ours, plain torch, and what else runs here; ours on CUDA kernels too, where a case has some."""
    variants: dict[str, Callable[..., Any]] = {OURS: case.ours, EAGER: case.baseline()}
    if arguments.device == "cuda" and has_cuda_kernels(case, dtype):
        variants[CUDA] = case.ours
    if arguments.compile:
        variants[COMPILED] = compiled(case)
    return variants | {peer.name: peer.build() for peer in peers if peer.unusable(arguments.device) is None}


def has_cuda_kernels(case: Case, dtype: str) -> bool:
    """Whether any op of the case runs on a CUDA kernel; one that fails is named and left out."""
    try:
        return bool(cuda_ops(case, DTYPES[dtype], "cuda"))
    except Exception as error:  # a kernel that doesn't compile must not lose the other variants
        print(f"  {case.name} {dtype}: CUDA kernels left out: {type(error).__name__}: {error}")
        return False


def say_what_is_missing(benchmark: Benchmark, device: str) -> None:
    """Why peers of this benchmark don't run here."""
    cases = {case.name for case in cases_of(benchmark.op)}
    peers = [peer for name, some in benchmark.peers.items() if name in cases for peer in some]
    for reason in dict.fromkeys(peer.unusable(device) for peer in peers):
        if reason is not None:
            print(f"  left out: {reason}")


def record_facts(arguments: Arguments) -> dict[str, Any]:
    """What every record of this process says besides its figures."""
    found = environment.facts()
    gpu = found["gpus"][0] if arguments.device == "cuda" else {}
    return {
        "benchmark": "kernels",
        "device": device_name(arguments.device),
        "device_type": arguments.device,
        "driver": gpu.get("driver"),
        "isa": found["native"].get("isa") if arguments.device == "cpu" else None,
        "threads": found["threads"],
        "versions": found["versions"] | {name: text for name, text in found["peers"].items() if text},
        "commit": found["commit"],
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def write(folder: str, op: str, records: Sequence[Mapping[str, Any]]) -> None:
    """Append records to OP.jsonl of the folder, if there is one."""
    if not folder:
        return
    path = Path(folder) / f"{op.rstrip('_')}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(record, allow_nan=False) + "\n" for record in records)


def print_table(case: Case, shape: Shape, dtype: str, speeds: Sequence[Speed]) -> None:
    """One block of lines per case: a line for each variant and pass."""
    sizes = " ".join(f"{letter}={size}" for letter, size in shape.items())
    print(f"\n{case.name}  {dtype}  {sizes}")
    ours = {s.passes: s.timing.median_ms for s in speeds if s.variant == OURS}
    print(f"  {'variant':<12}{'pass':<18}{'ms':>10}{'best':>10}{'spread':>8}{'MB':>10}{'GFLOP':>10}"
          f"{'GB/s':>8}{'GFLOP/s':>10}{'of copy':>9}{'of GEMM':>9}{'/ ours':>8}")  # fmt: skip
    for speed in sorted(speeds, key=lambda s: s.passes == BOTH):
        timing = speed.timing
        yardstick = speed.variant in (COPY, PRODUCT)
        ratio = "" if yardstick else f"{timing.median_ms / ours[speed.passes]:.2f}"
        print(f"  {speed.variant:<12}{speed.passes:<18}{timing.median_ms:>10.4g}{timing.best_ms:>10.4g}"
              f"{timing.spread:>8.0%}{speed.bytes / 1e6:>10.4g}{speed.flops / 1e9:>10.3g}{speed.gb_per_s:>8.1f}"
              f"{speed.gflops:>10.1f}{speed.of_copy:>9.0%}{speed.of_gemm:>9.0%}{ratio:>8}", flush=True)  # fmt: skip


__all__ = ["Benchmark", "add_arguments", "main", "name_of", "parse"]
