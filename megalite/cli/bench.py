"""``megalite bench [CONFIG.toml] [--any.field value ...]``: how fast a run trains here, and where its time goes."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megalite.cli.config_file import parse_run
from megalite.config import RunConfig
from megalite.errors import ExitCode, UserError

if TYPE_CHECKING:
    from megalite.parallel.mesh import Mesh
    from megalite.train.waterfall_run import Bench, Plan

VOCABULARY = 32000
"""Of a model that takes its vocabulary from the data, on made-up data."""
FILE_WIDTH = 130
"""Characters of the table where no terminal says how many there are."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchArguments(RunConfig):
    """Time the training step of a run: megalite bench [CONFIG.toml] [--any.field value ...]

    Trains on the configuration's datasets, or on random tokens where it has none, and keeps nothing. Works under
    torchrun. With --explain it says where the time goes, from the peak of the machine down to the measured MFU.
    """

    rounds: int = 10
    """Measured steps (of each kind)."""
    bench_warmup: int = 2
    """Steps before them."""
    document_tokens: int = 0
    """Mean length of made-up documents; 0 is one endless document, so that attention is never cut short."""
    explain: bool = False
    """Show the waterfall from peak to MFU."""
    check: bool = False
    """Also compare each part with torch.profiler: exit code 4 if one of 5 % or more differs by more than 10 %, or
    more than 3 % of the step is unexplained."""
    clock: Literal["wall", "process"] = "wall"
    """process: this process's own time, which other programs don't move; one CPU thread only, waiting is not seen."""
    draw: str = ""
    """Draw the waterfall into this file: .png, .svg or .pdf."""
    record: str = ""
    """Folder of a run, whose report then shows the waterfall."""
    json: bool = False
    """Print one JSON object as the last line."""


def main(argv: list[str]) -> int:
    """Run the command; returns the exit code."""
    arguments, config = parse_run(BenchArguments, argv, prog="megalite bench")
    arguments = _settle(arguments)
    if arguments.explain and (config.train.compile or config.train.cuda_graph):
        name = "compile" if config.train.compile else "cuda_graph"
        raise UserError(
            f"train.{name}=true: the waterfall stamps ops one by one, which a graph does not show. Explain the run "
            "without it, and time it without --explain"
        )
    from megalite.parallel.failure import ends_together
    from megalite.parallel.mesh import close_mesh, make_mesh

    mesh = make_mesh(config.parallel, config.train.device)
    with ends_together(mesh.watch):
        with tempfile.TemporaryDirectory(prefix="megalite-bench-") as folder:
            result, facts = _measure(arguments, config, mesh, Path(folder))
        first = mesh.is_first
        close_mesh(mesh)
    code = _verdict(arguments, result)
    if first:
        _show(arguments, result, facts | {"command": shlex.join(["megalite", "bench", *argv])})
    return code


def _settle(arguments: BenchArguments) -> BenchArguments:
    """Flags that ask for the waterfall turn it on."""
    if arguments.rounds < 1 or arguments.bench_warmup < 1:
        raise UserError(
            f"--rounds {arguments.rounds} and --bench-warmup {arguments.bench_warmup} must be at least 1"
        )
    if arguments.draw and Path(arguments.draw).suffix.lower() not in (".png", ".svg", ".pdf"):
        raise UserError(f"--draw {arguments.draw}: a drawing ends in .png, .svg or .pdf")
    if arguments.record and not Path(arguments.record).is_dir():
        raise UserError(
            f"--record {arguments.record}: there is no such run folder; give one that pretrain wrote"
        )
    wanted = arguments.explain or arguments.check or bool(arguments.draw) or bool(arguments.record)
    return dataclasses.replace(arguments, explain=wanted)


def _measure(
    arguments: BenchArguments, config: RunConfig, mesh: Mesh, folder: Path
) -> tuple[Bench, dict[str, Any]]:
    import torch
    from rich.console import Console

    from megalite.train.setup import build_session, prepare_process
    from megalite.train.waterfall_run import Plan, bench

    plan = Plan(
        warmup=arguments.bench_warmup, rounds=arguments.rounds, explain=arguments.explain, check=arguments.check,
        process=arguments.clock == "process",
    )  # fmt: skip
    prepare_process(config, mesh)
    if plan.process and (mesh.device.type != "cpu" or torch.get_num_threads() > 1 or mesh.world_size > 1):
        raise UserError("--clock process needs one process with --train.device cpu --train.threads 1")
    session = build_session(_for_bench(arguments, config, plan, mesh, folder), mesh)
    session.trainer.progress.close()
    console = Console(stderr=True, quiet=not mesh.is_first, highlight=False)
    try:
        result = bench(session, plan, lambda text: console.print(text, style="dim"))
        facts = _facts(session)
    finally:
        session.trainer.loader.close()
        session.trainer.tensorboard.close()
    return result, facts


def _for_bench(
    arguments: BenchArguments, config: RunConfig, plan: Plan, mesh: Mesh, folder: Path
) -> RunConfig:
    """The run with as many steps as are measured, without validation, in a folder that is thrown away."""
    from megalite.config import DataConfig, DatasetSpec
    from megalite.train.made_up import write_made_up_data

    steps = plan.steps(mesh.device)
    changed = dataclasses.replace(
        config,
        run_dir=str(folder / "run"),
        train=dataclasses.replace(config.train, steps=steps, rampup_start=0, log_interval=steps + 1),
        eval=dataclasses.replace(config.eval, interval=0),
    )
    if config.data.datasets:
        return changed
    vocabulary = config.model.vocab_size or VOCABULARY
    tokens = (steps + 1) * config.train.global_batch_size * config.train.seq_length
    data = write_made_up_data(
        folder / "data", vocab_size=vocabulary, tokens=tokens, document_tokens=arguments.document_tokens
    )
    return dataclasses.replace(
        changed,
        model=dataclasses.replace(config.model, vocab_size=vocabulary),
        data=DataConfig(datasets=(DatasetSpec(path=str(data)),)),
    )


def _facts(session: Any) -> dict[str, Any]:
    from megalite.train.run import run_facts

    facts = run_facts(session, "", 0.0)
    config = session.config
    kept = ("machine", "versions", "commit", "precision", "flops_per_token_causal", "flops_per_token_full")
    parallel = dataclasses.asdict(config.parallel)
    return {
        "name": config.preset or config.name,
        "seq_length": config.train.seq_length,
        "micro_batch_size": config.train.micro_batch_size,
        "layout": {axis: parallel[axis] for axis in ("tp", "cp", "pp") if parallel[axis] > 1},
        **{key: facts[key] for key in kept},
    }


def _verdict(arguments: BenchArguments, result: Bench) -> int:
    from megalite.train.waterfall import agreement_problems

    if arguments.check and result.waterfall is not None and agreement_problems(result.waterfall):
        return ExitCode.BROKEN_CONTRACT
    return ExitCode.DONE


def _show(arguments: BenchArguments, result: Bench, facts: dict[str, Any]) -> None:
    from rich.console import Console

    from megalite.cli.bench_table import print_bench
    from megalite.train.waterfall_record import as_record

    record = as_record(result, facts)
    console = Console(highlight=False, stderr=arguments.json)
    if not console.is_terminal:
        console.width = max(console.width, FILE_WIDTH)  # a file has no width, the table has
    print_bench(console, result, facts)
    if arguments.draw:
        from megalite.train.waterfall_plot import save_waterfall

        save_waterfall(record, Path(arguments.draw))
        print(f"drawn to {arguments.draw}", file=sys.stderr)
    if arguments.record:
        (Path(arguments.record) / "waterfall.json").write_text(
            json.dumps(record, indent=1) + "\n", encoding="utf-8"
        )
    if arguments.json:
        print(json.dumps(record, allow_nan=False))
