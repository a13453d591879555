"""What `benchmarks/check.py` runs again, and which ratios of the records it compares."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from benchmarks.records import (
    KERNELS,
    Machine,
    Record,
    machine_of,
    newest,
    ours_and_peers,
    read,
    throughput,
    throughput_key,
)


class Ratio(NamedTuple):
    """More is better."""

    value: float
    spread: float
    """Relative, of the times that it is made of."""


@dataclass(frozen=True, slots=True)
class Target:
    """One benchmark to run again."""

    name: str
    committed: Sequence[Record]
    command: Sequence[str]
    """Takes --output besides."""
    output: str
    """What to append to the folder of that option; empty for the folder itself."""
    ratios: Callable[[Sequence[Record], Sequence[Record]], dict[str, Ratio]]
    """Of the first records, in terms that the second ones have too."""


# --- training throughput ---------------------------------------------------------------------------------------


def throughput_targets(
    results: Path, shapes: Iterable[str], peers: int, rounds: int, here: Machine
) -> list[Target]:
    """Comparisons of trainers that were recorded on this kind of machine, with the strongest peers of each alone."""
    wanted = {tuple(shape.split("/")) for shape in shapes}
    found = [
        record
        for record in throughput(results, repeated=True)
        if (record["preset"], record["precision"]) in wanted
        and not record.get("layout")
        and machine_of(record) == here
    ]
    # By the wall clock if both clocks were used: that is what a user waits for.
    clocks = newest(
        sorted(found, key=lambda r: r["clock"] == "wall"), lambda r: (r["preset"], r["precision"])
    )
    return [throughput_target(record, peers, rounds) for record in clocks.values()]


def throughput_target(record: Record, peers: int, rounds: int) -> Target:
    """How one comparison is run again."""
    ours, others = ours_and_peers(record)
    names = [contender["name"] for contender in [*ours[:1], *others[:peers]]]
    samples = record["tokens_per_step"] // record["seq_length"]
    options = {
        "--preset": record["preset"],
        "--precision": record["precision"],
        "--seq-length": record["seq_length"],
        "--micro-batch-size": record["micro_batch_size"],
        "--global-batch-size": samples,
        "--threads": record["threads"],
        "--clock": record["clock"],
        "--rounds": rounds,
    }
    words = [str(word) for pair in options.items() for word in pair]
    command = ["benchmarks/train_throughput.py", *words, "--contenders", *names]
    name = f"{record['preset']} {record['precision']}"
    return Target(name, [record], command, "throughput.jsonl", throughput_ratios)


def throughput_ratios(records: Sequence[Record], others: Sequence[Record]) -> dict[str, Ratio]:
    """Of the last record: our fastest contender that the other run has too, beside the best common peer."""
    record, other = records[-1], others[-1]
    names = {contender["name"] for contender in other["contenders"]}
    ours, peers = ([c for c in some if c["name"] in names] for some in ours_and_peers(record))
    if not ours or throughput_key(record) != throughput_key(other):
        return {}
    mine = ours[0]
    spread = step_spread(mine)
    found = {"share of the GEMM peak": Ratio(mine["gemm_fraction"], spread)}
    if peers:
        best = peers[0]
        speed = Ratio(mine["tokens_per_s"] / best["tokens_per_s"], math.hypot(spread, step_spread(best)))
        found["tokens/s / best peer"] = speed
        theirs, held = (contender.get("memory_above_state_bytes") for contender in (best, mine))
        if theirs and held:
            found["memory above state, best peer / ours"] = Ratio(theirs / held, 0.0)
    return found


def step_spread(contender: Record) -> float:
    """Half of the middle 80 % of the steps, over the median."""
    return float((contender["step_ms_p90"] - contender["step_ms_p10"]) / 2 / contender["step_ms_p50"])


# --- kernels ---------------------------------------------------------------------------------------------------


def kernel_targets(
    results: Path, ops: Mapping[str, str], dtypes: str, seconds: float, here: Machine
) -> list[Target]:
    """Benchmarks of ops (name to its cases, all if empty) that were recorded on this kind of machine."""
    found = [record for record in read(results / KERNELS) if machine_of(record) == here]
    targets = []
    for op, cases in ops.items():
        committed = [record for record in found if record["op"].rstrip("_") == op]
        options = ["--dtypes", dtypes, "--seconds", str(seconds), *(["--cases", cases] if cases else [])]
        if committed:
            command = ["-m", f"benchmarks.kernels.bench_{op}", *options]
            targets.append(Target(op, committed, command, "", kernel_ratios))
    return targets


def kernel_ratios(records: Sequence[Record], others: Sequence[Record]) -> dict[str, Ratio]:
    """Of every case, shape and dtype that the other run has too: its baselines' times over ours, in one figure.

    The geometric mean of all baselines: slower code of ours lowers it as much as each of them, while one baseline
    alone moves by a fifth on a busy machine. By the best times, which noise moves least.
    """
    mine, theirs = ({kernel_key(r): r for r in some} for some in (records, others))
    found: dict[str, Ratio] = {}
    for key in mine.keys() & theirs.keys():
        forward_of_more = key.passes == "forward" and key._replace(passes="forward+backward") in mine
        if key.variant != "megalite" or forward_of_more:
            continue
        ours = mine[key]
        parts, spreads = {}, [ours["spread"]]
        by_products = (
            ours["of_gemm"] > ours["of_copy"]
        )  # of the yardstick that bounds the op, the share is larger
        for base in ("torch", "compile") if by_products else ("torch", "compile", "copy"):
            other = key._replace(variant=base)
            if other in mine and other in theirs:
                parts[base] = mine[other]["best_ms"] / ours["best_ms"]
                spreads.append(mine[other]["spread"] / 3)
        if by_products:
            parts["product"] = ours["of_gemm"] * ours["median_ms"] / ours["best_ms"]
        if parts:
            sizes = " ".join(f"{letter}{size}" for letter, size in key.shape)
            name = f"{key.case} {sizes} {key.dtype}, {', '.join(parts)} / ours"
            found[name] = Ratio(statistics.geometric_mean(parts.values()), math.hypot(*spreads))
    return dict(sorted(found.items()))


class KernelKey(NamedTuple):
    """What records share of which a newer one replaces an older one."""

    machine: Machine
    case: str
    shape: tuple[tuple[str, int], ...]
    dtype: str
    passes: str
    variant: str


def kernel_key(record: Record) -> KernelKey:
    """Of a kernel's record."""
    shape = tuple(record["shape"].items())
    names = ("dtype", "pass", "variant")
    return KernelKey(machine_of(record), record["case"], shape, *(record[name] for name in names))
