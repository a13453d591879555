"""``megalite pretrain [CONFIG.toml] [--any.field value ...]``: train a base model, or continue a run."""

from __future__ import annotations

import json
import shlex
import sys

from megalite.cli.config_file import parse_pretrain, write_toml
from megalite.errors import ExitCode
from megalite.parallel.failure import ends_together
from megalite.parallel.mesh import close_mesh, make_mesh


def main(argv: list[str]) -> int:
    """Run the command; returns the exit code."""
    config, as_json = parse_pretrain(argv)
    from megalite.train.run import run_pretraining

    mesh = make_mesh(config.parallel, config.train.device)
    command = shlex.join(["megalite", "pretrain", *argv])
    with ends_together(mesh.watch):
        outcome = run_pretraining(config, mesh, command=command, config_toml=write_toml)
        close_mesh(mesh)
    if mesh.is_first and outcome.code is ExitCode.DONE:
        _print_summary(outcome.result)
    if mesh.is_first and outcome.code is ExitCode.PREEMPTED:
        print("preempted: the run is saved, run the same command again to continue", file=sys.stderr)
    if mesh.is_first and as_json and outcome.result:
        print(json.dumps(outcome.result), flush=True)
    return outcome.code


def _print_summary(result: dict[str, object]) -> None:
    def number(key: str, form: str) -> str:
        value = result[key]
        return "n/a" if value is None else format(value, form)

    print(
        f"trained {result['steps']:,} steps on {result['tokens']:,} tokens "
        f"(set-up {number('setup_seconds', '.1f')} s, training {number('train_seconds', '.0f')} s): "
        f"{number('tokens_per_s', ',.0f')} tokens/s, MFU {number('mfu_causal', '.1%')} causal, "
        f"{number('mfu_full', '.1%')} full\n"
        f"validation {number('val_bits_per_byte', '.4f')} bits per byte "
        f"(gzip -9: {number('gzip_bits_per_byte', '.4f')}, xz -9: {number('xz_bits_per_byte', '.4f')})\n"
        f"model   {result['checkpoint']}/weights\n"
        f"report  {result['report']}\n"
        f"samples {result['run_dir']}/evals.jsonl"
    )
