"""Some steps of training in any layout, through `Replica` as the trainer runs it, and by one process without it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megalite.config import IGNORE_INDEX, ModelConfig, ParallelConfig
from megalite.data.loader import MicroBatch
from megalite.models.transformer import Transformer
from megalite.parallel.collectives import all_reduce_sum
from megalite.parallel.pieces import iter_pieces, piece_view
from megalite.parallel.state import ModelState
from megalite.parallel.tensor import TensorSplit
from megalite.train.replica import Replica
from tests.parallel.layouts import Outcome, assert_equal, build, gradient_pieces, loss_of
from tests.parallel.replicas import Part, make_replica, parts_of, put_parts_together

Update = Callable[[ModelState, int], None]
"""Changes the weights of a state from its gradients, given how many steps were done before; all else is done here."""


@dataclass
class RankTraining:
    """What one rank has to show after some steps; gradients are of the mean loss over the valid labels of a step."""

    losses: list[float]
    norms: list[float]
    initial: list[Part]
    gradients: list[Part]
    """The first step's."""
    weights: list[Part]
    """After the last step."""
    scores: Tensor
    """[T] token losses of the first micro-batch with them."""


@dataclass
class Training:
    """The same of the whole model: equal in every layout."""

    losses: list[float]
    norms: list[float]
    initial: dict[str, Tensor]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]
    scores: Tensor | None = None
    """None: not known, and not compared."""

    @property
    def outcome(self) -> Outcome:
        """The first step."""
        return Outcome(self.losses[0], self.norms[0], self.gradients)


def valid_labels(batches: list[MicroBatch]) -> int:
    """Labels that carry loss."""
    return sum(int((batch.labels != IGNORE_INDEX).sum()) for batch in batches)


def descend(state: ModelState, step: int, learning_rate: float = 0.1) -> None:
    """Plain gradient descent, in every step the same."""
    for shard in state.optimizer_shards():
        shard.set_values(shard.values.sub_(shard.main_grad, alpha=learning_rate))


def train_layout(
    layout: ParallelConfig,
    config: ModelConfig,
    dtype: torch.dtype,
    batches: list[MicroBatch],
    steps: int = 1,
    update: Update = descend,
) -> RankTraining:
    """One rank's part of steps over all batches (dealt to the ranks of dp in turn); a job for a rank pool.

    In a process that is in no group, the layout of one process.
    """
    replica = make_replica(layout, config, dtype, batches[0].tokens.numel())
    initial = parts_of(replica, "master")
    losses, norms, gradients = [], [], []
    for step in range(steps):
        loss, norm = _step(replica, batches)
        losses.append(loss)
        norms.append(norm)
        if step == 0:
            gradients = parts_of(replica, "main_grad")
        with torch.no_grad():
            update(replica.state, step)
        replica.state.publish()
    scores = replica.token_losses(batches[0])
    replica.state.release()
    return RankTraining(losses, norms, initial, gradients, parts_of(replica, "master"), scores)


def _step(replica: Replica, batches: list[MicroBatch]) -> tuple[float, float]:
    """Gradients of the mean loss; it and their norm, as every rank is told."""
    mesh, count = replica.mesh, valid_labels(batches)
    wide = torch.promote_types(replica.dtype, torch.float32)
    total = replica.gradients(batches[mesh.dp.rank :: mesh.dp.size], torch.tensor(1 / count, dtype=wide))
    replica.state.finish_gradients()
    for axis in (mesh.data, mesh.pp):  # tensor-parallel ranks score the same labels
        all_reduce_sum(total, axis)
    return float(total) / count, float(replica.grad_norm()[0])


def whole_training(ranks: list[RankTraining]) -> Training:
    """What all ranks show, put together; what several of them have must be the same in every bit."""
    first = ranks[0]
    for rank in ranks:
        assert rank.losses == first.losses, f"ranks differ in the loss: {rank.losses} and {first.losses}"
        assert rank.norms == first.norms, f"ranks differ in the norm: {rank.norms} and {first.norms}"
    assert all(torch.equal(rank.scores, ranks[0].scores) for rank in ranks), "ranks differ in token losses"
    kinds = {
        kind: put_parts_together([part for rank in ranks for part in getattr(rank, kind)])
        for kind in ("initial", "gradients", "weights")
    }
    return Training(first.losses, first.norms, **kinds, scores=first.scores)


def assert_layout_equals(
    run: Callable[..., list[RankTraining]],
    layout: ParallelConfig,
    config: ModelConfig,
    batches: list[MicroBatch],
    steps: int = 3,
) -> None:
    """Training in a layout, in float64, against one process; `run` is that of a rank pool."""
    ranks = run(train_layout, layout, config, torch.float64, batches, steps)
    assert_same_training(
        whole_training(ranks), train_alone(config, torch.float64, batches, steps=steps), 1e-10
    )


def train_alone(
    config: ModelConfig,
    dtype: torch.dtype,
    batches: list[MicroBatch],
    *,
    steps: int,
    learning_rate: float = 0.1,
) -> Training:
    """The truth: the model, autograd and a loop; nothing of what divides a model over ranks takes part."""
    model = build(config, TensorSplit(), dtype)
    found = Training([], [], _weights(model), {}, {})
    count = valid_labels(batches)
    for step in range(steps):
        total = torch.zeros((), dtype=torch.float64)
        for batch in batches:
            loss = loss_of(model, batch, None)
            (loss / count).backward()
            total += loss.detach()
        gradients = {piece.name: grad.clone() for piece, grad in gradient_pieces(model)}
        found.losses.append(float(total) / count)
        found.norms.append(float(torch.cat([g.double().flatten() for g in gradients.values()]).norm()))
        found.gradients = found.gradients if step else gradients
        with torch.no_grad():
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.sub_(parameter.grad, alpha=learning_rate)
                parameter.grad = None
    first = batches[0]
    found.weights = _weights(model)
    where = {"positions": first.positions, "cu_seqlens": first.cu_seqlens, "max_seqlen": first.max_seqlen}
    with torch.no_grad():
        found.scores = model.token_losses(first.tokens, first.labels, **where)
    return found


def _weights(model: Transformer) -> dict[str, Tensor]:
    return {piece.name: piece_view(p.detach(), piece).clone() for p, _, piece in iter_pieces(model)}


def assert_same_training(got: Training, truth: Training, tolerance: float) -> None:
    """Initial bits, and within `tolerance`: losses, norms, gradients, weights and token losses.

    Gradients and weights count relative to the model's largest gradient, which a learning rate below 1 makes strict
    for the weights.
    """
    for name, initial in truth.initial.items():
        assert torch.equal(got.initial[name], initial), f"{name} starts with other bits"
    assert_equal(got.outcome, truth.outcome, tolerance)
    for what, ours, theirs in (("loss", got.losses, truth.losses), ("norm", got.norms, truth.norms)):
        for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert abs(a - b) <= tolerance * abs(b), f"{what} of step {step}: {a} and {b}"
    largest = max(float(g.abs().max()) for g in truth.gradients.values())
    assert got.weights.keys() == truth.weights.keys()
    for name, expected in truth.weights.items():
        error = float((got.weights[name] - expected).abs().max())
        assert error <= tolerance * largest, f"{name} after the last step: {error:.3e} of {largest:.3e}"
        assert not torch.equal(expected, truth.initial[name]), f"{name} was never updated"
    if got.scores is not None and truth.scores is not None:
        error = float((got.scores - truth.scores).abs().max())
        assert error <= tolerance * float(truth.scores.abs().max()), f"token losses: {error:.3e}"
