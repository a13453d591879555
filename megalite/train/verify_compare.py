"""What a layout computed, held against one process: every number with its error, its limit, and its place.

Measurements stand in the order in which a step makes them: losses of tokens, then gradients from the last layer to
the first, then the norm, then what the updates did. So the first one that is wrong is the nearest to the cause.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megalite.train.verify_run import Answer, Block, Truth
from megalite.train.verify_trace import Trace

Kind = Literal["output", "token losses", "loss", "output gradient", "gradient", "grad norm", "update"]
EXACT = 1e-10
"""Limit in float64, of the largest value of the same kind in the model."""
FLOORS = {"fp32": 1e-5, "bf16": 2.0**-7, "fp8-rowwise": 2.0**-5, "fp8-tensorwise": 2.0**-5}
"""Least limit in the run's own type, of the largest value of the same kind: one process may be right by luck."""
TIMES = 2.0
"""A layout may be wrong by this many times the worst error that one process has in the same type: it rounds parts of
sums where one process rounds the sum. The worst of all tensors, because that of a single one is a matter of luck."""


@dataclass(frozen=True, slots=True)
class Measure:
    """One number or tensor of a layout against the truth."""

    kind: Kind
    name: str
    """Canonical name of a tensor; ``step 1`` or ``micro-batch 0`` otherwise."""
    error: float
    """Largest absolute difference; infinite where something is missing or ranks disagree."""
    scale: float
    """Largest true value of this kind in the whole model."""
    expected: Tensor
    got: Tensor
    """NaN where no rank has the element."""
    disagreement: tuple[int, ...] = ()
    """Ranks that hold the same elements with different values."""

    @property
    def relative(self) -> float:
        """Error as a share of the scale."""
        return self.error / self.scale if self.scale else self.error

    @property
    def key(self) -> tuple[str, str]:
        """What it is of."""
        return self.kind, self.name


@dataclass(frozen=True, slots=True)
class Check:
    """A layout in one type: all measurements in order, and the limit of each."""

    dtype: str
    measures: list[Measure]
    limits: list[float]
    """Absolute, like the errors."""

    @property
    def wrong(self) -> list[Measure]:
        """Measurements beyond their limits, in order."""
        return [m for m, limit in zip(self.measures, self.limits, strict=True) if not m.error <= limit]

    def worst(self, kind: Kind) -> tuple[Measure, float]:
        """The measurement of a kind that is nearest to or farthest beyond its limit, and the limit."""
        pairs = [pair for pair in zip(self.measures, self.limits, strict=True) if pair[0].kind == kind]
        return max(pairs, key=lambda pair: pair[0].error / pair[1] if pair[1] else pair[0].error)

    def value(self, kind: Kind) -> float:
        """What the layout had for the first number of a kind (loss and norm of step 1)."""
        return float(next(m.got for m in self.measures if m.kind == kind))

    def limit_of(self, measure: Measure) -> float:
        """The limit of one of the measurements."""
        return self.limits[self.measures.index(measure)]


def measure(answers: Sequence[Answer], truth: Truth, traced: Trace | None = None) -> list[Measure]:
    """Everything that the ranks of a layout computed against one process, in the order of a step.

    Args:
        answers: of all ranks.
        truth: of one process.
        traced: of one process too; the ranks then have traced as well.
    """
    found: list[Measure] = []
    backward: list[Measure] = []
    if traced is not None:
        outputs, gradients = [a.outputs for a in answers], [a.output_gradients for a in answers]
        found = _tensors("output", answers, outputs, _covered(traced.outputs, outputs))
        backward = _tensors("output gradient", answers, gradients, _covered(traced.gradients, gradients))
    found += _token_losses(answers, truth)
    found.append(_number("loss", 0, answers, truth.losses, lambda a: a.losses))
    weights = _tensors("gradient", answers, [a.gradients for a in answers], truth.gradients)
    found += _in_backward_order(backward, weights)
    found.append(_number("grad norm", 0, answers, truth.norms, lambda a: a.norms))
    found += _tensors("update", answers, [a.weights for a in answers], truth.weights, truth.initial)
    for step in range(1, len(truth.losses)):
        found.append(_number("loss", step, answers, truth.losses, lambda a: a.losses))
        found.append(_number("grad norm", step, answers, truth.norms, lambda a: a.norms))
    return found


def _in_backward_order(outputs: list[Measure], weights: list[Measure]) -> list[Measure]:
    """Both lists, which are in forward order, as the backward pass comes to them: a module's output, its weights."""
    found: list[Measure] = []
    outputs = list(outputs)
    known = [weight for weight in weights if weight.expected.numel()]
    for weight in reversed(known):
        module = weight.name.rpartition(".")[0]
        while outputs and f"{module}.".startswith(f"{outputs[-1].name.partition(' ')[0]}."):
            found.append(outputs.pop())
        found.append(weight)
    return [*found, *reversed(outputs), *(weight for weight in weights if not weight.expected.numel())]


def _covered(expected: dict[str, Tensor], blocks: Sequence[Sequence[Block]]) -> dict[str, Tensor]:
    """What the ranks recorded in full: a trace is taken where it can be had."""
    rows: dict[str, set[int]] = {}
    for block in (block for own in blocks for block in own):
        rows.setdefault(block.name, set()).update(
            range(block.offset[0], block.offset[0] + block.values.shape[0])
        )
    return {name: x for name, x in expected.items() if len(rows.get(name, ())) == x.shape[0]}


def judge(
    measures: list[Measure], dtype: str, one_process: Sequence[Measure] | None, *, exact_sums: bool = True
) -> Check:
    """Measurements with their limits.

    Args:
        measures: from `measure`.
        dtype: type of the computation.
        one_process: the same measurements of one process in that type; None in float64.
        exact_sums: gradients travel in the type in which they were computed, not in bf16.
    """
    floor = FLOORS.get(dtype, EXACT) if exact_sums else FLOORS["bf16"]
    worst: dict[Kind, float] = {}
    for m in one_process or ():
        worst[m.kind] = max(worst.get(m.kind, 0.0), m.error)
    return Check(dtype, measures, [max(TIMES * worst.get(m.kind, 0.0), floor * m.scale) for m in measures])


def _number(
    kind: Kind, step: int, answers: Sequence[Answer], truth: list[float], of: Callable[[Answer], list[float]]
) -> Measure:
    """One number that every rank has."""
    values = {answer.place.rank: of(answer)[step] for answer in answers}
    expected = truth[step]
    differ = tuple(rank for rank, value in values.items() if value != next(iter(values.values())))
    worst = max((abs(value - expected) for value in values.values()), key=_nan_is_largest)
    got = next(v for v in values.values() if _nan_is_largest(abs(v - expected)) == _nan_is_largest(worst))
    return Measure(
        kind,
        f"step {step + 1}",
        math.inf if differ or math.isnan(worst) else worst,
        abs(expected),
        torch.tensor(expected, dtype=torch.float64),
        torch.tensor(got, dtype=torch.float64),
        (next(iter(values)), *differ) if differ else (),
    )


def _nan_is_largest(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _token_losses(answers: Sequence[Answer], truth: Truth) -> list[Measure]:
    """Of every micro-batch that some rank scored; all ranks that scored it must agree."""
    blocks = [
        [Block(f"micro-batch {n}", tuple(x.shape), (0,), x) for n, x in answer.token_losses.items()]
        for answer in answers
    ]
    scored = {number for answer in answers for number in answer.token_losses}
    expected = {f"micro-batch {n}": truth.token_losses[n] for n in sorted(scored)}
    return _tensors("token losses", answers, blocks, expected)


def _tensors(
    kind: Kind,
    answers: Sequence[Answer],
    blocks: Sequence[Sequence[Block]],
    expected: dict[str, Tensor],
    minus: dict[str, Tensor] | None = None,
) -> list[Measure]:
    """Tensors put together from the blocks of all ranks, each less `minus` if it is given."""
    held: dict[str, list[tuple[int, Block]]] = {name: [] for name in expected}
    unknown: dict[str, Block] = {}
    for answer, own in zip(answers, blocks, strict=True):
        for block in own:
            if block.name in expected and _fits(block, expected[block.name].shape):
                held[block.name].append((answer.place.rank, block))
            else:
                unknown[block.name] = block
    wanted = {name: x - minus[name] for name, x in expected.items()} if minus else expected
    scale = max((float(x.abs().max()) for x in wanted.values() if x.numel()), default=0.0)
    found = []
    for name in wanted:
        got, ranks = put_together(held[name], wanted[name].shape)
        if minus:
            got = got - minus[name]
        error = float((got - wanted[name]).abs().max()) if got.numel() else 0.0
        error = math.inf if ranks or math.isnan(error) else error
        found.append(Measure(kind, name, error, scale, wanted[name], got, ranks))
    for name, block in unknown.items():
        nothing = block.values.new_zeros(0)
        found.append(Measure(kind, name, math.inf, scale, nothing, block.values))
    return found


def put_together(held: Sequence[tuple[int, Block]], shape: Sequence[int]) -> tuple[Tensor, tuple[int, ...]]:
    """The whole tensor from (rank, block) pairs, NaN where there is none, and the ranks that disagree.

    What several ranks hold must be equal to the last bit: they apply the same updates to it for the whole run.
    """
    whole = torch.full(tuple(shape), torch.nan, dtype=torch.float64)
    filled = torch.zeros(tuple(shape), dtype=torch.bool)
    ranks: set[int] = set()
    for place, (rank, block) in enumerate(held):
        seen, known = whole[block.index], filled[block.index]
        differ = known & ~((seen == block.values) | (seen.isnan() & block.values.isnan()))
        if differ.any():
            ranks |= {rank, *(other for other, earlier in held[:place] if _overlap(earlier, block))}
        whole[block.index] = torch.where(known, seen, block.values)
        filled[block.index] = True
    return whole, tuple(sorted(ranks))


def _fits(block: Block, shape: Sequence[int]) -> bool:
    """Whether a block says that it is of a tensor of this shape, and lies inside it."""
    ends = [offset + size for offset, size in zip(block.offset, block.values.shape, strict=True)]
    return block.global_shape == tuple(shape) and all(e <= n for e, n in zip(ends, shape, strict=True))


def _overlap(a: Block, b: Block) -> bool:
    """Whether two blocks of a tensor share elements."""
    for x, y, n, m in zip(a.offset, b.offset, a.values.shape, b.values.shape, strict=True):
        if x + n <= y or y + m <= x:
            return False
    return True
