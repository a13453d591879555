"""``megalite doctor``: is this installation sound on this machine, and how fast are its kernels?"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal

from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from megalite.cli.config_file import parse
from megalite.errors import ExitCode, UserError
from megalite_kernels.doctor import Report, as_json, examine, split_ops
from megalite_kernels.doctor_tables import Table, conclusion, tables
from megalite_kernels.memory import keep_freed_pages

STYLES = {"ok": "green", "BROKEN": "bold red"}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Check forward and backward of every kernel against float64 on this machine, and time them.

    Times are held to a copy of the bytes that must move or to a matrix product, measured in the same run, and
    compared with plain torch. Takes about a minute; the exit code is 4 if a kernel breaks its contract.
    """

    ops: str = ""
    """Comma-separated ops, for example rms_norm,attention; all by default."""
    device: Literal["all", "cpu", "cuda"] = "all"
    """Where to look; all is the CPU, and the GPU if there is one."""
    quick: bool = False
    """Check only, time nothing."""
    compile: bool = False
    """Time torch.compile too (takes minutes)."""
    json: bool = False
    """Print one JSON object and nothing else."""


def main(argv: list[str]) -> int:
    """Run the command; returns its exit code."""
    arguments = parse(Arguments, argv, prog="megalite doctor")
    keep_freed_pages()
    errors = Console(stderr=True)
    try:
        with errors.status("looking at this machine") as status:
            report = examine(
                split_ops(arguments.ops),
                device=arguments.device,
                quick=arguments.quick,
                with_compile=arguments.compile,
                progress=status.update,
            )
    except ValueError as error:
        raise UserError(str(error)) from None
    if arguments.json:
        print(json.dumps(as_json(report), allow_nan=False))
    else:
        _show(report)
    return ExitCode.BROKEN_CONTRACT if report.broken else ExitCode.DONE


def _show(report: Report) -> None:
    console = Console(highlight=False)
    for table in tables(report):
        console.print(_rich(table))
        console.print()
    style = "bold red" if report.broken else "bold green"
    for line in conclusion(report):
        style = "" if line.startswith(("Note", "GPU")) else style
        console.print(line, style=style, markup=False, soft_wrap=True)


def _rich(table: Table) -> RichTable:
    titled = any(table.columns)
    drawn = RichTable(
        title=table.title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_header=titled,
        pad_edge=False,
    )  # fmt: skip
    for place, name in enumerate(table.columns):
        number = place in table.numbers
        drawn.add_column(
            name,
            justify="right" if number else "left",
            overflow="fold",
            no_wrap=number or (place == 0 and len(table.columns) > 4),
        )
    for place, row in enumerate(table.rows):
        last = STYLES.get(row[-1])
        cells = [*row[:-1], f"[{last}]{row[-1]}[/]" if last else row[-1].replace("[", "\\[")]
        drawn.add_row(*cells, style="red" if place in table.bad else None)
    return drawn
