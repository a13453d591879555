"""Is this installation sound on this machine, and how fast is it?

    python -m megalite_kernels.doctor [--quick] [--ops rms_norm,attention] [--device cpu] [--compile] [--json]

Checks forward and backward of every op against float64 on every device that is here, and times them against
plain torch, a copy of the same bytes, and a matrix product. Exits with 4 if an op breaks its contract.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from megalite_kernels import environment
from megalite_kernels.backend import Choice, explain, recording
from megalite_kernels.cases import CASES
from megalite_kernels.cases.base import Case
from megalite_kernels.cases.checking import check_case
from megalite_kernels.contract import CONTRACTS
from megalite_kernels.memory import keep_freed_pages
from megalite_kernels.speed import COMPILED, EAGER, OURS, Speed, compiled, measure_case
from megalite_kernels.testing import Accuracy

BUDGET_S = 0.5
"""Time of the rounds of one case in one dtype; all of them take half a minute on one core."""

BROKEN_EXIT_CODE = 4
"""Of the command, if an op breaks its contract."""

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Check:
    """One case in one dtype on one device against its contract."""

    case: str
    op: str
    dtype: torch.dtype
    device: str
    backends: dict[str, str]
    """Raw op to the backend that ran it."""
    accuracies: dict[str, Accuracy] = field(default_factory=dict)
    problem: str = ""
    """The exception, if the op raised one."""

    @property
    def kept(self) -> bool:
        """Whether the contract is kept."""
        return not self.problem and all(one.kept for one in self.accuracies.values())

    def worst(self, *, gradients: bool) -> Accuracy | None:
        """The result nearest to its limit (or furthest over it), among the gradients or the others."""
        chosen = [a for name, a in self.accuracies.items() if name.startswith("grad") == gradients]
        return max(chosen, key=lambda a: float("inf") if a.problem else _share(a), default=None)

    def reason(self) -> str:
        """What is broken, in one line."""
        broken = [f"{name}: {found}" for name, found in self.accuracies.items() if not found.kept]
        return self.problem or "; ".join(broken)


def _share(found: Accuracy) -> float:
    if found.limit:
        return found.error / found.limit
    return float("inf") if found.error else 0.0


@dataclass(frozen=True, slots=True)
class Report:
    """Everything the doctor found."""

    environment: dict[str, Any]
    choices: dict[str, tuple[Choice, ...]]
    """Per device type: the backend of every raw op, and why others were passed over."""
    checks: list[Check]
    speeds: dict[str, list[Speed]]
    """Per device type."""
    notes: list[str]
    """What could not be measured, and why."""
    seconds: float

    @property
    def broken(self) -> list[Check]:
        """Checks that failed."""
        return [check for check in self.checks if not check.kept]


def devices(device: str = "all") -> list[str]:
    """Device types to look at: "all" is the CPU, and the GPU if there is one.

    Raises:
        ValueError: the name is not known, or there is no such device.
    """
    here = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    if device not in ("all", "cpu", "cuda"):
        raise ValueError(f"device {device!r} is not known: use all, cpu or cuda")
    if device != "all" and device not in here:
        raise ValueError("device 'cuda' is not here: torch finds no GPU on this machine; use all or cpu")
    return here if device == "all" else [device]


def examine(
    ops: Sequence[str] = (),
    *,
    device: str = "all",
    quick: bool = False,
    with_compile: bool = False,
    budget_s: float = BUDGET_S,
    progress: Progress = lambda text: None,
) -> Report:
    """Check, and unless `quick` time, the named public ops (all by default) on this machine's devices.

    Raises:
        ValueError: a name is not that of an op, or there is no such device.
    """
    unknown = [name for name in ops if name not in CONTRACTS]
    if unknown:
        raise ValueError(f"op {unknown[0]!r} is not known: use some of {', '.join(CONTRACTS)}")
    start = time.monotonic()
    places = devices(device)
    cases = [case for case in CASES.values() if not ops or case.op in ops]
    report = Report(environment.facts(), {place: tuple(explain(place)) for place in places}, [], {}, [], 0.0)
    for place in places:
        for case in cases:
            progress(f"checking {case.name} on {place}")
            report.checks.extend(_check(case, dtype, place) for dtype in _dtypes(case))
        if quick:
            report.notes.append("nothing was timed: this was a quick run")
            continue
        broken = {check.case for check in report.broken if check.device == place}
        report.speeds[place] = []
        for case in cases:
            if case.name not in broken:
                _time(case, place, with_compile, budget_s, report, progress)
    return replace(report, seconds=time.monotonic() - start)


def _dtypes(case: Case) -> tuple[torch.dtype, ...]:
    """fp16 is checked wherever bf16 and fp32 are."""
    every = (torch.bfloat16, torch.float16, torch.float32)
    return every if torch.float32 in case.dtypes else case.dtypes


def _check(case: Case, dtype: torch.dtype, device: str) -> Check:
    with recording() as record:
        try:
            found = check_case(case, dtype, device, factor=CONTRACTS[case.op].factor)
            problem = ""
        except (
            Exception
        ) as error:  # a kernel that doesn't compile or raises is what the doctor is there to find
            found, problem = {}, _first_line(error)
    backends = {choice.op: choice.backend for choice in record}
    return Check(case.name, case.op, dtype, device, backends, found, problem)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


def _time(
    case: Case, device: str, with_compile: bool, budget_s: float, report: Report, progress: Progress
) -> None:
    """Adds the case's speeds to the report; an op that fails at a real shape is a broken one."""
    shape = case.doctor if device == "cpu" else case.cuda[0]
    for dtype in case.dtypes:
        progress(f"timing {case.name} in {name_of(dtype)} on {device}")
        variants: dict[str, Callable[..., Any]] = {OURS: case.ours, EAGER: case.baseline()}
        if with_compile:
            variants[COMPILED] = compiled(case)
        try:
            speeds = measure_case(case, shape, dtype, variants, device=device, budget_s=budget_s)
        except torch.OutOfMemoryError:
            report.notes.append(
                f"{case.name} in {name_of(dtype)} does not fit the memory of {device} at {dict(shape)}"
            )
        except Exception as error:  # as in _check
            problem = f"at {dict(shape)}: {_first_line(error)}"
            report.checks.append(Check(case.name, case.op, dtype, device, {}, {}, problem))
        else:
            report.speeds[device].extend(speeds)


def name_of(dtype: torch.dtype) -> str:
    """A dtype as people write it: bf16, fp16, fp32."""
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}.get(dtype, str(dtype))


def as_json(report: Report) -> dict[str, Any]:
    """The report as plain values, without NaN."""
    return {
        "sound": not report.broken,
        "broken": sorted({check.op for check in report.broken}),
        "seconds": round(report.seconds, 1),
        "environment": report.environment,
        "notes": report.notes if report.environment["gpus"] else [*report.notes, environment.NO_GPU],
        "backends": {
            device: {c.op: {"backend": c.backend, "passed_over": c.passed_over} for c in choices}
            for device, choices in report.choices.items()
        },
        "checks": [_check_as_json(check) for check in report.checks],
        "speeds": [
            speed_as_json(speed) | {"device": device}
            for device, speeds in report.speeds.items()
            for speed in speeds
        ],
    }


def _check_as_json(check: Check) -> dict[str, Any]:
    results = {
        name: {"problem": found.problem, "kept": False}
        if found.problem
        else {"error": found.error, "limit": found.limit, "plain_torch": found.plain, "kept": found.kept}
        for name, found in check.accuracies.items()
    }
    return {
        "case": check.case,
        "op": check.op,
        "dtype": name_of(check.dtype),
        "device": check.device,
        "backends": check.backends,
        "kept": check.kept,
        "results": results,
        "problem": check.problem,
    }


def speed_as_json(speed: Speed) -> dict[str, Any]:
    """One speed as plain values."""
    return {
        "case": speed.case,
        "variant": speed.variant,
        "pass": speed.passes,
        "dtype": name_of(speed.dtype),
        "shape": dict(speed.shape),
        "median_ms": speed.timing.median_ms,
        "best_ms": speed.timing.best_ms,
        "spread": speed.timing.spread,
        "rounds": speed.timing.rounds,
        "clock": speed.timing.clock,
        "bytes": speed.bytes,
        "flops": speed.flops,
        "gb_per_s": speed.gb_per_s,
        "gflop_per_s": speed.gflops,
        "of_copy": speed.of_copy,
        "of_gemm": speed.of_gemm,
    }


def split_ops(text: str) -> list[str]:
    """Op names from a comma-separated list."""
    return [name.strip() for name in text.split(",") if name.strip()]


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; 0 sound, 4 an op breaks its contract, 2 wrong arguments."""
    from megalite_kernels.doctor_tables import as_text

    parser = argparse.ArgumentParser(
        prog="python -m megalite_kernels.doctor", description="Check and time every op on this machine."
    )
    parser.add_argument("--ops", default="", help="comma-separated public ops; all by default")
    parser.add_argument("--device", default="all", help="all (default), cpu or cuda")
    parser.add_argument("--quick", action="store_true", help="check only, time nothing")
    parser.add_argument("--compile", action="store_true", help="time torch.compile too (minutes)")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    arguments = parser.parse_args(argv)
    keep_freed_pages()
    try:
        report = examine(
            split_ops(arguments.ops),
            device=arguments.device,
            quick=arguments.quick,
            with_compile=arguments.compile,
        )
    except ValueError as error:
        parser.error(str(error))
    print(json.dumps(as_json(report), allow_nan=False) if arguments.json else as_text(report))
    return BROKEN_EXIT_CODE if report.broken else 0


if __name__ == "__main__":
    sys.exit(main())
