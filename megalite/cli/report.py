"""``megalite report RUN``: one HTML page about a run, and whether pre-training is helping."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from megalite.train.report import Report, make_report
from megalite.train.verdict_signals import Level

STYLES: dict[Level, str] = {"good": "green", "watch": "yellow", "bad": "bold red", "unknown": "dim"}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Write a self-contained report of a run, finished or not."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of the run, for example runs/NAME."""
    out: Path | None = None
    """File to write; report.html in the run's folder by default."""
    json: bool = False
    """Print one JSON object with the verdict as the last line."""


def main(argv: list[str]) -> int:
    """Run the command; returns its exit code."""
    arguments = tyro.cli(Arguments, args=argv, prog="megalite report")
    report = make_report(arguments.run, arguments.out)
    _show(report)
    if arguments.json:
        print(json.dumps(_summary(report), allow_nan=False))
    return 0


def _show(report: Report) -> None:
    """The verdict on the terminal, on standard error: standard output is for the JSON line."""
    console = Console(stderr=True, highlight=False)
    console.print(report.verdict.sentence, style="bold", markup=False)
    for signal in report.verdict.signals:
        if signal.verdict in ("watch", "bad"):
            console.print(f"{signal.verdict:>7}  ", style=STYLES[signal.verdict], end="")
            console.print(f"{signal.name}: {signal.reason}", markup=False)
    console.print(f"report: {report.path}", markup=False, soft_wrap=True)


def _summary(report: Report) -> dict[str, Any]:
    return {"report": str(report.path), "run": report.records.name, **report.verdict.to_dict()}
