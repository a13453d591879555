"""A clock of ops, below our code and apart from the profiler: torch's dispatcher tells when each op begins and ends.

On a CPU an op is done when it returns, so it is timed by the host. On a GPU events are put around it on the stream;
a delay at the beginning of the step lets the host run ahead, so that the launches' cost does not lie between them.
Autograd hands the dispatch mode on to its threads. `Work.wait` is timed beside the ops: what it takes is exposed.

What the clock itself takes is known in two parts: its own lines are timed by itself, and the way into them is
measured on an op that does nothing (`transit_ms`).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megalite.layers.recompute import RECOMPUTE_MARK
from megalite.parallel.mesh import Mesh
from megalite.train.timer import StepTimer
from megalite.train.waterfall_ops import COMMUNICATION, Classified, Classifier, Sizes

ClockKind = Literal["wall", "process", "events"]
POINT_TO_POINT = frozenset({"send", "recv_", "recv_any_source_"})
"""What pipeline stages exchange; other calls over the pipeline's ranks are collectives."""


@dataclass(frozen=True, slots=True)
class Clock:
    """Reads one clock."""

    kind: ClockKind
    now: Callable[[], Any]
    ms: Callable[[Any, Any], float]
    """Milliseconds between two readings; on a GPU only once both have happened."""


def make_clock(device: torch.device, *, process: bool = False) -> Clock:
    """The clock of a device; on a CPU the time of day, or this process's own time, which other programs don't move.

    Raises:
        ValueError: a GPU's work takes no time of the process.
    """
    if device.type == "cuda":
        if process:
            raise ValueError("clock='process' reads the CPU's time of this process: take 'wall' on a GPU")
        return Clock("events", _event, lambda a, b: float(a.elapsed_time(b)))
    if process:
        return Clock("process", time.process_time_ns, lambda a, b: (b - a) / 1e6)
    return Clock("wall", time.perf_counter_ns, lambda a, b: (b - a) / 1e6)


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


@dataclass(slots=True)
class Stamp:
    """One op, or one wait for a collective."""

    call: Classified
    axis: str
    """Of communication: "tp", "cp", "dp", "pp" or "all"; "" for other ops."""
    again: bool
    """Ran inside a recomputation."""
    wait: bool
    entered: Any
    start: Any
    end: Any
    left: Any
    """Readings: the clock begins its lines, the op runs from `start` to `end`, the clock's lines end."""


@dataclass(slots=True)
class StepStamps:
    """All that one step left behind."""

    stamps: list[Stamp]
    phases: list[tuple[str, int, Any]]
    """(phase, stamps when it ended, reading when it ended), in order, as the trainer marked them."""
    start: Any
    end: Any


class PhaseTimer(StepTimer):
    """The trainer's timer, whose marks are told to the clock too."""

    def __init__(self, device: torch.device, marked: Callable[[str], None]) -> None:
        super().__init__(device)
        self.marked = marked

    def mark(self, phase: str) -> None:
        super().mark(phase)
        self.marked(phase)


class OpClock(TorchDispatchMode):
    """Stamps every op while it is entered.

    Args:
        clock: what it reads.
        sizes: of the model and the batch, to know the FLOPs of an op.
        axes: name of a process group → axis.
    """

    def __init__(self, clock: Clock, sizes: Sizes, axes: dict[str, str] | None = None) -> None:
        super().__init__()
        self.clock, self.axes = clock, axes or {}
        self.classify = Classifier(sizes)
        self.stamps: list[Stamp] = []
        self.phases: list[tuple[str, int, Any]] = []
        self._marks: list[bool] = []
        self._works: dict[int, tuple[Any, str, str]] = {}

    def mark(self, phase: str) -> None:
        """What ran since the last mark belongs to `phase`."""
        self.phases.append((phase, len(self.stamps), self.clock.now()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        now = self.clock.now
        entered = now()
        kwargs = kwargs or {}
        start = now()
        out = func(*args, **kwargs)
        end = now()
        call = self.classify(func, args, kwargs, out)
        axis = ""
        if call.kind == COMMUNICATION:
            axis = self._launched(call.name, [*args, *kwargs.values()], out)
        elif call.name.startswith("profiler."):
            self._marked(call.name, args)
        stamp = Stamp(call, axis, any(self._marks), False, entered, start, end, None)
        self.stamps.append(stamp)
        stamp.left = now()
        return out

    def _marked(self, name: str, args: Sequence[Any]) -> None:
        if "enter" in name:
            self._marks.append(args[0] == RECOMPUTE_MARK)
        elif self._marks:
            self._marks.pop()

    def _launched(self, name: str, args: Sequence[Any], out: Any) -> str:
        """Remember what will be waited for; returns the axis."""
        axis = self.axes.get(_group_name(args), "dp" if "functional" in name else "all")
        kind = name.partition(".")[2]
        if axis == "pp" and kind in POINT_TO_POINT:
            axis = "bubble"
        boxed = out[-1] if isinstance(out, (tuple, list)) and out else out
        if isinstance(boxed, torch.ScriptObject):
            work = dist.Work.unbox(boxed)
            self._works[id(work)] = (work, axis, kind)
        return axis

    def waited(self, work: Any, wait: Callable[[], Any]) -> Any:
        """Run `wait`, and stamp it as a wait for `work`."""
        now = self.clock.now
        entered = now()
        # What the step before has started is the gather of new weights.
        _, axis, kind = self._works.pop(id(work), (None, "dp", "collective"))
        start = now()
        out = wait()
        end = now()
        call = Classified(f"wait.{kind}", COMMUNICATION)
        self.stamps.append(Stamp(call, axis, False, True, entered, start, end, now()))
        return out


@contextlib.contextmanager
def running(clock: OpClock) -> Iterator[None]:
    """The clock stamps ops and waits inside the block."""
    original = dist.Work.wait if dist.is_available() else None

    def wait(work: Any, *args: Any, **kwargs: Any) -> Any:
        assert original is not None
        return clock.waited(work, lambda: original(work, *args, **kwargs))

    try:
        if original is not None:
            dist.Work.wait = wait  # type: ignore[assignment,method-assign]
        with clock:
            yield
    finally:
        if original is not None:
            dist.Work.wait = original  # type: ignore[method-assign]


def group_axes(mesh: Mesh) -> dict[str, str]:
    """Name of each process group of the mesh → the axis that its time counts for."""
    named = (
        ("tp", mesh.tp), ("cp", mesh.cp), ("dp", mesh.dp), ("dp", mesh.data), ("dp", mesh.shard),
        ("dp", mesh.replicate), ("pp", mesh.pp), ("pp", mesh.tied), ("all", mesh.model), ("all", mesh.world),
    )  # fmt: skip
    axes: dict[str, str] = {}
    for name, axis in named:
        if axis.group is not None:
            axes.setdefault(str(axis.group.group_name), name)
    return axes


def _group_name(args: Sequence[Any]) -> str:
    """Name of the process group among the arguments of a collective: an object, or a string."""
    for arg in args:
        if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()):
            return str(dist.ProcessGroup.unbox(arg).group_name)
    names = [arg for arg in args if isinstance(arg, str)]
    return names[-1] if names else ""


def transit_ms(clock: Clock, *, calls: int = 400, rounds: int = 7) -> float:
    """What the way to the clock's lines and back takes for one op, on the host: its lines time only themselves.

    The difference between a loop of ops that do nothing, with the clock and without, less its own lines. Best of
    several rounds. On a GPU it is not needed: the host runs ahead.
    """
    if clock.kind == "events":
        return 0.0
    x = torch.zeros(1)

    def loop() -> float:
        start = clock.now()
        for _ in range(calls):
            x.detach()
        return clock.ms(start, clock.now())

    best = []
    for _ in range(rounds):
        plain = loop()
        ops = OpClock(clock, Sizes(1))
        with ops:
            stamped = loop()
        own = sum(own_ms(clock, stamp) for stamp in ops.stamps)
        best.append((stamped - plain - own) / calls)
    return max(0.0, min(best))


def own_ms(clock: Clock, stamp: Stamp) -> float:
    """What the clock's own lines took at one op."""
    return clock.ms(stamp.entered, stamp.start) + clock.ms(stamp.end, stamp.left)
