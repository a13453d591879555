"""Bytes that each rank sends in a step, by axis: formulas, to be read before a run and held against a traced one.

Counted as rings count: of a collective over n ranks on W bytes in all (the gathered or the scattered whole) a rank
sends W · (n - 1) / n, of an all-reduce twice that; a message between two ranks counts where it is sent. With

    M   micro-batches of a step on one data-parallel rank      T   tokens of one on one rank of cp
    t   tp ranks   c  cp ranks   L  layers of this rank        H   hidden size
    e   bytes of a number of the compute type                  A   T · H · e, a whole activation
    w   4 bytes (8 for float64): statistics, gradients         P   parameters of this rank, with their padding

**tp**, in units of A · (t - 1) / t for each micro-batch:

- each layer 10 with sequence parallelism: qkv and gate-up gather their input, gather it again for the weights'
  gradient and scatter its gradient; both row-parallel products scatter their output and gather its gradient;
  With FP8 and a scale for each token the first two gathers take T · (H + 4) bytes instead: numbers and scales;
- each layer 8 without: two all-reduces forward, two backward;
- the embedding 2; the head 3 with sequence parallelism (gather, gather again, scatter), else 2;
- a layer made again in whole: 3 with sequence parallelism (two gathers, one scatter), else 2; only its MLP: 1 or 0;

besides 4 · w · T · (t - 1) for the loss's statistics, and once a step 2 · (t - 1) / t · w for every gradient of which
the ranks have parts (norms and biases with sequence parallelism, head norms, key heads that ranks share).

**cp**, for each layer and micro-batch, with N and K query and key heads of a tp rank of size D:

- ring: keys and values travel c - 1 times forward and again backward, their gradients c times in w bytes:
  2 · T · K · D · (2 · (c - 1) · e + c · w);
- Ulysses: queries, keys, values and output exchanged, forward and backward: 2 · T · (2N + 2K) · D · e · (c - 1) / c;
- a layer made again in whole adds its forward share.

**pp**, for each micro-batch: A (divided by t with sequence parallelism) for every stage whose output goes to another
rank, and the same for every one whose input's gradient does. A matrix tied between first and last rank: its gradient,
w bytes a number, all-reduced between the two once a step.

**dp** (dp and cp ranks have the same weights; s of them divide the state, r groups have the same part), once a step:

- gradients, g bytes a number on the wire: P · g · ((s - 1) / s + 2 · (r - 1) / (r · s));
- new weights: P · e · (s - 1) / s with ZeRO-1. Without ZeRO s = 1, and they need not travel.
- ZeRO-3, for each micro-batch instead: weights (s - 1) / s · e, twice those of layers (forward and backward), once the
  others (a pipeline that runs several micro-batches forward keeps them gathered, and sends less); gradients
  (s - 1) / s · g and, between groups, 2 · (r - 1) / (r · s) · w. Every parameter's rows are padded to a multiple of s.

Not counted: a few scalars a step (loss, token count, norm, flags).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from megalite.config import ModelConfig, ParallelConfig
from megalite.models.blocks import ModelPart
from megalite.models.transformer import Transformer
from megalite.parallel.buckets import PADDING, plan_slots
from megalite.parallel.mesh import Axis
from megalite.parallel.partial import holders
from megalite.parallel.pieces import iter_pieces
from megalite.parallel.stages import StagePlan, plan_stages
from megalite.parallel.tensor import TensorSplit


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShape:
    """What a step is made of, on one data-parallel rank."""

    micro_batches: int
    """M."""
    micro_batch_tokens: int
    """Tokens of a micro-batch, the parts of all cp ranks together."""
    seq_length: int
    """Tokens of a sample, by which pipeline stages are balanced."""
    dtype: torch.dtype = torch.bfloat16
    """Compute type."""
    made_again: frozenset[int] = frozenset()
    """Layers that are recomputed in whole."""
    mlp_made_again: frozenset[int] = frozenset()
    """Layers of which the MLP is recomputed."""
    rowwise_fp8: bool = False
    """Products are made in FP8 with a scale for each token, which is gathered so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBytes:
    """Bytes one rank sends in a step, by axis."""

    tp: float = 0.0
    cp: float = 0.0
    pp: float = 0.0
    dp: float = 0.0

    @property
    def total(self) -> float:
        """All axes."""
        return self.tp + self.cp + self.pp + self.dp


def step_bytes(
    model: ModelConfig, parallel: ParallelConfig, step: StepShape, *, processes: int, tp_rank: int = 0
) -> list[StepBytes]:
    """Bytes that rank `tp_rank` of each pipeline rank sends in a step; see the module for the formulas.

    Args:
        model: the whole model, its vocabulary size known.
        parallel: the layout.
        step: micro-batches and their sizes.
        processes: of the whole run.
        tp_rank: tensor-parallel ranks differ only in the padding of their buckets.

    Raises:
        UserError: the layout fits neither the model nor the number of processes.
    """
    parallel.validate_model(model)
    dp = parallel.dp_size(processes)
    plan = plan_stages(model, parallel, step.seq_length)
    result = []
    for rank in range(parallel.pp):
        local = _Local(model, parallel, step, plan, rank, tp_rank)
        result.append(
            StepBytes(
                tp=_tensor_bytes(local, dp),
                cp=_context_bytes(local),
                pp=_pipeline_bytes(local, dp),
                dp=_data_bytes(local, dp),
            )
        )
    return result


class _Local:
    """One rank's part of the model, on the meta device, and the sizes that formulas need."""

    def __init__(
        self,
        model: ModelConfig,
        parallel: ParallelConfig,
        step: StepShape,
        plan: StagePlan,
        rank: int,
        tp_rank: int,
    ) -> None:
        self.model, self.parallel, self.step, self.plan, self.rank = model, parallel, step, plan, rank
        self.stages = plan.stages_of(rank)
        self.layers = sum(len(plan.layers[stage]) for stage in self.stages)
        self.first, self.last = 0 in self.stages, plan.num_stages - 1 in self.stages
        self.sequence = parallel.sequence_parallel and parallel.tp > 1
        self.itemsize, self.wide = step.dtype.itemsize, max(4, step.dtype.itemsize)
        self.tokens = step.micro_batch_tokens // parallel.cp
        self.activation = self.tokens * model.hidden_size * self.itemsize
        numbers = tuple(layer for stage in self.stages for layer in plan.layers[stage])
        self.again = len(step.made_again.intersection(numbers))
        self.mlp_again = len(step.mlp_made_again.intersection(numbers))
        split = TensorSplit(Axis(parallel.tp, tp_rank), self.sequence)
        part = ModelPart(numbers, embedding=self.first, head=self.last)
        self.module = Transformer(model, split, part=part, device="meta")

    def partial_elements(self) -> int:
        """Elements of all gradients that tensor-parallel ranks have parts of, laid side by side."""
        pieces = (
            (parameter, piece) for parameter, _, piece in iter_pieces(self.module) if piece.tp == "partial"
        )
        return sum(
            holders(piece)[1] * (piece.rows[1] - piece.rows[0]) * math.prod(parameter.shape[1:])
            for parameter, piece in pieces
        )

    def padded_rows(self, shard: int) -> tuple[int, int]:
        """Elements (of layers, of all else) with every parameter's rows padded to a multiple of `shard`."""

        def padded(parameters: Iterable[Tensor]) -> int:
            return sum(-(-p.shape[0] // shard) * shard * (p.numel() // p.shape[0]) for p in parameters)

        layers = padded(self.module.layers.parameters())
        return layers, padded(self.module.parameters()) - layers

    def bucket_sizes(self, data: int) -> list[tuple[int, bool]]:
        """(padded elements, tied) of every bucket, with `data` ranks that have the same weights."""
        unit = math.lcm(data, PADDING)
        return [
            (-(-slots[-1].stop // unit) * unit, slots[0].pieces[0].tied)
            for decay in (True, False)
            for slots in plan_slots(self.module, decay, self.parallel.bucket_size)
        ]


def _groups(local: _Local, dp: int) -> tuple[int, int]:
    """(s ranks that divide the state, r that have the same part of it)."""
    parallel = local.parallel
    data = dp * parallel.cp
    if parallel.zero == 0:
        return 1, data
    shard = (parallel.dp_shard or dp) * parallel.cp
    return shard, data // shard


def _tensor_bytes(local: _Local, dp: int) -> float:
    tp = local.parallel.tp
    if tp == 1:
        return 0.0
    units = local.layers * (10 if local.sequence else 8) + local.again * (3 if local.sequence else 2)
    units += local.mlp_again * local.sequence
    units += 2 * local.first + (3 if local.sequence else 2) * local.last
    quantizing = local.sequence and local.step.rowwise_fp8
    gathers = 2 * (local.layers + local.again) + local.mlp_again if quantizing else 0
    quantized = local.tokens * (local.model.hidden_size + 4)
    each = ((units - gathers) * local.activation + gathers * quantized) * (tp - 1) / tp
    statistics = 4 * local.wide * local.tokens * (tp - 1) * local.last
    partial = 2 * (tp - 1) / tp * local.wide * local.partial_elements() / _groups(local, dp)[0]
    return local.step.micro_batches * (each + statistics) + partial


def _context_bytes(local: _Local) -> float:
    cp, tp, model = local.parallel.cp, local.parallel.tp, local.model
    if cp == 1:
        return 0.0
    head = local.tokens * model.size_per_head
    keys, queries = max(1, model.kv_heads // tp), model.num_attention_heads // tp
    if local.parallel.cp_method == "ring":
        forward = 2.0 * head * keys * (cp - 1) * local.itemsize
        backward = forward + 2.0 * head * keys * cp * local.wide
    else:
        forward = backward = head * (2 * queries + 2 * keys) * local.itemsize * (cp - 1) / cp
    layers = local.layers * (forward + backward) + local.again * forward
    return local.step.micro_batches * layers


def _pipeline_bytes(local: _Local, dp: int) -> float:
    plan, parallel = local.plan, local.parallel
    if parallel.pp == 1:
        return 0.0
    crossings = 0
    for stage in local.stages:
        for neighbour in (stage - 1, stage + 1):
            inside = 0 <= neighbour < plan.num_stages
            crossings += inside and plan.rank_of(neighbour) != local.rank
    activation = local.activation / (parallel.tp if local.sequence else 1)
    shard, _ = _groups(local, dp)
    tied = sum(size for size, is_tied in local.bucket_sizes(dp * parallel.cp) if is_tied) / shard
    return local.step.micro_batches * crossings * activation + tied * local.wide


def _data_bytes(local: _Local, dp: int) -> float:
    parallel = local.parallel
    shard, same = _groups(local, dp)
    wire = 2 if parallel.grad_reduce_dtype == "bf16" else local.wide
    inside, between = (shard - 1) / shard, 2 * (same - 1) / (same * shard)
    if parallel.zero == 3 and shard > 1:
        layers, others = local.padded_rows(shard)
        weights = (2 * layers + others) * local.itemsize * inside
        gradients = (layers + others) * (wire * inside + local.wide * between)
        return local.step.micro_batches * (weights + gradients)
    elements = sum(size for size, _ in local.bucket_sizes(dp * parallel.cp))
    return elements * (wire * (inside + between) + local.itemsize * inside)
