"""Where a step's time goes: host clock on CPUs, events on GPUs, read without stopping the device."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, field

import torch

PHASES = ("data_wait", "forward", "backward", "communication", "optimizer")


@dataclass(slots=True)
class StepTimer:
    """Marks the ends of phases; phases may come back within a step (micro-batches) and add up.

    On a GPU each mark is an event, and `read_ms` must only be called once the device has passed them (the
    metrics reader does, when it flushes).
    """

    device: torch.device
    _marks: list[tuple[str, float | torch.cuda.Event]] = field(default_factory=list)

    def start(self) -> None:
        """Begin a step."""
        self._marks = [("start", self._now())]

    def mark(self, phase: str) -> None:
        """What ran since the last mark belongs to `phase`."""
        self._marks.append((phase, self._now()))

    def finish(self) -> list[tuple[str, float | torch.cuda.Event]]:
        """The marks of the step, to be given to `read_ms` later."""
        marks, self._marks = self._marks, []
        return marks

    def _now(self) -> float | torch.cuda.Event:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def read_ms(marks: list[tuple[str, float | torch.cuda.Event]]) -> dict[str, float]:
    """Milliseconds of each phase, also of others than PHASES that were marked, and of the whole step as ``step``."""
    out = dict.fromkeys(PHASES, 0.0)
    for (_, before), (phase, after) in itertools.pairwise(marks):
        out[phase] = out.get(phase, 0.0) + _elapsed_ms(before, after)
    out["step"] = _elapsed_ms(marks[0][1], marks[-1][1])
    return out


def _elapsed_ms(start: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    if isinstance(start, float) and isinstance(end, float):
        return (end - start) * 1e3
    assert isinstance(start, torch.cuda.Event)
    assert isinstance(end, torch.cuda.Event)
    return start.elapsed_time(end)
