"""``megalite replay RUN --step N``: repeat one step of a run and find the first non-finite value in it."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from megalite.cli.config_file import config_from_file, parse
from megalite.errors import ExitCode, UserError
from megalite.parallel.mesh import close_mesh, make_mesh


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Repeat one step from the checkpoint before it; writes nothing."""

    run: Annotated[str, tyro.conf.Positional]
    """Run directory."""
    step: int
    """Step to repeat, as numbered in metrics.jsonl (from 1)."""
    json: bool = False
    """Print one JSON object as the last line."""


def main(argv: list[str]) -> int:
    """Run the command; returns the exit code."""
    arguments = parse(Arguments, argv, prog="megalite replay")
    file = Path(arguments.run) / "config.toml"
    if not file.exists():
        raise UserError(f"{arguments.run} is not a run directory (no config.toml)")
    config = dataclasses.replace(config_from_file(file), run_dir=arguments.run)
    if not 1 <= arguments.step <= config.train.steps:
        raise UserError(f"--step={arguments.step} must be between 1 and train.steps={config.train.steps}")
    from megalite.train.replay import replay

    mesh = make_mesh(config.parallel, config.train.device)
    findings, _ = replay(config, mesh, arguments.step)
    close_mesh(mesh)
    if not mesh.is_first:
        return ExitCode.DONE
    print(
        f"step {findings.step} (from the checkpoint of step {findings.replayed_from}): loss {findings.loss!r}, "
        f"grad norm {findings.grad_norm!r}, {'skipped' if findings.skipped else 'applied'}"
    )
    if findings.first_bad_module:
        print(f"first non-finite output: {findings.first_bad_module} in micro-batch {findings.micro_batch}")
    for name in findings.bad_parameters:
        print(f"non-finite value or gradient: {name}")
    print(f"its documents: megalite data who {arguments.run} --step {findings.step}")
    if arguments.json:
        print(json.dumps(dataclasses.asdict(findings)))
    return ExitCode.DONE
