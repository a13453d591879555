"""Does the training step gain what the kernels gain? Each op by itself, and the whole step, in one run.

    python benchmarks/step_savings.py --preset tiny --output benchmarks/results/step_savings.jsonl

Trains with the kernels that are chosen by default and with plain torch (the back-ends `sdpa` and `reference`)
in turns, step by step. The calls of one step are recorded, then every different call is timed alone on both, its
data out of the caches as in the step, and the differences, times the number of calls, are summed: the step should
get shorter by that.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import tyro
from torch.utils._python_dispatch import TorchDispatchMode
from train_throughput import Arguments as Throughput
from train_throughput import open_session

from megalite.train.run import run_facts
from megalite.train.setup import Session
from megalite_kernels import use_backend
from megalite_kernels.timing import measure

PLAIN = ("sdpa", "reference")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments(Throughput):
    """Compare the step's gain with the sum of the ops' gains."""

    preset: str = "tiny"
    """Model preset."""
    seq_length: int = 256
    """Tokens per sample."""
    micro_batch_size: int = 16
    """Samples per forward and backward pass."""
    precision: str = "auto"
    """bf16, fp32, or auto: bf16 where its matrix product is worth it."""
    document_tokens: int = 1000
    """Mean length of documents, at whose ends attention ends."""
    steps: int = 12
    """Measured steps of each kind."""
    warmup: int = 2
    """Steps of each kind before."""
    rounds: int = 15
    """Timed calls of each op on each side."""
    output: str = ""
    """JSONL file to append the record to."""


class Recorder(TorchDispatchMode):
    """Counts the calls of our ops by arguments, and keeps a copy of the arguments of the first of each."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.calls: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "megalite":
            key = f"{func.name()}({', '.join(described(arg) for arg in args)})"
            self.counts[key] += 1
            if key not in self.calls:
                self.calls[key] = (func, tuple(copied(arg) for arg in args))
        return func(*args, **(kwargs or {}))


def described(value: Any) -> str:
    """Shape and dtype of tensors, the value of anything else."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return (
        "[" + ", ".join(described(v) for v in value) + "]"
        if isinstance(value, (list, tuple))
        else repr(value)
    )


def copied(value: Any) -> Any:
    """Tensors with their strides, so that views of fused projections stay views."""
    if isinstance(value, torch.Tensor):
        storage = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
        return storage.copy_(value)
    return [copied(v) for v in value] if isinstance(value, (list, tuple)) else value


@contextmanager
def plain() -> Iterator[None]:
    """Every op on plain torch."""
    with use_backend(*PLAIN):
        yield


def time_steps(session: Session, arguments: Arguments) -> dict[str, list[float]]:
    """Milliseconds of the measured steps, ours and plain torch's taking turns."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {"ours": [], "plain": []}
    for step in range(arguments.warmup + arguments.steps):
        for offset, (name, backend) in enumerate((("ours", nullcontext), ("plain", plain))):
            start = clock()
            with backend():
                session.trainer.train_step(2 * step + offset, session.stop)
            times[name].append((clock() - start) * 1e3)
    return {name: values[arguments.warmup :] for name, values in times.items()}


def time_calls(recorder: Recorder, rounds: int) -> list[dict[str, Any]]:
    """Each different call alone, on both sides: milliseconds, and what a step saves by it."""
    rows = []
    for key, (function, args) in recorder.calls.items():

        def on_plain(function: Any = function, args: Any = args) -> None:
            with plain():
                function(*args)

        result = measure(
            {"ours": lambda f=function, a=args: f(*a), "plain": on_plain}, rounds=rounds, cold=True
        )
        ours, theirs = result["ours"].median_ms, result["plain"].median_ms
        saving = (theirs - ours) * recorder.counts[key]
        rows.append(
            {
                "call": key,
                "count": recorder.counts[key],
                "ours_ms": ours,
                "plain_ms": theirs,
                "saved_ms": saving,
            }
        )
    return sorted(rows, key=lambda row: -row["saved_ms"])


def compare(arguments: Arguments, folder: Path) -> dict[str, Any]:
    """The record: step times, calls, and the ratio of the step's saving to the sum of the calls' savings."""
    steps = 2 * (arguments.warmup + arguments.steps) + 1
    with open_session(arguments, folder, steps) as session:
        facts = run_facts(session, shlex.join(["python", *sys.argv]), 0.0)
        times = time_steps(session, arguments)
        with Recorder() as recorder:
            session.trainer.train_step(steps - 1, session.stop)
        calls = time_calls(recorder, arguments.rounds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    saved = medians["plain"] - medians["ours"]
    expected = sum(row["saved_ms"] for row in calls)
    return {
        "benchmark": "step_savings",
        "name": arguments.preset,
        "step_ms_ours": medians["ours"],
        "step_ms_plain": medians["plain"],
        "step_saved_ms": saved,
        "calls_saved_ms": expected,
        "step_over_calls": saved / expected,
        "step_ms_all": times,
        "calls": calls,
        **{key: facts[key] for key in ("precision", "machine", "versions", "commit", "command")},
    }


def main() -> None:
    """Measure, print a table and the record, and append it to the output."""
    arguments = tyro.cli(Arguments)
    with tempfile.TemporaryDirectory() as folder:
        record = compare(arguments, Path(folder))
    for row in record["calls"]:
        print(
            f"{row['saved_ms']:9.2f} ms saved: {row['count']:4d} x ({row['plain_ms']:.3f} -> {row['ours_ms']:.3f} ms) "
            f"{row['call'][:150]}"
        )
    print(
        f"step {record['step_ms_plain']:.1f} -> {record['step_ms_ours']:.1f} ms: {record['step_saved_ms']:.1f} ms "
        f"saved, the calls alone {record['calls_saved_ms']:.1f} ms: ratio {record['step_over_calls']:.2f}"
    )
    if arguments.output:
        Path(arguments.output).parent.mkdir(parents=True, exist_ok=True)
        with open(arguments.output, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
