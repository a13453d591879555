"""The one timer: variants take turns, each figure is the median with its best and its spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Timing:
    """Milliseconds per call."""

    median_ms: float
    best_ms: float
    spread: float
    """(90th percentile - median) / median."""


def measure(
    variants: Mapping[str, Callable[[], object]], *, rounds: int = 20, device: str = "cpu"
) -> dict[str, Timing]:
    """Time each variant once a round, in turns, so that a slow moment of the machine hits all of them.

    On one CPU thread the process's own time is read (unmoved by other programs), on several the wall clock, on
    a GPU events.

    Args:
        variants: name to a function of no arguments; each is called once before, to warm up.
        rounds: timed calls of each, at least 1.

    Raises:
        ValueError: no variant, or rounds below 1.
    """
    if not variants or rounds < 1:
        raise ValueError(f"rounds={rounds} of {len(variants)} variants: give at least one of each")
    for function in variants.values():
        function()
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, function in variants.items():
            samples[name].append(_once_cuda(function) if device == "cuda" else _once_cpu(function))
    return {name: _summary(values) for name, values in samples.items()}


def _once_cpu(function: Callable[[], object]) -> float:
    clock = time.process_time_ns if torch.get_num_threads() == 1 else time.perf_counter_ns
    start = clock()
    function()
    return (clock() - start) / 1e6


def _once_cuda(function: Callable[[], object]) -> float:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    function()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop))


def _summary(values: list[float]) -> Timing:
    ordered = sorted(values)
    median = statistics.median(ordered)
    high = ordered[min(len(ordered) - 1, round(0.9 * (len(ordered) - 1)))]
    return Timing(median, ordered[0], (high - median) / median if median else 0.0)
