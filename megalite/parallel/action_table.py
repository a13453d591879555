"""Action tables of pipeline schedules: what each rank computes, in which order.

A table has a row per rank; a row is a sequence of steps; a step is one action or, where a schedule pairs a forward
with a backward pass, two that run one after the other and whose results leave together at the end. Actions are
written as the engine (torch.distributed.pipelining) writes them: stage, kind, micro-batch, so that ``3F0`` is the
forward pass of stage 3 on micro-batch 0.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple, cast

from megalite.config_parallel import SINGLE_STAGE, Schedule

Kind = Literal["F", "I", "W", "B"]
"""F forward; I gradient of the input; W gradient of the weights; B both gradients at once."""

ENGINE_NAMES: dict[Schedule, str] = {
    "gpipe": "GPipe",
    "1f1b": "1F1B",
    "looped_bfs": "LoopedBFS",
    "interleaved": "Interleaved1F1B",
    "interleaved_zero_bubble": "InterleavedZeroBubble",
    "zbv": "ZBVZeroBubble",
    "dualpipev": "DualPipeV",
}
"""Our name of a schedule → torch.distributed.pipelining's."""

_ACTION = re.compile(r"(\d+)([FIWB])(\d+)")


class ScheduleError(ValueError):
    """A table that cannot run, or that does not compute every gradient once."""


class Op(NamedTuple):
    """One action: a stage computes something on a micro-batch."""

    stage: int
    kind: Kind
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.micro_batch}"


Step = tuple[Op, ...]
Table = tuple[tuple[Step, ...], ...]


def schedule_table(schedule: Schedule, pp: int, stages_per_rank: int, micro_batches: int) -> Table:
    """The engine's own table of a schedule, made without any process.

    1F1B is written down here: the engine runs it from other code, and the table that torch 2.13 makes for it counts
    the last rank's forward passes from 1.

    Args:
        schedule: one of `megalite.config.ParallelConfig.pp_schedule`.
        pp: pipeline ranks.
        stages_per_rank: stages on each.
        micro_batches: of one step on one data-parallel rank.

    Raises:
        ScheduleError: the schedule does not exist for these numbers; the message is the engine's.
    """
    if schedule == "1f1b":
        return tuple(tuple((op,) for op in _one_f_one_b(rank, pp, micro_batches)) for rank in range(pp))
    # Importing it brings torch's compiler along, a second and its state: only for those who need a table.
    from torch.distributed.pipelining.schedules import get_schedule_class

    stub = SimpleNamespace(group_rank=0, group_size=pp, num_stages=pp * stages_per_rank, submod=None)
    stages: Any = stub if schedule in SINGLE_STAGE else [stub] * stages_per_rank
    try:
        made = get_schedule_class(ENGINE_NAMES[schedule])(stages, micro_batches)
    except ValueError as error:
        raise ScheduleError(str(error)) from None
    assert made.pipeline_order is not None
    return table_from_engine(made.pipeline_order)


def _one_f_one_b(rank: int, pp: int, micro_batches: int) -> Iterator[Op]:
    """One rank's row of 1F1B (PipeDream-Flush, arXiv 2006.09503): as many forward passes as ranks follow, then a
    forward and a backward pass in turn, then the backward passes that are left."""
    warm_up = min(micro_batches, pp - 1 - rank)
    yield from (Op(rank, "F", i) for i in range(warm_up))
    for i in range(micro_batches - warm_up):
        yield Op(rank, "F", warm_up + i)
        yield Op(rank, "B", i)
    yield from (Op(rank, "B", i) for i in range(micro_batches - warm_up, micro_batches))


def table_from_engine(orders: Mapping[int, Iterable[Any]]) -> Table:
    """A table from torch.distributed.pipelining's `pipeline_order` (or the one with communication).

    What is no computation (waiting, sends, receives, unsharding, reductions) is left out: the simulator derives
    communication from the dependencies, and waiting from both.
    """
    return tuple(tuple(_engine_steps(orders[rank])) for rank in sorted(orders))


def _engine_steps(actions: Iterable[Any]) -> Iterator[Step]:
    for action in actions:
        if action is None:
            continue
        parts = action.sub_actions or (action,)
        ops = (Op(p.stage_index, p.computation_type.value, p.microbatch_index) for p in parts)
        step = tuple(op for op in ops if op.kind in ("F", "I", "W", "B"))
        if step:
            yield step


def parse_table(rows: Sequence[str]) -> Table:
    """A table written by hand: a string per rank, steps apart by spaces, as in ``"0F0 0F1 (0B0;0F2)"``.

    Raises:
        ScheduleError: something is no action.
    """
    return tuple(tuple(_parse_step(word) for word in row.split()) for row in rows)


def _parse_step(word: str) -> Step:
    texts = word[1:-1].split(";") if word.startswith("(") and word.endswith(")") else [word]
    matches = [_ACTION.fullmatch(text) for text in texts]
    if not all(matches):
        raise ScheduleError(f"{word!r} is no action: write stage, one of F I W B, micro-batch, as in '3F0'")
    return tuple(Op(int(m[1]), cast(Kind, m[2]), int(m[3])) for m in matches if m)


def format_table(table: Table) -> list[str]:
    """What `parse_table` reads."""
    return [
        " ".join(str(s[0]) if len(s) == 1 else f"({';'.join(map(str, s))})" for s in row) for row in table
    ]


class TableFacts(NamedTuple):
    """What a complete table is about."""

    num_stages: int
    micro_batches: int
    rank_of: tuple[int, ...]
    """Rank of each stage."""
    backward: dict[tuple[int, int], Op]
    """(stage, micro-batch) → the action that gives the gradient of the stage's input: I or B."""


def check_complete(table: Table) -> TableFacts:
    """Check that every stage computes each pass of each micro-batch once, all on one rank.

    Raises:
        ScheduleError: naming the actions that are missing, double, or on a second rank.
    """
    ranks: dict[Op, int] = {}
    rank_of: dict[int, int] = {}
    for rank, row in enumerate(table):
        for op in (op for step in row for op in step):
            if op in ranks:
                raise ScheduleError(f"{op} is there twice: on rank {ranks[op]} and on rank {rank}")
            ranks[op] = rank
            if rank_of.setdefault(op.stage, rank) != rank:
                raise ScheduleError(
                    f"stage {op.stage} is on rank {rank_of[op.stage]}, but {op} on rank {rank}: a stage's weights "
                    "are on one rank"
                )
    if not ranks:
        raise ScheduleError("the table is empty")
    num_stages, micro_batches = 1 + max(op.stage for op in ranks), 1 + max(op.micro_batch for op in ranks)
    backward, missing = {}, []
    for stage in range(num_stages):
        for i in range(micro_batches):
            whole, split = Op(stage, "B", i), (Op(stage, "I", i), Op(stage, "W", i))
            if whole in ranks and any(op in ranks for op in split):
                raise ScheduleError(f"{whole} computes what {split[0]} or {split[1]} computes again")
            needed = (Op(stage, "F", i), whole) if whole in ranks else (Op(stage, "F", i), *split)
            if not any(op in ranks for op in needed[1:]):
                needed = (Op(stage, "F", i), whole)
            missing += [str(op) for op in needed if op not in ranks]
            backward[stage, i] = needed[1]
    if missing:
        more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
        raise ScheduleError(f"missing actions: {', '.join(missing[:8])}{more}")
    return TableFacts(num_stages, micro_batches, tuple(rank_of[s] for s in range(num_stages)), backward)
