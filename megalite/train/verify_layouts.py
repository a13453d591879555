"""Which layouts `megalite verify` compares: every axis alone in all its ways, then mixtures, then the run's own."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from megalite.config import ModelConfig, ParallelConfig, RecomputeConfig, RunConfig
from megalite.config_parallel import Schedule
from megalite.errors import UserError

OWN = "own"
GROUPS = ("own", "tp", "cp", "pp", "dp", "recompute", "mixed")
"""Kinds of layouts, in the order in which they run."""
PLAIN = RecomputeConfig()
_SMALL_BUCKETS = 4096
"""Parameters of a bucket: so few that the small model has several."""


@dataclass(frozen=True, slots=True)
class Layout:
    """One way of spreading a step over processes."""

    name: str
    group: str
    world: int
    parallel: ParallelConfig
    recompute: RecomputeConfig = PLAIN

    @property
    def dp(self) -> int:
        """Data-parallel ranks."""
        return self.parallel.dp_size(self.world)

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a step, over all data-parallel ranks: the fewest that the schedule runs, at least two each
        (four for a pipeline of two, so that it has a steady phase)."""
        parallel = self.parallel
        least = 2
        if parallel.pp > 1:
            least = 2 * parallel.pp if parallel.pp_schedule == "dualpipev" else max(4, parallel.pp)
        return self.dp * least

    @property
    def exact(self) -> bool:
        """Whether the layout computes the same numbers but for rounding in the type of the computation."""
        return self.dp * self.parallel.cp == 1 or self.parallel.grad_reduce_dtype == "fp32"


def all_layouts(processes: int) -> list[Layout]:
    """Every layout of up to so many processes, without the run's own; names are unique."""
    every = [
        *_tensor(processes),
        *_context(processes),
        *_pipeline(processes),
        *_data(processes),
        *_recompute(processes),
        *_mixed(),
    ]
    return [layout for layout in every if layout.world <= processes]


def _degrees(processes: int) -> list[int]:
    return [degree for degree in (2, 4, 8) if degree <= processes]


def _layout(group: str, world: int, recompute: RecomputeConfig = PLAIN, **parallel: object) -> Layout:
    values = {"sequence_parallel": False, "zero": 0, "bucket_size": _SMALL_BUCKETS, **parallel}
    config = ParallelConfig(**values)  # type: ignore[arg-type]
    return Layout(name_of(config, world, recompute), group, world, config, recompute)


def name_of(parallel: ParallelConfig, world: int, recompute: RecomputeConfig = PLAIN) -> str:
    """Name of a layout: what differs from one process, tp first, for example ``tp2-sp-pp2-1f1b-dp2-zero1``."""
    dp, words = parallel.dp_size(world), []
    if parallel.tp > 1:
        words.append(f"tp{parallel.tp}")
        words += ["sp"] if parallel.sequence_parallel else []
        words += [f"chunks{parallel.tp_chunks}"] if parallel.tp_chunks > 1 else []
    if parallel.cp > 1:
        words += [f"cp{parallel.cp}", parallel.cp_method]
    if parallel.pp > 1:
        words += [f"pp{parallel.pp}", parallel.pp_schedule]
        words += [f"stages{parallel.pp_stages}"] if parallel.pp_stages > 2 else []
    if dp > 1:
        words += [f"dp{dp}"]
    if dp * parallel.cp > 1 and (dp > 1 or parallel.zero == 3):
        words += [f"zero{parallel.zero}"]
        words += [f"shard{parallel.dp_shard}"] if parallel.dp_shard not in (0, dp) else []
        words += ["bf16sum"] if parallel.grad_reduce_dtype == "bf16" else []
    if recompute.kind not in ("auto", "none"):
        words.append(f"recompute-{recompute.kind}")
    return "-".join(words) or "one"


def _tensor(processes: int) -> Iterator[Layout]:
    for tp in _degrees(processes):
        yield _layout("tp", tp, tp=tp)
        yield _layout("tp", tp, tp=tp, sequence_parallel=True)
        yield _layout("tp", tp, tp=tp, sequence_parallel=True, tp_chunks=2)


def _context(processes: int) -> Iterator[Layout]:
    for cp in _degrees(processes):
        yield _layout("cp", cp, cp=cp, cp_method="ring")
        yield _layout("cp", cp, cp=cp, cp_method="ulysses")


def _pipeline(processes: int) -> Iterator[Layout]:
    for pp in _degrees(min(processes, 4)):
        for schedule in get_args(Schedule):
            yield _layout("pp", pp, pp=pp, pp_schedule=schedule)


def _data(processes: int) -> Iterator[Layout]:
    for dp in _degrees(processes):
        for zero in (0, 1, 3):
            yield _layout("dp", dp, zero=zero)
        if dp > 2:
            yield _layout("dp", dp, zero=1, dp_shard=dp // 2)
            yield _layout("dp", dp, zero=3, dp_shard=dp // 2)
    yield _layout("dp", 2, zero=1, grad_reduce_dtype="bf16")


def _recompute(processes: int) -> Iterator[Layout]:
    selective = RecomputeConfig(kind="selective", parts=("attention", "norm", "activation", "mlp"))
    kinds = [selective, RecomputeConfig(kind="full"), RecomputeConfig(kind="budget", budget_gb=1e-4)]
    for kind in kinds:
        yield _layout("recompute", 2, kind, tp=2, sequence_parallel=True)
    yield _layout("recompute", 2, kinds[1], pp=2, pp_schedule="1f1b")
    yield _layout("recompute", 2, kinds[1], zero=3)


def _mixed() -> Iterator[Layout]:
    """Mixtures in which two axes meet in every pair, then those of three and four."""
    sp: dict[str, Any] = {"tp": 2, "sequence_parallel": True}
    yield _layout("mixed", 4, **sp, zero=1)
    yield _layout("mixed", 4, **sp, zero=3)
    yield _layout("mixed", 4, **sp, cp=2)
    yield _layout("mixed", 4, tp=2, cp=2, cp_method="ulysses")
    yield _layout("mixed", 4, **sp, pp=2)
    yield _layout("mixed", 4, cp=2, pp=2, pp_schedule="interleaved")
    yield _layout("mixed", 4, cp=2, zero=1)
    yield _layout("mixed", 4, cp=2, zero=3)
    yield _layout("mixed", 4, pp=2, zero=1)
    yield _layout("mixed", 4, pp=2, pp_schedule="zbv", zero=0)
    yield _layout("mixed", 8, **sp, cp=2, pp=2)
    yield _layout("mixed", 8, **sp, pp=2, pp_schedule="interleaved_zero_bubble", zero=1)
    yield _layout("mixed", 8, **sp, cp=2, zero=1)
    yield _layout("mixed", 8, **sp, zero=1, dp_shard=2)
    yield _layout("mixed", 8, **sp, cp=2, zero=3)
    yield _layout("mixed", 8, cp=2, pp=2, pp_schedule="dualpipev", zero=1)
    yield _layout("mixed", 8, tp=4, sequence_parallel=True, pp=2, pp_schedule="1f1b")
    yield _layout("mixed", 8, pp=4, pp_schedule="interleaved", zero=1)


def own_layout(config: RunConfig, processes: int) -> Layout | None:
    """The layout of the run itself, its degrees lowered to fit; None if it is one process.

    Degrees are halved, the largest first, until their product fits; data parallelism takes what is left, at least
    two ranks where there is room for them.
    """
    parallel = config.parallel
    degrees = {"tp": parallel.tp, "cp": parallel.cp, "pp": parallel.pp}
    while _product(degrees) > processes:
        largest = max(degrees, key=lambda axis: degrees[axis])
        degrees[largest] = _largest_divisor(degrees[largest])
    world = _product(degrees) * (processes // _product(degrees))
    if world == 1:
        return None
    dp = world // _product(degrees)
    shard = parallel.dp_shard if parallel.dp_shard in (0, dp) else max(1, dp // 2)
    shrunk = dataclasses.replace(
        parallel,
        tp=degrees["tp"],
        cp=degrees["cp"],
        pp=degrees["pp"],
        dp_shard=shard,
        backend="auto",
        bucket_size=_SMALL_BUCKETS,
    )
    recompute = config.recompute
    if recompute.kind == "budget":
        recompute = dataclasses.replace(
            recompute, budget_gb=1e-4
        )  # of the small model, so that it has to choose
    return Layout(f"{OWN}: {name_of(shrunk, world, recompute)}", OWN, world, shrunk, recompute)


def _product(degrees: dict[str, int]) -> int:
    return degrees["tp"] * degrees["cp"] * degrees["pp"]


def _largest_divisor(number: int) -> int:
    """The largest proper divisor."""
    return next(d for d in range(number // 2, 0, -1) if number % d == 0)


def choose(layouts: Sequence[Layout], patterns: str) -> list[Layout]:
    """The layouts that a comma-separated list of kinds, names and name patterns asks for; all if it is empty.

    Raises:
        UserError: a pattern matches nothing.
    """
    words = [word.strip() for word in patterns.split(",") if word.strip()]
    if not words:
        return list(layouts)
    for word in words:
        if not any(_matches(layout, word) for layout in layouts):
            raise UserError(
                f"--layouts {word!r} matches none of the {len(layouts)} layouts: give kinds ({', '.join(GROUPS)}), "
                "names or patterns such as 'tp2*', or see them all with --list"
            )
    return [layout for layout in layouts if any(_matches(layout, word) for word in words)]


def _matches(layout: Layout, word: str) -> bool:
    name = layout.name.removeprefix(f"{OWN}: ")
    return word == layout.group or fnmatch.fnmatchcase(name, word)


def reason_against(layout: Layout, model: ModelConfig) -> str:
    """Why `model` cannot be cut this way; empty if it can."""
    try:
        layout.parallel.validate_model(model)
        layout.parallel.validate_microbatches(layout.micro_batches // layout.dp)
    except UserError as error:
        return str(error)
    return ""
