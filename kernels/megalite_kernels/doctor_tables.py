"""The doctor's report as tables: rows of text, which the command line may colour, and plain text of them."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from megalite_kernels import environment
from megalite_kernels.backend import Choice, order
from megalite_kernels.cases import CASES
from megalite_kernels.doctor import Check, Report, name_of
from megalite_kernels.speed import BOTH, COMPILED, COPY, EAGER, FORWARD, OURS, PRODUCT, Speed
from megalite_kernels.testing import Accuracy


@dataclass(frozen=True, slots=True)
class Table:
    """Title, columns and rows of text; `bad` are the places of rows that report a failure."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    numbers: tuple[int, ...] = ()
    """Places of columns to align at the right."""
    bad: list[int] = field(default_factory=list)


def tables(report: Report) -> Iterator[Table]:
    """Environment, backends, contracts, speeds: in the order to read them."""
    yield Table("Environment", ("", ""), environment.describe(report.environment))
    for device, choices in report.choices.items():
        yield _backends(device, choices)
    for device in report.choices:
        checks = [check for check in report.checks if check.device == device]
        yield _contracts(device, checks)
        if report.speeds.get(device):
            yield _speeds(device, report)


def conclusion(report: Report) -> list[str]:
    """The verdict, line by line; it names every op that breaks its contract."""
    lines = []
    for check in report.broken:
        where = f"{check.case}, {name_of(check.dtype)}, {check.device}"
        lines.append(f"BROKEN {check.op} ({where}): {check.reason()}")
    cases = len({check.case for check in report.checks})
    if lines:
        names = ", ".join(sorted({check.op for check in report.broken}))
        lines.append(f"Contracts are broken by: {names}. Do not train with these on this machine.")
    else:
        lines.append(f"All contracts are kept: {cases} cases in {report.seconds:.0f} s.")
    lines += [f"Note: {note}." for note in report.notes]
    return lines if report.environment["gpus"] else [*lines, environment.NO_GPU]


def _backends(device: str, choices: tuple[Choice, ...]) -> Table:
    """Ops with one choice and one set of reasons share a row."""
    groups: dict[tuple[str, str], list[str]] = {}
    for choice in choices:
        before = order(device)[: order(device).index(choice.backend)] if choice.backend != "none" else ()
        reasons = {name: choice.passed_over.get(name, "not written for this op") for name in before}
        why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        groups.setdefault((choice.backend, why), []).append(choice.op)
    rows = [(backend, ", ".join(ops), why) for (backend, why), ops in groups.items()]
    title = f"Back-ends on {device}, of which the first that can is used: {', '.join(order(device))}"
    return Table(title, ("runs on", "ops", "passed over"), rows)


def _contracts(device: str, checks: list[Check]) -> Table:
    rows, bad = [], []
    for place, check in enumerate(checks):
        backends = ", ".join(dict.fromkeys(check.backends.values())) or "torch"
        results = (_error(check.worst(gradients=False)), _error(check.worst(gradients=True)))
        verdict = "ok" if check.kept else "BROKEN"
        if not check.kept:
            bad.append(place)
        rows.append((check.case, name_of(check.dtype), backends, *results, verdict))
    title = f"Contracts on {device}: largest error against float64 / what is allowed"
    return Table(title, ("case", "dtype", "ran on", "forward", "backward", ""), rows, (3, 4), bad)


def _error(found: Accuracy | None) -> str:
    if found is None:
        return "-"
    return found.problem or f"{found.error:.1e} / {found.limit:.1e}"


def _speeds(device: str, report: Report) -> Table:
    """One row per case and dtype: both passes side by side."""
    speeds = report.speeds[device]
    found = {(s.case, s.dtype, s.passes, s.variant): s for s in speeds}
    others = [EAGER, COMPILED] if any(speed.variant == COMPILED for speed in speeds) else [EAGER]
    rows = []
    for case, dtype in dict.fromkeys((speed.case, speed.dtype) for speed in speeds):
        shape = " ".join(f"{k}{v}" for k, v in found[case, dtype, FORWARD, OURS].shape.items())
        held_to = "copy" if CASES[case].bound == "memory" else "GEMM"
        row = [case, name_of(dtype), shape, held_to]
        for passes in (FORWARD, BOTH):
            speed = found.get((case, dtype, passes, OURS))
            if speed is None:
                row += ["-"] * (2 + len(others))
                continue
            share = speed.of_copy if held_to == "copy" else speed.of_gemm
            ratios = [found[case, dtype, passes, other].timing.median_ms for other in others]
            times = [f"{other / speed.timing.median_ms:.2f}x" for other in ratios]
            row += [f"{speed.timing.median_ms:.3g}", f"{share:.0%}", *times]
        rows.append(tuple(row))
    names = ["vs torch", "vs compile"][: len(others)]
    columns = ("case", "dtype", "shape", "held to", "forward ms", "of it", *names, "both ms", "of it", *names)
    return Table(_speed_title(device, report), columns, rows, tuple(range(4, len(columns))))


def _speed_title(device: str, report: Report) -> str:
    """On what, how, and against which yardsticks."""
    speeds = report.speeds[device]
    if device == "cuda":
        place = report.environment["gpus"][0]["name"]
    else:
        place = f"{report.environment['cpu']}, {report.environment['threads']} thread(s)"
    return (
        f"Speed on {place}: {speeds[0].timing.clock}, cold caches, medians, forward and forward + backward (both).\n"
        f"Held to a copy of the bytes that must move, or to a matrix product: here {_yardsticks(speeds)}.\n"
        "vs torch: time of plain torch over ours; above 1 ours is faster"
    )


def _scaled(value: float, unit: str) -> str:
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.0f} {unit}"


def _yardsticks(speeds: Sequence[Speed]) -> str:
    """Best copy and matrix products of the run."""
    copies = [s.bytes / s.timing.best_ms / 1e6 for s in speeds if s.variant == COPY]
    parts = [f"best copy {max(copies):.1f} GB/s"] if copies else []
    for dtype in dict.fromkeys(s.dtype for s in speeds if s.variant == PRODUCT):
        rates = [
            s.flops / s.timing.best_ms / 1e6 for s in speeds if s.variant == PRODUCT and s.dtype == dtype
        ]
        parts.append(f"GEMM {name_of(dtype)} {_scaled(1e9 * max(rates), 'F/s')}")
    return ", ".join(parts)


def as_text(report: Report, width: int = 120) -> str:
    """All tables and the conclusion as plain text."""
    parts = [_plain(table, width) for table in tables(report)]
    return "\n\n".join([*parts, "\n".join(conclusion(report))])


def _plain(table: Table, width: int) -> str:
    """Columns side by side; the text of cells wider than a third of the line is wrapped."""
    rows = [table.columns, *table.rows] if any(table.columns) else list(table.rows)
    widths = [max(len(row[place]) for row in rows) for place in range(len(table.columns))]
    if sum(widths) > width:
        widths = [min(one, width // 3) if one > 30 else one for one in widths]
    lines = [table.title]
    for row in rows:
        cells = [textwrap.wrap(cell, one) or [""] for cell, one in zip(row, widths, strict=True)]
        for line in itertools.zip_longest(*cells, fillvalue=""):
            aligned = [
                text.rjust(one) if place in table.numbers else text.ljust(one)
                for place, (text, one) in enumerate(zip(line, widths, strict=True))
            ]
            lines.append(("  " + "  ".join(aligned)).rstrip())
    return "\n".join(lines)
