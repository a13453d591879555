"""From the peak of the machine down to the measured MFU: where the time of a step goes, part by part.

    step = ideal + lost:   ideal = FLOPs of the model (causal convention) / peak,   MFU = ideal / step
    lost = matrix products above their ideal + attention above its ideal + loss head above its ideal
         + memory-bound ops + optimizer + recomputation + exposed communication + pipeline bubble
         + data wait + host overhead + ops of no known kind + unexplained

Each part is a time, and the same share of the step is what it costs of the MFU, so the parts sum to 100 % exactly.

- The ideal is that of the convention, the same in every layout: what a layout does twice (shared key/value heads, the
  head's logits where they are made again, scores in attention's backward pass) is a loss. Padding rows of the
  vocabulary are never multiplied. Document boundaries shorten attention, which the convention does not see, so
  packed short documents can bring attention below its "ideal": the loss is then negative.
- Times of ops come from steps under the clock (`waterfall_clock`), the step from plain ones that took turns with them.
  What the clock takes is measured at each op and left out; if it were wrong, the parts would not sum to the plain
  step: the difference is "unexplained".
- Host overhead is the time in no op, wait or load, and the ops that only make views. On a GPU the clocked steps run
  from a filled queue, so the host's part is what the plain step takes longer than that.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megalite.train.flops import FlopsPerToken, Peak
from megalite.train.waterfall_clock import Clock, Stamp, StepStamps, own_ms
from megalite.train.waterfall_ops import (
    ATTENTION,
    COMMUNICATION,
    FP8_PRODUCT,
    GEMM,
    HEAD,
    HOST,
    MEMORY,
    NONE,
    OPTIMIZER,
    OTHER,
)

RECOMPUTE, BUBBLE, DATA, UNEXPLAINED = "recompute", "bubble", "data", "unexplained"
AXES = ("tp", "cp", "dp", "pp", "all")
LABELS = {
    GEMM: "GEMM shape inefficiency",
    ATTENTION: "attention",
    MEMORY: "memory-bound kernels",
    HEAD: "loss head",
    OPTIMIZER: "optimizer",
    RECOMPUTE: "recompute",
    **{f"{COMMUNICATION}_{axis}": f"exposed {axis} communication" for axis in AXES[:-1]},
    f"{COMMUNICATION}_all": "exposed communication of all ranks",
    BUBBLE: "pipeline bubble",
    DATA: "data wait",
    HOST: "host overhead",
    OTHER: "ops of no known kind",
    UNEXPLAINED: "unexplained",
}
"""Parts in the order in which they are taken from the peak."""
WITH_IDEAL = (GEMM, ATTENTION, HEAD)


@dataclass(slots=True)
class OpSum:
    """All calls of one op in a step."""

    kind: str
    calls: float = 0.0
    ms: float = 0.0
    flops: float = 0.0
    bytes: float = 0.0


@dataclass(slots=True)
class StepTimes:
    """One clocked step, taken apart: the parts' times sum to `total_ms` less `clock_ms`."""

    total_ms: float
    clock_ms: float
    """What the clock took."""
    ms: dict[str, float]
    """Part → time; host overhead included on a CPU."""
    ops: dict[tuple[str, str, float], OpSum] = field(default_factory=dict)
    """(name, part, FLOPs of a call) → sum; calls of one shape have the same FLOPs."""


def part_of(stamp: Stamp, phase: str) -> str:
    """Which part the time of an op counts for."""
    kind = stamp.call.kind
    if kind == COMMUNICATION:
        return BUBBLE if stamp.axis == BUBBLE else f"{COMMUNICATION}_{stamp.axis}"
    if kind in (HOST, NONE):
        return HOST
    if stamp.again:
        return RECOMPUTE
    return OPTIMIZER if phase == "optimizer" else kind


def take_apart(step: StepStamps, clock: Clock, transit_ms: float) -> StepTimes:
    """Times of one step's parts.

    Args:
        step: what the clock left behind.
        clock: what it read.
        transit_ms: of `waterfall_clock.transit_ms`.
    """
    events = clock.kind == "events"
    total = clock.ms(step.start, step.end)
    ms = dict.fromkeys((key for key in LABELS if key != UNEXPLAINED), 0.0)
    ops: dict[tuple[str, str, float], OpSum] = {}
    taken, clocked, first, before = 0.0, 0.0, 0, step.start
    for phase, count, reading in [*step.phases, ("", len(step.stamps), step.end)]:
        own = 0.0 if events else sum(own_ms(clock, s) + transit_ms for s in step.stamps[first:count])
        clocked += own
        if phase == "data_wait":
            waited = clock.ms(before, reading) - own
            ms[DATA] += waited
            taken += waited
        else:
            for stamp in step.stamps[first:count]:
                part, spent = part_of(stamp, phase), clock.ms(stamp.start, stamp.end)
                ms[part] += spent
                taken += spent
                _add(ops, stamp, part, spent)
        first, before = count, reading
    ms[HOST] += total - clocked - taken
    return StepTimes(total, clocked, ms, ops)


def _add(ops: dict[tuple[str, str, float], OpSum], stamp: Stamp, part: str, spent: float) -> None:
    call = stamp.call
    found = ops.setdefault((call.name, part, call.flops), OpSum(part))
    found.calls += 1
    found.ms += spent
    found.flops += call.flops
    found.bytes += call.bytes


def middle_half(steps: Sequence[StepTimes]) -> list[StepTimes]:
    """The half of the steps around the median duration: neither lucky nor disturbed ones."""
    ordered = sorted(steps, key=lambda step: step.total_ms - step.clock_ms)
    cut = len(ordered) // 4
    return ordered[cut : len(ordered) - cut]


def mean_times(steps: Iterable[StepTimes]) -> StepTimes:
    """The mean of several steps, or of one step on several ranks."""
    chosen = list(steps)
    n = len(chosen)
    ops: dict[tuple[str, str, float], OpSum] = {}
    for step in chosen:
        for key, one in step.ops.items():
            found = ops.setdefault(key, OpSum(one.kind))
            for name in ("calls", "ms", "flops", "bytes"):
                setattr(found, name, getattr(found, name) + getattr(one, name) / n)
    ms = {key: sum(step.ms[key] for step in chosen) / n for key in chosen[0].ms}
    total, clock = (sum(getattr(s, name) for s in chosen) / n for name in ("total_ms", "clock_ms"))
    return StepTimes(total, clock, ms, ops)


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What the times are held against."""

    peak_tflops: float
    """Of one device: the 100 %."""
    peak_source: str
    peak_fp8_tflops: float = 0.0
    """Of FP8 products, where the run makes them; 0: `peak_tflops`."""
    copy_bytes_per_s: float
    """Of a copy that no cache holds, reads and writes counted."""

    @property
    def peak(self) -> Peak:
        """FLOP/s of one device."""
        return Peak(self.peak_tflops * 1e12, (self.peak_fp8_tflops or self.peak_tflops) * 1e12)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One bar of the waterfall."""

    key: str
    label: str
    ms: float
    """Lost; negative where a part runs below its ideal."""
    share: float
    """Of the step: points of MFU, as a fraction."""
    time_ms: float
    """Spent, the ideal included."""
    ideal_ms: float = 0.0
    floor_ms: float | None = None
    """Memory-bound ops: each input read once and each output written once, at the speed of a copy."""
    profiler_ms: float | None = None
    """`time_ms` by torch.profiler."""

    @property
    def difference(self) -> float | None:
        """The profiler's time against ours, relative; None if it was not asked."""
        if self.profiler_ms is None or self.time_ms <= 0:
            return None
        return self.profiler_ms / self.time_ms - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Waterfall:
    """A step, explained."""

    step_ms: float
    ideal_ms: float
    mfu_causal: float
    mfu_full: float
    parts: tuple[Part, ...]
    """In the order of `LABELS`, with zeros; they and the MFU sum to 1."""
    clock_ms: float
    """What the clock took of its own steps (left out)."""
    clocked_step_ms: float
    machine: Machine
    flops_counted: float
    """FLOPs of matrix products, attention and head that the ops did, recomputation left out; per device and step."""
    flops_model: float
    """Those of the formula (causal)."""
    ops: tuple[dict[str, Any], ...]
    """The ops by time: name, part, calls, ms, FLOPs and bytes of a step."""
    unknown_ops: tuple[str, ...] = ()
    """Names of ops that no line of the table has."""

    def part(self, key: str) -> Part:
        """One part by its key."""
        return next(part for part in self.parts if part.key == key)


def build_waterfall(
    times: StepTimes,
    step_ms: float,
    *,
    flops: FlopsPerToken,
    tokens: float,
    machine: Machine,
    events: bool = False,
    data_ms: float = 0.0,
    profiler_ms: Mapping[str, float] | None = None,
) -> Waterfall:
    """Put the parts together.

    Args:
        times: mean of the clocked steps (and ranks).
        step_ms: the plain step.
        flops: of a token.
        tokens: of a step, for each device.
        machine: peak and bandwidth.
        events: times are of a GPU's filled queue, which holds neither data wait nor the host's part.
        data_ms: data wait of the plain step, then.
        profiler_ms: part → time by the profiler.
    """
    spent = dict(times.ms)
    left = spent.pop(HOST)
    if events:
        spent[DATA], spent[UNEXPLAINED] = data_ms, left
        spent[HOST] = step_ms - sum(spent.values())
    else:
        spent[HOST] = left
        spent[UNEXPLAINED] = step_ms - sum(spent.values())
    ideal = _ideal_ms(flops, tokens, machine)
    whole = sum(ideal.values())
    parts = []
    for key, label in LABELS.items():
        lost = spent[key] - ideal.get(key, 0.0)
        parts.append(
            Part(
                key=key, label=label, ms=lost, share=lost / step_ms, time_ms=spent[key], ideal_ms=ideal.get(key, 0.0),
                floor_ms=_floor(times, key, machine), profiler_ms=(profiler_ms or {}).get(key),
            )
        )  # fmt: skip
    full = flops.full * tokens / flops.mixed_peak(flops.full, machine.peak) * 1e3
    counted = sum(o.flops for (_, part, _), o in times.ops.items() if part in WITH_IDEAL)
    return Waterfall(
        step_ms=step_ms, ideal_ms=whole, mfu_causal=whole / step_ms, mfu_full=full / step_ms,
        parts=tuple(parts), clock_ms=times.clock_ms,
        clocked_step_ms=times.total_ms, machine=machine, flops_counted=counted, flops_model=flops.causal * tokens,
        ops=_list_ops(times), unknown_ops=tuple(sorted({name for name, part, _ in times.ops if part == OTHER})),
    )  # fmt: skip


def _ideal_ms(flops: FlopsPerToken, tokens: float, machine: Machine) -> dict[str, float]:
    """Part → FLOPs of the model over the peak, that of FP8 for products made in it."""
    peak = machine.peak
    attention, head = 0.5 * flops.terms["attention_full"], flops.terms["head"]
    whole = flops.causal / flops.mixed_peak(flops.causal, peak)
    seconds = {ATTENTION: attention / peak.main, HEAD: head / peak.main}
    seconds[GEMM] = whole - sum(seconds.values())
    return {key: 1e3 * value * tokens for key, value in seconds.items()}


def _floor(times: StepTimes, key: str, machine: Machine) -> float | None:
    if key not in (MEMORY, OPTIMIZER):
        return None
    return (
        1e3 * sum(o.bytes for (_, part, _), o in times.ops.items() if part == key) / machine.copy_bytes_per_s
    )


def _list_ops(times: StepTimes) -> tuple[dict[str, Any], ...]:
    rows = [
        {"op": name, "part": part, "calls": o.calls, "ms": o.ms, "flops": o.flops, "bytes": o.bytes}
        for (name, part, _), o in times.ops.items()
        if part != HOST
    ]
    return tuple(sorted(rows, key=lambda row: -row["ms"]))


def best_product_tflops(times: StepTimes) -> float:
    """The best rate of a kind of matrix product in the step, of those that take 1 % of it: ours count for the peak."""
    large = [
        o
        for (name, part, f), o in times.ops.items()
        if part == GEMM and f and name != FP8_PRODUCT and o.ms > 0.01 * times.total_ms
    ]
    return max((o.flops / o.ms / 1e9 for o in large), default=0.0)


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """10th, 50th and 90th percentile."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return ordered[round(0.1 * last)], statistics.median(ordered), ordered[round(0.9 * last)]


MAX_UNEXPLAINED = 0.03
LARGE_PART = 0.05
MAX_DIFFERENCE = 0.10
"""Of the step; of the step, lost or spent; of the time spent: what the waterfall is held to."""


def agreement_problems(waterfall: Waterfall) -> list[str]:
    """What is wrong with a waterfall: too much unexplained, or a large part that the profiler sees differently."""
    rest = abs(waterfall.part(UNEXPLAINED).share) + waterfall.part(OTHER).share
    found = []
    if rest > MAX_UNEXPLAINED:
        found.append(
            f"{rest:.1%} of the step is unexplained or of no known kind (at most {MAX_UNEXPLAINED:.0%})"
        )
    for part in waterfall.parts:
        large = max(abs(part.share), part.time_ms / waterfall.step_ms) >= LARGE_PART
        if part.key == UNEXPLAINED or part.difference is None or not large:
            continue
        if abs(part.difference) > MAX_DIFFERENCE:
            found.append(
                f"{part.label}: {part.time_ms:.1f} ms, by the profiler {part.profiler_ms:.1f} "
                f"({part.difference:+.0%}, at most {MAX_DIFFERENCE:.0%})"
            )
    return found
