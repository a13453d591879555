"""Runs a pipeline schedule's action table on paper: is it free of deadlock, how long, how idle, how much memory?

Rules, as the engine executes them: a rank computes its row in order, one action at a time. A forward pass needs
the previous stage's output of the same micro-batch, a backward pass its own forward pass and the next stage's
gradient, a weight pass its own input pass. What comes from another rank arrives `send` seconds after the step it was
computed in ended; sends and receives cost the ranks no time and do not queue behind each other. On one rank, a
result is there at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from megalite.parallel.action_table import Op, ScheduleError, Step, Table, TableFacts, check_complete


@dataclass(frozen=True, slots=True)
class StageTimes:
    """Seconds of each stage's passes, and of a transfer between stages on different ranks."""

    forward: tuple[float, ...]
    backward_input: tuple[float, ...]
    backward_weight: tuple[float, ...]
    send: float = 0.0
    backward: tuple[float, ...] = ()
    """Of whole backward passes, where they are known not to take as long as their two halves."""

    @classmethod
    def even(
        cls,
        num_stages: int,
        forward: float = 1.0,
        input_: float = 1.0,
        weight: float = 1.0,
        send: float = 0.0,
    ) -> StageTimes:
        """The same times for all stages."""
        return cls((forward,) * num_stages, (input_,) * num_stages, (weight,) * num_stages, send)

    def of(self, op: Op) -> float:
        """Seconds that an action computes."""
        i = op.stage
        if op.kind == "B":
            return self.backward[i] if self.backward else self.backward_input[i] + self.backward_weight[i]
        return {"F": self.forward, "I": self.backward_input, "W": self.backward_weight}[op.kind][i]


@dataclass(frozen=True, slots=True)
class StageBytes:
    """Bytes that one micro-batch keeps on a stage."""

    activations: tuple[float, ...]
    """From the start of its forward pass to the end of its input pass."""
    for_weights: tuple[float, ...]
    """From then to the end of its weight pass, where the two are apart."""

    @classmethod
    def units(cls, num_stages: int) -> StageBytes:
        """Every stage's activations count 1, all of it until the weight pass."""
        return cls((1.0,) * num_stages, (1.0,) * num_stages)


@dataclass(frozen=True, slots=True)
class Span:
    """One action in time."""

    op: Op
    start: float
    end: float


@dataclass(slots=True)
class RankTimeline:
    """What one rank did."""

    spans: list[Span] = field(default_factory=list)
    busy: float = 0.0
    """Seconds of computation."""
    waits: list[tuple[float, float]] = field(default_factory=list)
    """(start, end) of waiting in which what was waited for was travelling."""
    memory: list[tuple[float, float]] = field(default_factory=lambda: [(0.0, 0.0)])
    """(time, bytes kept from then on), in order of time."""
    kept: int = 0
    peak_activations: int = 0
    """Most forward passes whose weight gradient was not yet computed: micro-batches · stages."""

    @property
    def exposed(self) -> float:
        """Seconds of waiting for something that was travelling."""
        return sum(end - start for start, end in self.waits)

    @property
    def peak_bytes(self) -> float:
        """Most bytes kept at one time."""
        return max(kept for _, kept in self.memory)


@dataclass(frozen=True, slots=True)
class Timeline:
    """A table in time."""

    ranks: tuple[RankTimeline, ...]
    makespan: float
    """Seconds from the first action's start to the last one's end."""
    facts: TableFacts

    def bubble_of(self, rank: int) -> float:
        """Share of the time in which a rank computes nothing, waiting for transfers included."""
        return 1 - self.ranks[rank].busy / self.makespan if self.makespan else 0.0

    @property
    def bubble(self) -> float:
        """Share of all ranks' time in which nothing is computed."""
        return sum(self.bubble_of(rank) for rank in range(len(self.ranks))) / len(self.ranks)

    @property
    def exposed(self) -> float:
        """Share of all ranks' time spent waiting for something that was travelling."""
        total = self.makespan * len(self.ranks)
        return sum(rank.exposed for rank in self.ranks) / total if total else 0.0

    @property
    def peak_activations(self) -> tuple[int, ...]:
        """Most micro-batches · stages kept at one time, per rank."""
        return tuple(rank.peak_activations for rank in self.ranks)

    @property
    def peak_bytes(self) -> tuple[float, ...]:
        """Most bytes of activations kept at one time, per rank; inputs that arrive early are not in it."""
        return tuple(rank.peak_bytes for rank in self.ranks)


class DeadlockError(ScheduleError):
    """A table in which ranks wait for each other for ever."""

    def __init__(self, blocked: dict[int, tuple[Op, Op]]) -> None:
        self.blocked = blocked
        """Rank → the first action it can never run, and what that waits for."""
        waits = (
            f"rank {rank} can never run {op}, which waits for {need}" for rank, (op, need) in blocked.items()
        )
        super().__init__(f"deadlock: {'; '.join(waits)}")


def simulate(table: Table, times: StageTimes, memory: StageBytes | None = None) -> Timeline:
    """Execute a table by its dependencies.

    Args:
        table: rows of steps, from `schedule_table` or `parse_table`.
        times: seconds per stage and pass.
        memory: bytes per stage; by default every activation counts 1.

    Raises:
        ScheduleError: actions are missing, double, or on two ranks.
        DeadlockError: some ranks wait for each other, or for themselves.
        ValueError: times or bytes of another number of stages.
    """
    facts = check_complete(table)
    memory = memory or StageBytes.units(facts.num_stages)
    whole = times.backward or times.backward_input
    _check_length(
        "times", facts.num_stages, times.forward, times.backward_input, times.backward_weight, whole
    )
    _check_length("bytes", facts.num_stages, memory.activations, memory.for_weights)
    run = _Run(table, times, memory, facts)
    ready = list(range(len(table)))
    while ready:
        ready += run.advance(ready.pop())
    if run.blocked:
        raise DeadlockError(dict(sorted(run.blocked.items())))
    makespan = max(rank.spans[-1].end if rank.spans else 0.0 for rank in run.ranks)
    return Timeline(tuple(run.ranks), makespan, facts)


def needs(op: Op, facts: TableFacts) -> list[Op]:
    """What must have been computed before an action."""
    stage, i = op.stage, op.micro_batch
    if op.kind == "F":
        return [Op(stage - 1, "F", i)] if stage else []
    if op.kind == "W":
        return [Op(stage, "I", i)]
    own = [Op(stage, "F", i)]
    return own if stage == facts.num_stages - 1 else [*own, facts.backward[stage + 1, i]]


class _Run:
    """State of one simulation: how far each rank is, and when each result was there."""

    def __init__(self, table: Table, times: StageTimes, memory: StageBytes, facts: TableFacts) -> None:
        self.table, self.times, self.memory, self.facts = table, times, memory, facts
        self.ranks = [RankTimeline() for _ in table]
        self.clock = [0.0] * len(table)
        self.at = [(0, 0) for _ in table]  # step of the row, action of the step
        self.computed: dict[Op, float] = {}  # end of the action: its own rank may go on with it
        self.left: dict[Op, float] = {}  # end of its step: it starts travelling to other ranks
        self.blocked: dict[int, tuple[Op, Op]] = {}

    def advance(self, rank: int) -> list[int]:
        """Run a rank until it must wait for another one; returns the ranks that now need not wait any more."""
        row, freed = self.table[rank], set[int]()
        self.blocked.pop(rank, None)
        while self.at[rank][0] < len(row):
            number, place = self.at[rank]
            step = row[number]
            op = step[place]
            missing = next((need for need in needs(op, self.facts) if not self._there(need, rank)), None)
            if missing is not None:
                self.blocked[rank] = (op, missing)
                break
            self._compute(rank, op)
            if place + 1 < len(step):
                self.at[rank] = (number, place + 1)
            else:
                self.at[rank] = (number + 1, 0)
                freed |= self._leave(step, self.clock[rank])
        return sorted(freed)

    def _there(self, need: Op, rank: int) -> bool:
        return need in (self.computed if self.facts.rank_of[need.stage] == rank else self.left)

    def _compute(self, rank: int, op: Op) -> None:
        """Place an action, whose inputs are all under way, as early as the rank and they allow."""
        line, free = self.ranks[rank], self.clock[rank]
        start = made = free
        for need in needs(op, self.facts):
            if self.facts.rank_of[need.stage] != rank:
                start = max(start, self.left[need] + self.times.send)
                made = max(made, self.left[need])
        if start > made:
            line.waits.append((made, start))
        end = start + self.times.of(op)
        line.busy += end - start
        line.spans.append(Span(op, start, end))
        self.clock[rank] = self.computed[op] = end
        self._keep(line, op, start, end)

    def _keep(self, line: RankTimeline, op: Op, start: float, end: float) -> None:
        """Account for what an action keeps (at its start) or no longer needs (at its end)."""
        whole, rest = self.memory.activations[op.stage], self.memory.for_weights[op.stage]
        change = {"F": whole, "I": rest - whole, "W": -rest, "B": -whole}[op.kind]
        line.memory.append((start if op.kind == "F" else end, line.memory[-1][1] + change))
        line.kept += {"F": 1, "I": 0, "W": -1, "B": -1}[op.kind]
        line.peak_activations = max(line.peak_activations, line.kept)

    def _leave(self, step: Step, time: float) -> set[int]:
        """Let a step's results travel; the ranks that waited for one of them."""
        self.left.update(dict.fromkeys(step, time))
        return {rank for rank, (_, need) in self.blocked.items() if need in step}


def _check_length(what: str, num_stages: int, *values: Sequence[float]) -> None:
    for each in values:
        if len(each) != num_stages:
            raise ValueError(f"{what} of {len(each)} stages for a table of {num_stages}")
