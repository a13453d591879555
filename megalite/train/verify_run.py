"""The few steps that `megalite verify` compares: on one process without any of our layers' splits, and on the ranks.

`truth` is a plain loop: one model, autograd, gradients of a mean over all valid labels, three SGD steps. `run_rank`
takes the same steps the way the trainer does, through `Replica` and its `ModelState`. Steps are SGD because Adam
would turn a gradient that is zero but for rounding into an update of ± learning rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megalite.config import ModelConfig, ParallelConfig, RecomputeConfig
from megalite.data.loader import MicroBatch
from megalite.models.transformer import Transformer
from megalite.parallel.collectives import all_reduce_sum
from megalite.parallel.mesh import Mesh
from megalite.parallel.pieces import Box, iter_pieces, piece_view
from megalite.parallel.random import initialize
from megalite.parallel.state import ModelState
from megalite.train.replica import Replica, build_replica
from megalite.train.trainer import count_valid_tokens
from megalite.train.verify_model import packed_batches, valid_labels
from megalite.train.verify_trace import Trace, rows_here, runs_of
from megalite_kernels.ops.fp8_linear import Scaling

STEPS = 3
RATE = 0.1
"""Learning rate of the SGD steps: with gradients of a mean loss, updates of some per cent of the weights."""
SEED = 7
DTYPES = {"float64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}
SCALINGS: dict[str, Scaling] = {"fp8-rowwise": "rowwise", "fp8-tensorwise": "tensorwise"}
"""Types in which the blocks multiply in FP8 and everything else is bf16."""


@dataclass(frozen=True, slots=True)
class Task:
    """One model and one step's data, and how to spread them."""

    model: ModelConfig
    parallel: ParallelConfig
    recompute: RecomputeConfig
    dp: int
    micro_batches: int
    """Of all data-parallel ranks together."""
    tokens: int
    dtype: str
    trace: bool = False
    """Record what goes through the layers too."""

    def batches(self) -> list[MicroBatch]:
        """All micro-batches of a step, the same on every process and in every step."""
        return packed_batches(self.micro_batches, self.tokens)


@dataclass(frozen=True, slots=True)
class Block:
    """Part of a canonical tensor, as one process holds it."""

    name: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    values: Tensor

    @property
    def index(self) -> tuple[slice, ...]:
        """Its place in the whole tensor."""
        return tuple(slice(o, o + n) for o, n in zip(self.offset, self.values.shape, strict=True))


@dataclass(frozen=True, slots=True)
class Place:
    """Where a process stands."""

    rank: int
    axes: dict[str, tuple[int, int]]
    """Axis → (rank, size), of axes with more than one process."""

    def __str__(self) -> str:
        parts = [f"{name} {rank} of {size}" for name, (rank, size) in self.axes.items()]
        return f"rank {self.rank} ({', '.join(parts)})" if parts else f"rank {self.rank}"


@dataclass(frozen=True, slots=True)
class Answer:
    """What one process computed."""

    place: Place
    losses: list[float]
    """Mean loss of each step."""
    norms: list[float]
    """Gradient norm of each step."""
    token_losses: dict[int, Tensor]
    """Micro-batch → loss of each of its tokens [T], before the first step; of those this rank took part in."""
    gradients: list[Block]
    """Of the first step."""
    weights: list[Block]
    """After the last step."""
    outputs: list[Block]
    """What modules gave for the first micro-batch of this rank in the first step, if it was traced."""
    output_gradients: list[Block]
    """Gradients of the mean loss by them."""


@dataclass(frozen=True, slots=True)
class Truth:
    """What one process computed by the plain loop, in float64."""

    losses: list[float]
    norms: list[float]
    token_losses: dict[int, Tensor]
    gradients: dict[str, Tensor]
    initial: dict[str, Tensor]
    weights: dict[str, Tensor]
    """By canonical name, as the other two, in the order of the forward pass."""


def truth(task: Task) -> Truth:
    """The steps on one process, in float64, with nothing but the model and autograd."""
    model = Transformer(task.model)
    initialize(model, seed=SEED)
    model.double()
    batches = task.batches()
    scale = 1.0 / valid_labels(batches)
    with torch.no_grad():
        token_losses = {
            number: model.token_losses(batch.tokens, batch.labels, **_where(batch))
            for number, batch in enumerate(batches)
        }
    initial = _pieces(model, lambda parameter: parameter.detach().clone())
    losses, norms, gradients = [], [], {}
    for step in range(STEPS):
        model.zero_grad()
        loss = (
            torch.stack([model.loss(batch.tokens, batch.labels, **_where(batch)) for batch in batches]).sum()
            * scale
        )
        loss.backward()
        found = _pieces(model, lambda parameter: parameter.grad)
        if step == 0:
            gradients = {name: gradient.clone() for name, gradient in found.items()}
        losses.append(float(loss.detach()))
        norms.append(math.sqrt(sum(float(g.square().sum()) for g in found.values())))
        with torch.no_grad():
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.sub_(parameter.grad, alpha=RATE)
    weights = _pieces(model, lambda parameter: parameter.detach())
    return Truth(losses, norms, token_losses, gradients, initial, weights)


def _pieces(model: Transformer, of: Callable[[nn.Parameter], Tensor | None]) -> dict[str, Tensor]:
    """What `of` gives for each parameter, by canonical name, in the order of the forward pass."""
    found = {}
    for parameter, _, piece in iter_pieces(model):
        tensor = of(parameter)
        assert tensor is not None, piece.name
        found[piece.name] = piece_view(tensor, piece)
    return found


def _where(batch: MicroBatch) -> dict[str, Any]:
    return {
        "positions": batch.positions,
        "cu_seqlens": batch.cu_seqlens,
        "max_seqlen": batch.max_seqlen,
    }


def run_rank(task: Task, mesh: Mesh) -> Answer:
    """One process's part of the steps, as the trainer takes them."""
    replica = build_replica(
        task.model,
        task.parallel,
        mesh,
        dtype=DTYPES.get(task.dtype, torch.bfloat16),
        micro_batch_tokens=task.tokens,
        fill=lambda model: initialize(model, seed=SEED),
        recompute=task.recompute,
        fp8=SCALINGS.get(task.dtype),
    )
    numbers = range(mesh.dp.rank, task.micro_batches, mesh.dp.size)
    every = task.batches()
    batches = [every[number].to(mesh.device) for number in numbers]
    token_losses = {numbers[0]: replica.token_losses(batches[0]).cpu()}
    losses, norms, gradients = [], [], []
    trace = Trace()
    for step in range(STEPS):
        if task.trace and step == 0:
            trace.follow(replica.model)
        loss, norm = _step(replica, batches)
        trace.stop()
        losses.append(loss)
        norms.append(norm)
        if step == 0:
            gradients = _blocks(replica.state.boxes("main_grad"))
        _descend(replica.state)
    weights = _blocks(replica.state.boxes("master"))
    replica.state.release()
    rows = rows_here(mesh, task.parallel, every[numbers[0]].bounds)
    outputs, output_gradients = (
        [
            block
            for name, x in tensors.items()
            for block in _token_blocks(name, numbers[0], x, rows, task.tokens)
        ]
        for tensors in (trace.outputs, trace.gradients)
    )
    return Answer(_place(mesh), losses, norms, token_losses, gradients, weights, outputs, output_gradients)


def trace_truth(task: Task) -> Trace:
    """What goes through one process's layers, for the first micro-batch of each data-parallel rank, in float64.

    Names are in the order of the forward pass, in both kinds of tensors.
    """
    model = Transformer(task.model)
    initialize(model, seed=SEED)
    model.double()
    traces = []
    batches = task.batches()
    for batch in batches[: task.dp]:
        traces.append(Trace().follow(model))
        loss = model.loss(batch.tokens, batch.labels, **_where(batch))
        (loss / valid_labels(batches)).backward()
        traces[-1].stop()
    found = Trace()
    for module in traces[0].outputs:
        for number, trace in enumerate(traces):
            found.outputs[traced_name(module, number)] = trace.outputs[module]
            found.gradients[traced_name(module, number)] = trace.gradients[module]
    return found


def traced_name(module: str, micro_batch: int) -> str:
    """Name of what a module gave for a micro-batch."""
    return f"{module} (micro-batch {micro_batch})"


def _token_blocks(module: str, number: int, x: Tensor, rows: list[int], tokens: int) -> Iterator[Block]:
    """The parts of a tensor [tokens, H] that this rank has the given rows of, if it has just those."""
    if x.dim() == 2 and x.shape[0] == len(rows):
        for place, first, count in runs_of(rows):
            shape = (tokens, x.shape[1])
            yield Block(traced_name(module, number), shape, (first, 0), x[place : place + count])


def _step(replica: Replica, batches: list[MicroBatch]) -> tuple[float, float]:
    """Gradients of the mean over the valid labels of all processes: mean loss and gradient norm."""
    mesh = replica.mesh
    valid = all_reduce_sum(count_valid_tokens(batches), mesh.dp)
    scale = 1.0 / valid.double()
    loss = replica.gradients(batches, scale)
    if mesh.tp.rank:
        loss.zero_()  # tensor-parallel ranks score the same labels
    loss = all_reduce_sum(loss, mesh.world) * scale
    replica.state.finish_gradients()
    norm, _ = replica.grad_norm()
    return float(loss), float(norm)


@torch.no_grad()
def _descend(state: ModelState) -> None:
    """One step of SGD on this process's part of the state."""
    for shard in state.optimizer_shards():
        shard.set_values(shard.values.sub_(shard.main_grad, alpha=RATE))
    state.publish()


def _blocks(boxes: Sequence[Box]) -> list[Block]:
    return [
        Block(box.piece.name, box.piece.global_shape, box.offset, box.tensor.detach().double().cpu().clone())
        for box in boxes
    ]


def _place(mesh: Mesh) -> Place:
    axes = {name: getattr(mesh, name) for name in ("tp", "cp", "pp", "dp")}
    return Place(mesh.rank, {name: (axis.rank, axis.size) for name, axis in axes.items() if axis.size > 1})
