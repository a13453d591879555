"""A few steps on any `ModelState`, in any layout, and the same steps in one process with nothing but autograd."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from megalite.config import IGNORE_INDEX, ParallelConfig
from megalite.data.loader import MicroBatch
from megalite.parallel.collectives import all_reduce_sum
from megalite.parallel.context import ContextSplit
from megalite.parallel.make_state import make_state
from megalite.parallel.mesh import Mesh, mesh_of_group
from megalite.parallel.partial import box_norms, total_norm
from megalite.parallel.pieces import Box, Piece, iter_pieces, piece_view
from megalite.parallel.state import ModelState
from megalite.parallel.tensor import TensorSplit
from tests.parallel.layouts import MODELS, build, loss_of, packed_batch

RATE = 0.3
"""Of the SGD steps: large enough that a wrong gradient of the first step shows in the second loss."""
CPU = torch.device("cpu")
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
OTHER_AXES: list[dict[str, Any]] = [
    {"dp_shard": 2},
    {"dp_shard": 1},
    {"tp": 2},
    {"tp": 2, "sequence_parallel": False},
    {"cp": 2},
    {"cp": 4},
]
"""Layouts of four ranks; dp takes what is left."""
STATE_MODELS = ["llama", "qwen3-tied", "gpt2"]
IN_TURN: list[Any] = [
    pytest.param(layout, name, id=f"{layout}-{name}", marks=[] if j == i % 3 else pytest.mark.slow)
    for i, layout in enumerate(OTHER_AXES)
    for j, name in enumerate(STATE_MODELS)
]
"""Each of them with one model after the other; the rest is slow, as in tests/parallel/test_matrix.py."""


@dataclass
class Steps:
    """What steps of training came to."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    """Of every step."""
    weights: dict[str, Tensor] = field(default_factory=dict)
    """After the last."""


FOUR_IN_MATRIX: list[Any] = [2, pytest.param(4, marks=pytest.mark.slow)]
"""Numbers of ranks along dp. Four are in tests/parallel/test_matrix.py and, beside other axes, in `OTHER_AXES`."""


Part = tuple[Piece, tuple[int, ...], Tensor]


@dataclass
class RankSteps:
    """One rank's share of `Steps`."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: list[list[Part]] = field(default_factory=list)
    weights: list[Part] = field(default_factory=list)
    masters: list[Part] = field(default_factory=list)
    copies: list[int] = field(default_factory=list)


def make_batches(count: int, tokens: int = 32) -> list[MicroBatch]:
    """Micro-batches with unequal numbers of valid labels."""
    return [packed_batch(tokens, seed=seed) for seed in range(count)]


def valid_labels(batches: list[MicroBatch]) -> int:
    """Labels of a step that carry loss."""
    return sum(int((batch.labels != IGNORE_INDEX).sum()) for batch in batches)


def one_process(name: str, dtype: torch.dtype, batches: list[MicroBatch], steps: int = 3) -> Steps:
    """The truth: one model, gradients by autograd, plain SGD."""
    model = build(MODELS[name], TensorSplit(), dtype)
    scale, outcome = 1 / valid_labels(batches), Steps()
    for _ in range(steps):
        model.zero_grad()
        total = 0.0
        for batch in batches:
            loss = loss_of(model, batch, None)
            (loss * scale).backward()
            total += float(loss.detach())
        outcome.losses.append(total)
        grads = {piece.name: piece_view(p.grad, piece).clone() for p, _, piece in iter_pieces(model)}
        outcome.gradients.append(grads)
        outcome.norms.append(math.sqrt(sum(float(g.double().square().sum()) for g in grads.values())))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(parameter.grad, alpha=RATE)
    outcome.weights = {piece.name: piece_view(p.detach(), piece) for p, _, piece in iter_pieces(model)}
    return outcome


def sgd(state: ModelState) -> None:
    """One SGD step on what this process owns, published."""
    with torch.no_grad():
        for shard in state.optimizer_shards():
            shard.set_values(shard.values.sub_(shard.main_grad, alpha=RATE))
    state.publish()


def copies_of(boxes: list[Box]) -> list[Part]:
    """Boxes as values that can be sent."""
    return [(box.piece, box.offset, box.tensor.clone()) for box in boxes]


def steps_on_rank(
    layout: ParallelConfig,
    name: str,
    dtype: torch.dtype,
    batches: list[MicroBatch],
    steps: int = 3,
    compute: torch.dtype | None = None,
    change: Callable[[Any], None] = lambda state: None,
    remainders: bool = True,
) -> RankSteps:
    """This rank's part of the steps; the weights are computed with in `compute` (default: dtype).

    `change` is called with the state before the first step: to break it on purpose.
    """
    mesh = mesh_of_group(layout, CPU)
    model = build(MODELS[name], TensorSplit(mesh.tp, layout.sequence_parallel and mesh.tp.size > 1), dtype)
    state = make_state(model, mesh, compute or dtype, layout, remainders=remainders)
    change(state)
    scale, outcome = 1 / valid_labels(batches), RankSteps(copies=state.box_copies())
    mine = batches[mesh.dp.rank :: mesh.dp.size]
    for _ in range(steps):
        state.start_step(len(mine))
        outcome.losses.append(forward_backward(model, mesh, layout, mine, scale))
        state.finish_gradients()
        boxes = state.boxes("main_grad")
        outcome.gradients.append(copies_of(boxes))
        outcome.norms.append(float(total_norm(box_norms(boxes, CPU), state.box_copies(), mesh.world)))
        sgd(state)
    outcome.masters = copies_of(state.boxes("master"))
    state.release()
    if layout.zero != 3:
        outcome.weights = [
            (piece, piece.offset, piece_view(p.detach(), piece).clone()) for p, _, piece in iter_pieces(model)
        ]
    return outcome


def forward_backward(
    model: Any, mesh: Mesh, layout: ParallelConfig, batches: list[MicroBatch], scale: float
) -> float:
    """Forward and backward pass of this rank's micro-batches; the loss summed over all ranks."""
    total = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        split = ContextSplit(mesh.cp, layout.cp_method, batch.bounds) if mesh.cp.size > 1 else None
        loss = loss_of(model, batch if split is None else batch.part(split), split)
        (loss * scale).backward()
        total += loss.detach()
    return float(all_reduce_sum(total, mesh.data))


def whole(parts: list[Part]) -> dict[str, Tensor]:
    """Tensors from the ranks' parts, which cover them completely and agree where they overlap."""
    tensors: dict[str, Tensor] = {}
    for piece, offset, part in parts:
        tensor = tensors.setdefault(piece.name, torch.full(piece.global_shape, torch.nan, dtype=part.dtype))
        place = tensor[tuple(slice(o, o + n) for o, n in zip(offset, part.shape, strict=True))]
        assert (torch.isnan(place) | (place == part)).all(), f"ranks differ in {piece.name}"
        place.copy_(part)
    holes = [name for name, tensor in tensors.items() if torch.isnan(tensor).any()]
    assert not holes, f"no rank has all of {holes}"
    return tensors


def put_together(ranks: list[RankSteps]) -> Steps:
    """One outcome from all ranks', which say the same wherever they speak of the same."""
    assert all(rank.losses == ranks[0].losses and rank.norms == ranks[0].norms for rank in ranks)
    gradients = [
        whole([part for rank in ranks for part in rank.gradients[step]])
        for step in range(len(ranks[0].gradients))
    ]
    masters = whole([part for rank in ranks for part in rank.masters])
    weights = whole([part for rank in ranks for part in rank.weights]) if ranks[0].weights else masters
    check_copies(ranks)
    return Steps(ranks[0].losses, ranks[0].norms, gradients, weights)


def check_copies(ranks: list[RankSteps]) -> None:
    """Over all ranks 1 / copies of the elements add up to each tensor's number of elements."""
    counts: dict[str, float] = {}
    sizes: dict[str, int] = {}
    for rank in ranks:
        for (piece, _, part), copies in zip(rank.gradients[0], rank.copies, strict=True):
            counts[piece.name] = counts.get(piece.name, 0.0) + part.numel() / copies
            sizes[piece.name] = math.prod(piece.global_shape)
    wrong = {name: (count, sizes[name]) for name, count in counts.items() if abs(count - sizes[name]) > 1e-6}
    assert not wrong, f"elements counted, elements there: {wrong}"


def assert_same(got: Steps, truth: Steps, tolerance: float) -> None:
    """Losses, norms, gradients and weights within `tolerance` of the largest gradient (of the largest weight)."""
    for step, (loss, norm) in enumerate(zip(truth.losses, truth.norms, strict=True)):
        assert abs(got.losses[step] - loss) <= tolerance * abs(loss), (step, got.losses[step], loss)
        compare(got.gradients[step], truth.gradients[step], tolerance, f"step {step}, gradient of")
        assert abs(got.norms[step] - norm) <= tolerance * norm, (step, got.norms[step], norm)
    compare(got.weights, truth.weights, tolerance, "weight")


def compare(got: dict[str, Tensor], truth: dict[str, Tensor], tolerance: float, what: str) -> None:
    """Every tensor within `tolerance` of the largest of them all."""
    assert got.keys() == truth.keys()
    largest = max(float(tensor.abs().max()) for tensor in truth.values())
    for name, expected in truth.items():
        error = float((got[name] - expected).abs().max())
        assert error <= tolerance * largest, f"{what} {name}: {error:.3e} of {largest:.3e}"
        assert float(expected.abs().max()) > 0, f"{what} {name} is zero: the test shows nothing"


def check(rank_pool: Any, ranks: int, name: str, dtype: torch.dtype, **layout: Any) -> None:
    """Three steps on so many ranks, two unequal micro-batches on each, against one process."""
    parallel = ParallelConfig(**layout)
    batches = make_batches(2 * parallel.dp_size(ranks))
    got = put_together(rank_pool(ranks).run(steps_on_rank, parallel, name, dtype, batches))
    assert_same(got, one_process(name, dtype, batches), TOLERANCE[dtype])
