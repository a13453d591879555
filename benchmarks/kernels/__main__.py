"""All kernel benchmarks, one process each, within a time limit.

    python -m benchmarks.kernels --output benchmarks/results/kernels [--ops rms_norm,attention] [--limit 900]

Ends with a roofline plot beside the records. A benchmark that fails or runs over its share does not stop the
others; the exit code is then 1.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.kernels.common import RESULTS, add_arguments

FOLDER = Path(__file__).resolve().parent
ONE_LIMIT_S = 300.0
"""No single benchmark gets more than this."""


def benchmarks() -> list[str]:
    """Names of the benchmarks here, without "bench_"."""
    return sorted(path.stem.removeprefix("bench_") for path in FOLDER.glob("bench_*.py"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmarks; 0 if all of them measured everything."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description="Time every kernel.")
    add_arguments(parser)
    parser.add_argument("--ops", default="", help="comma-separated benchmarks; all by default")
    parser.add_argument("--limit", type=float, default=1800.0, help="seconds for all of them")
    arguments = parser.parse_args(argv)
    names = [name.strip() for name in arguments.ops.split(",") if name.strip()] or benchmarks()
    if unknown := [name for name in names if name not in benchmarks()]:
        parser.error(f"benchmark {unknown[0]!r} is not known: use some of {', '.join(benchmarks())}")
    output = arguments.output or RESULTS
    options = [
        "--device",
        arguments.device,
        "--dtypes",
        arguments.dtypes,
        "--seconds",
        str(arguments.seconds),
    ]
    options += ["--output", output, *(["--no-compile"] if arguments.no_compile else [])]
    deadline = time.monotonic() + arguments.limit
    failed = [name for name in names if not run(name, options, deadline)]
    plotted = subprocess.run(
        [sys.executable, "-m", "benchmarks.kernels.plot", output], check=False, env=with_paths()
    )
    if plotted.returncode:
        print("no plot was drawn (it needs matplotlib)", file=sys.stderr)
    if failed:
        print(f"not measured in full: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def run(name: str, options: Sequence[str], deadline: float) -> bool:
    """Run one benchmark in its own process; whether it measured everything."""
    left = min(ONE_LIMIT_S, deadline - time.monotonic())
    if left < 1:
        print(f"\n=== {name}: not started, the time is used up", flush=True)
        return False
    print(f"\n=== {name}", flush=True)
    command = [sys.executable, "-m", f"benchmarks.kernels.bench_{name}", *options]
    try:
        return subprocess.run(command, timeout=left, check=False, env=with_paths()).returncode == 0
    except subprocess.TimeoutExpired:
        print(f"=== {name}: stopped after {left:.0f} s; what it had measured is kept", flush=True)
        return False


def with_paths() -> dict[str, str]:
    """The environment, with this checkout on the module path."""
    root = FOLDER.parents[1]
    paths = [str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}


if __name__ == "__main__":
    sys.exit(main())
