"""The one timer: variants take turns, each figure is the median with its best and its spread.

What a figure means depends on three choices, and each `Timing` says which were made: the clock (the process's
own time on one CPU thread, the wall clock on several, GPU events around a launch or around a CUDA graph), cold
or warm caches, and how many calls one sample holds.
"""

from __future__ import annotations

import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

MIN_SAMPLE_MS = 0.5
"""A warm sample holds as many calls as fill this: reading the process's clock costs about 0.5 us."""
MIN_ROUNDS = 3
"""Rounds that a time budget never cuts."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Milliseconds per call."""

    median_ms: float
    best_ms: float
    spread: float
    """(90th percentile - median) / median."""
    rounds: int = 0
    calls: int = 1
    """Calls in one sample; more than one for short functions in warm caches."""
    clock: str = ""
    """"process time", "wall clock", "events" or "CUDA graph"."""


def measure(
    variants: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 20,
    device: str = "cpu",
    cold: bool = False,
    graphs: bool = False,
    budget_s: float = math.inf,
) -> dict[str, Timing]:
    """Time each variant once a round, in turns, so that a slow moment of the machine hits all of them.

    On one CPU thread the process's own time is read (unmoved by other programs), on several the wall clock, on
    a GPU events.

    Args:
        variants: name to a function of no arguments; each is called once before, to warm up.
        rounds: timed samples of each, at least 1.
        device: type of the device that the work runs on.
        cold: empty the last-level cache before every sample; one call a sample then.
        graphs: on a GPU, capture each variant once and time replays, which leaves launch costs out. A variant
            that can't be captured is timed by events.
        budget_s: no further round once this much time is used, though never fewer than 3.

    Raises:
        ValueError: no variant, or rounds below 1.
    """
    if not variants or rounds < 1:
        raise ValueError(f"rounds={rounds} of {len(variants)} variants: give at least one of each")
    timers = {name: _timer(function, device, graphs) for name, function in variants.items()}
    sweep = cache_sweep(device) if cold else None
    calls = {name: 1 if cold else _calls_per_sample(timer) for name, timer in timers.items()}
    samples: dict[str, list[float]] = {name: [] for name in variants}
    deadline = time.monotonic() + budget_s
    for done in range(rounds):
        if done >= MIN_ROUNDS and time.monotonic() > deadline:
            break
        for name, timer in timers.items():
            if sweep is not None:
                sweep()
            samples[name].append(timer.sample(calls[name]) / calls[name])
    return {name: _summary(samples[name], calls[name], timers[name].clock) for name in variants}


class _Timer:
    """One variant and the clock it is timed by."""

    def __init__(self, function: Callable[[], object], clock: str) -> None:
        self.function = function
        self.clock = clock

    def sample(self, calls: int) -> float:
        """Milliseconds of that many calls."""
        if self.clock in ("events", "CUDA graph"):
            return self._sample_cuda(calls)
        clock = time.process_time_ns if self.clock == "process time" else time.perf_counter_ns
        start = clock()
        for _ in range(calls):
            self.function()
        return (clock() - start) / 1e6

    def _sample_cuda(self, calls: int) -> float:
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(calls):
            self.function()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop))


def _timer(function: Callable[[], object], device: str, graphs: bool) -> _Timer:
    function()  # warm-up: compiles, allocates, pages in
    if device != "cuda":
        return _Timer(function, "process time" if torch.get_num_threads() == 1 else "wall clock")
    replay = _captured(function) if graphs else None
    return _Timer(function, "events") if replay is None else _Timer(replay, "CUDA graph")


def _captured(function: Callable[[], object]) -> Callable[[], object] | None:
    """Replay of the function as a CUDA graph, or None if it can't be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            for _ in range(3):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
    except RuntimeError:  # a host synchronisation, an allocation outside the pool: events still work
        torch.cuda.synchronize()
        return None
    return graph.replay


def _calls_per_sample(timer: _Timer) -> int:
    once = timer.sample(1)
    return 1 if once >= MIN_SAMPLE_MS else min(1000, math.ceil(MIN_SAMPLE_MS / max(once, 1e-4)))


def _summary(values: list[float], calls: int, clock: str) -> Timing:
    ordered = sorted(values)
    median = statistics.median(ordered)
    high = ordered[min(len(ordered) - 1, round(0.9 * (len(ordered) - 1)))]
    spread = (high - median) / median if median else 0.0
    return Timing(median, ordered[0], spread, len(ordered), calls, clock)


def cache_sweep(device: str = "cpu") -> Callable[[], object]:
    """A function that empties the last-level cache of the device of what was in it."""
    buffer = torch.ones(2 * last_level_cache_bytes(device) // 4, dtype=torch.float32, device=device)
    if device == "cuda":
        return buffer.zero_
    return buffer.sum  # reads: a memset may go round the cache and leave it as it is


def last_level_cache_bytes(device: str = "cpu") -> int:
    """Size of the last-level cache; 64 MiB where the system doesn't say."""
    unknown = 64 << 20
    if device == "cuda":
        return int(getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0)) or unknown
    for level in (3, 2):
        file = Path(f"/sys/devices/system/cpu/cpu0/cache/index{level}/size")
        try:
            text = file.read_text(encoding="ascii").strip()
            return int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20}[text[-1]]
        except (OSError, ValueError, KeyError):
            continue
    return unknown


def device_name(device: str = "cpu") -> str:
    """The GPU's name, or the CPU's model, with the number of cores this process may use."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    model = models[0] if models else platform.processor() or platform.machine()
    return f"{model} ({cores} cores)"


def copy_of(total_bytes: int, device: str = "cpu") -> Callable[[], object]:
    """A copy that moves `total_bytes` in all, half read and half written: what a memory-bound op is held to."""
    source = torch.ones(max(1, total_bytes // 8), dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def copy_bandwidth(device: str = "cpu", *, budget_s: float = 0.5) -> float:
    """Best rate of a copy that doesn't fit the last-level cache, in bytes per second, reads and writes."""
    total = 8 * last_level_cache_bytes(device)
    timing = measure({"copy": copy_of(total, device)}, device=device, budget_s=budget_s)["copy"]
    return total / (timing.best_ms / 1e3)
