"""The same step by torch.profiler, sorted by the same table: does it see what the clock saw?

The profiler's records are nested; the outermost op that the table knows counts, as the clock only sees that one.
What no op shows is marked for it: the trainer's phases, and waits for collectives.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function

from megalite.layers.recompute import RECOMPUTE_MARK
from megalite.train.waterfall import BUBBLE, DATA, LABELS, RECOMPUTE, StepTimes, mean_times
from megalite.train.waterfall_clock import PhaseTimer
from megalite.train.waterfall_ops import (
    COMMUNICATION,
    HEAD,
    HOST,
    MEMORY,
    NONE,
    OPTIMIZER,
    OTHER,
    Sizes,
    kind_of,
)

if TYPE_CHECKING:
    from megalite.train.waterfall_run import Plan

STEP, MARK, WAIT = "megalite::step", "megalite::mark ", "megalite::wait"


@dataclass(frozen=True, slots=True)
class ProfiledStep:
    """Times by part; all communication and the bubble together as "communication"."""

    total_ms: float
    ms: dict[str, float]


def profile_step(
    step: Callable[[], object], device: torch.device, sizes: Sizes
) -> tuple[Callable[[], ProfiledStep], PhaseTimer]:
    """What runs `step` under the profiler, and the timer that the trainer needs meanwhile."""

    def mark(phase: str) -> None:
        with record_function(MARK + phase):
            pass

    def profiled() -> ProfiledStep:
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        with profile(activities=activities, record_shapes=True) as records, _marked_waits():
            with record_function(STEP):
                step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        return sort_events(list(records.events() or []), sizes, on_device=device.type == "cuda")

    return profiled, PhaseTimer(device, mark)


@contextlib.contextmanager
def _marked_waits() -> Iterator[None]:
    """`Work.wait` stands in the profile."""
    if not dist.is_available():
        yield
        return
    original = dist.Work.wait

    def wait(work: Any, *args: Any, **kwargs: Any) -> Any:
        with record_function(WAIT):
            return original(work, *args, **kwargs)

    dist.Work.wait = wait  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        dist.Work.wait = original  # type: ignore[method-assign]


def sort_events(events: Sequence[Any], sizes: Sizes, *, on_device: bool) -> ProfiledStep:
    """Times by part of one profiled step."""
    host = [event for event in events if event.device_type.name == "CPU"]
    step = next(event for event in host if event.name == STEP)
    marks = sorted((e.time_range.start, e.name.removeprefix(MARK)) for e in host if e.name.startswith(MARK))
    ms = dict.fromkeys((*LABELS, COMMUNICATION), 0.0)
    for event in host:
        at = event.time_range.start
        if not step.time_range.start <= at <= step.time_range.end or event.name.startswith(MARK):
            continue
        phase = next((name for time, name in marks if time >= at), "")
        kind = _kind(event, sizes)
        if kind in (OTHER, NONE) or phase == "data_wait" or _inside_known(event, sizes):
            continue
        part = kind if kind in (COMMUNICATION, HOST) else RECOMPUTE if _again(event) else kind
        if phase == "optimizer" and part not in (COMMUNICATION, HOST):
            part = OPTIMIZER
        ms[part] += (event.device_time_total if on_device else event.cpu_time_total) / 1e3
    if marks and marks[0][1] == "data_wait":
        ms[DATA] = (marks[0][0] - step.time_range.start) / 1e3
    total = step.cpu_time_total / 1e3
    if not on_device:
        ms[HOST] += total - sum(ms.values())
    return ProfiledStep(total, ms)


def _kind(event: Any, sizes: Sizes) -> str:
    if event.name == WAIT:
        return COMMUNICATION
    space, found, name = event.name.partition("::")
    if not found:
        return OTHER
    kind = kind_of(f"{space}.{name}").kind
    if kind == OTHER and space == "aten":
        kind = _kind_by_overloads(name)
    if kind == MEMORY:
        rows = sizes.vocab_rows - sizes.tokens
        if any(len(shape) == 2 and shape[0] in rows for shape in event.input_shapes or ()):
            return HEAD
    return kind


def _kind_by_overloads(name: str) -> str:
    packet = getattr(torch.ops.aten, name, None)
    overloads = [getattr(packet, key) for key in packet.overloads()] if packet is not None else []
    kinds = [kind_of(f"aten.{name}", func).kind for func in overloads]
    return next((kind for kind in kinds if kind != OTHER), OTHER)


def _inside_known(event: Any, sizes: Sizes) -> bool:
    """An op within an op that counts already."""
    parent = event.cpu_parent
    while parent is not None:
        if _kind(parent, sizes) not in (OTHER, NONE):
            return True
        parent = parent.cpu_parent
    return False


def _again(event: Any) -> bool:
    parent = event.cpu_parent
    while parent is not None:
        if parent.name == RECOMPUTE_MARK:
            return True
        parent = parent.cpu_parent
    return False


def mean_profile(ranks: Sequence[Sequence[ProfiledStep]], times: StepTimes, plan: Plan) -> dict[str, float]:
    """Part → profiler's time: mean of the middle half of the steps, and of the ranks.

    The profiler only knows the time of day. Where the clock reads the process's own time, its figures are scaled by
    one factor, so that all ops together take as long as by the clock.
    """
    steps = [_middle(rank) for rank in ranks]
    mean = mean_times([StepTimes(s.total_ms, 0.0, s.ms) for s in steps])
    found = {key: mean.ms[key] for key in mean.ms if key != COMMUNICATION}
    talk = [key for key in times.ms if key.startswith(COMMUNICATION) or key == BUBBLE]
    whole = sum(times.ms[key] for key in talk)
    for key in talk:  # the profiler does not tell axes apart
        found[key] = mean.ms[COMMUNICATION] * times.ms[key] / whole if whole else 0.0
    if plan.process:
        ops = [key for key in times.ms if key not in (HOST, DATA, *talk)]
        factor = sum(times.ms[key] for key in ops) / sum(found[key] for key in ops)
        found = {key: value * factor for key, value in found.items()}
    return found


def _middle(steps: Sequence[ProfiledStep]) -> ProfiledStep:
    ordered = sorted(steps, key=lambda step: step.total_ms)
    cut = len(ordered) // 4
    chosen = ordered[cut : len(ordered) - cut]
    mean = mean_times([StepTimes(s.total_ms, 0.0, s.ms) for s in chosen])
    return ProfiledStep(mean.total_ms, mean.ms)
