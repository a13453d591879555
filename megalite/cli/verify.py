"""``megalite verify [CONFIG.toml] [--any.field value ...]``: all layouts compute one model, shown on a small one."""

from __future__ import annotations

import dataclasses
import json
import time
from typing import TYPE_CHECKING, Literal

from rich.console import Console

from megalite.cli.config_file import parse_run
from megalite.cli.verify_table import Table, as_json
from megalite.config import RunConfig
from megalite.errors import ExitCode, UserError

if TYPE_CHECKING:
    from megalite.train.verify_layouts import Layout


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerifyArguments(RunConfig):
    """Prove that layouts equal one process: megalite verify [CONFIG.toml] [--any.field value ...]

    The run's model is shrunk to one of the same structure. The same few steps run in every layout of up to
    --processes processes, on packed documents with unequal masks, in float64 and then in the run's type, and are
    compared with one process: losses, gradient norm, every parameter's gradient, and the weights after 3 steps.
    Exit code 0: all are equal; 4: some are not.
    """

    processes: int = 0
    """Most processes of a layout; 0 is 4, or 8 with --full or for a run that needs them, or the number of GPUs."""
    layouts: str = ""
    """Only these: kinds (own, tp, cp, pp, dp, recompute, mixed), names or patterns such as 'tp2*', with commas."""
    dtype: Literal["auto", "fp32", "bf16", "fp8", "float64"] = "auto"
    """Type checked after float64; auto is that of the run (train.precision); float64 checks no other."""
    full: bool = False
    """Layouts of up to 8 processes."""
    list: bool = False
    """Name the layouts and run none."""
    timeout: float = 120.0
    """Seconds after which a layout counts as hanging."""
    json: bool = False
    """Print one JSON object and nothing else."""


def main(argv: list[str]) -> int:
    """Run the command; returns the exit code."""
    arguments, config = parse_run(VerifyArguments, argv, prog="megalite verify")
    if arguments.processes < 0:
        raise UserError(f"--processes {arguments.processes} must not be negative")
    if arguments.processes == 1:
        raise UserError("--processes 1 leaves no layout to compare with one process: give at least 2")
    if arguments.timeout <= 0:
        raise UserError(f"--timeout {arguments.timeout} must be greater than 0 seconds")
    config.parallel.validate_model(config.model)
    import torch

    # One GPU is no place for several ranks, and a run that is meant for GPUs can be checked without any.
    gpus = torch.cuda.device_count() if config.train.device != "cpu" and torch.cuda.is_available() else 0
    device = "cuda" if gpus > 1 else "cpu"
    processes = _processes(arguments, config, gpus if device == "cuda" else 0)
    layouts = _layouts(arguments, config, processes)
    if arguments.list:
        for layout in layouts:
            print(f"{layout.group:<10} {layout.world:>2} processes   {layout.name}")
        return ExitCode.DONE
    return _verify(arguments, config, layouts, device)


def _processes(arguments: VerifyArguments, config: RunConfig, gpus: int) -> int:
    """Most processes of a layout."""
    if gpus and arguments.processes > gpus:
        raise UserError(
            f"--processes {arguments.processes}: this machine shows {gpus} GPUs, and each process needs one: "
            f"take at most {gpus}, or --train.device cpu"
        )
    if arguments.processes:
        return arguments.processes
    if gpus:
        return min(gpus, 8)
    parallel = config.parallel
    return 8 if arguments.full or parallel.tp * parallel.cp * parallel.pp > 4 else 4


def _layouts(arguments: VerifyArguments, config: RunConfig, processes: int) -> list[Layout]:
    from megalite.train.verify_layouts import all_layouts, choose, own_layout

    layouts = all_layouts(processes)
    own = own_layout(config, processes)
    if own is not None:
        same = {layout.name for layout in layouts} & {own.name.removeprefix("own: ")}
        layouts = [own, *(layout for layout in layouts if layout.name not in same)]
    return choose(layouts, arguments.layouts)


def _verify(arguments: VerifyArguments, config: RunConfig, layouts: list[Layout], device: str) -> int:
    import torch

    from megalite.train.verify import Verification, preloaded
    from megalite.train.verify_pool import Pool

    began = time.perf_counter()
    torch.set_num_threads(1)  # one process of a tiny model; the ranks want the cores
    world = max(layout.world for layout in layouts)
    results = []
    preload = preloaded(layouts)
    with Pool(world, device=device, timeout_s=arguments.timeout, preload=preload) as pool:
        pool.start()
        verification = Verification(config.model, layouts, _dtype(arguments, config, device), device)
        console = Console(highlight=False, stderr=arguments.json)
        table = Table(console, layouts, verification.dtypes, quiet=arguments.json)
        table.header(config, verification.small, world, device)
        results.append(verification.one_process())
        table.row(results[0])
        with console.status("") as status:
            for number, layout in enumerate(layouts, 1):
                status.update(f"{layout.name}   {number} of {len(layouts)}")
                results.append(verification.run(layout, pool))
                table.row(results[-1])
    seconds = time.perf_counter() - began
    table.summary(results, seconds)
    if arguments.json:
        print(json.dumps(as_json(config, verification, results, seconds), allow_nan=False))
    good = all(result.status in ("equal", "skipped") for result in results)
    return ExitCode.DONE if good else ExitCode.BROKEN_CONTRACT


def _dtype(arguments: VerifyArguments, config: RunConfig, device: str) -> str:
    """Type that is checked after float64."""
    import torch

    from megalite.train.flops import choose_precision

    wanted = config.train.precision if arguments.dtype == "auto" else arguments.dtype
    if wanted == "fp8":
        return f"fp8-{config.train.fp8_scaling}"
    if wanted != "auto":
        return wanted
    if config.train.device == "cuda":
        return "bf16"  # what a run takes on any GPU of today, wherever this is checked
    return choose_precision("auto", torch.device(device)).chosen
