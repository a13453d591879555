"""What the passes of a step keep on one rank, and what they make again: the largest part of the memory estimate.

`megalite.train.memory_estimate` has the formulas.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megalite.config import ModelConfig, ParallelConfig, RecomputeConfig
from megalite.config_parallel import ZERO_BUBBLE
from megalite.layers.recompute import KEEP, Recompute
from megalite.layers.recompute_plan import Share, kept_bytes, layer_bytes, recompute_plan
from megalite.parallel.action_table import Op, Step, Table, schedule_table
from megalite.parallel.data import lent_together
from megalite.parallel.stages import StagePlan, plan_stages


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is to be trained, and how."""

    model: ModelConfig
    parallel: ParallelConfig
    world_size: int
    tokens: int
    """Of one micro-batch of a data-parallel rank, before context parallelism divides them."""
    num_microbatches: int = 1
    itemsize: int = 2
    """Bytes of a number of the compute type."""
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    seq_length: int = 0
    """Tokens of a sample, which the balance of pipeline stages depends on; 0: one micro-batch is one sample."""
    fp8_copies: bool = False
    """Matrices of layers keep FP8 copies through a step of several micro-batches."""
    remainders: bool = True
    """bf16 weights are a part of their masters, where masters are not the weights."""
    gpu: bool = True
    """The chunk of logits is a GPU's, not a CPU's, and so is what costs next to nothing to make again."""
    compiled: bool = False
    """Blocks are compiled."""
    fp8: bool = False
    """Blocks multiply in FP8."""

    @property
    def share(self) -> Share:
        """One rank's part of a micro-batch."""
        return Share.of(self.parallel, self.tokens, self.itemsize)

    @property
    def stages(self) -> StagePlan:
        """Where the layers are."""
        return plan_stages(self.model, self.parallel, self.seq_length or self.tokens)

    @property
    def adds_in_place(self) -> bool:
        """Products of gradients are added to main gradients: not where zero=3 divides them between passes."""
        return self.parallel.zero != 3 or self.state_ranks == 1

    @property
    def lends_gradients(self) -> bool:
        """Activations stand where gradients are going to: in a single process on a CPU, with one micro-batch in a step
        (`megalite.parallel.data`). A compiled block clears its gradients in the forward pass."""
        alone = self.world_size == self.num_microbatches == 1 and not self.gpu and not self.compiled
        return alone and max(matrix_sizes(self.model)) >= lent_together(self.parallel)

    @property
    def state_ranks(self) -> int:
        """n: ranks that divide the optimizer's state."""
        if self.parallel.zero == 0:
            return 1
        dp = self.parallel.dp_size(self.world_size)
        return (self.parallel.dp_shard or dp) * self.parallel.cp


def matrix_sizes(model: ModelConfig) -> tuple[int, int]:
    """Elements of the head, and of a layer's widest matrix, in one process."""
    projected = (model.num_attention_heads + 2 * model.kv_heads) * model.size_per_head
    rows = max(projected, (1 + model.gated) * model.ffn_hidden_size)
    return vocabulary_rows(model) * model.hidden_size, rows * model.hidden_size


def vocabulary_rows(model: ModelConfig, tp: int = 1) -> int:
    """Rows of the embedding, or of the head, that a tensor-parallel rank holds."""
    return -(-model.padded_vocab_size // tp)


def activation_peaks(job: Job) -> tuple[int, ...]:
    """Bytes of activations that each pipeline rank keeps at the schedule's peak."""
    rows, sizes = _rows(job), stage_bytes(job)
    return tuple(_peak(row, sizes, _waiting(job, sizes)) for row in rows)


def _rows(job: Job) -> Table:
    """What each pipeline rank computes in a step."""
    parallel = job.parallel
    if parallel.pp == 1:
        return (((Op(0, "F", 0),), (Op(0, "B", 0),)),)
    return schedule_table(parallel.pp_schedule, parallel.pp, parallel.stages_per_rank, job.num_microbatches)


def _waiting(job: Job, whole: Sequence[int]) -> Sequence[int]:
    """What each stage keeps of one micro-batch between its I and its W pass."""
    if job.parallel.pp == 1 or job.parallel.pp_schedule not in ZERO_BUBBLE:
        return whole
    return [weight_factors(job, len(layers)) for layers in job.stages.layers]


def _peak(row: Iterable[Step], whole: Sequence[int], waiting: Sequence[int]) -> int:
    """Most bytes that a rank keeps; its own order alone decides that, not when it waits for others."""
    kept = most = 0
    for step in row:
        for op in step:
            all_of_it, rest = whole[op.stage], waiting[op.stage]
            kept += {"F": all_of_it, "I": rest - all_of_it, "W": -rest, "B": -all_of_it}[op.kind]
            most = max(most, kept)
    return most


def stage_bytes(job: Job) -> list[int]:
    """What each stage keeps of one micro-batch, from its forward to its backward pass."""
    choices = recompute_choices(job)
    return [_stage_bytes(job, job.stages, stage, choices) for stage in range(job.parallel.num_stages)]


def _stage_bytes(job: Job, plan: StagePlan, stage: int, choices: Mapping[int, Recompute]) -> int:
    share, model, tokens = job.share, job.model, job.share.tokens
    stream = share.stream_tokens * model.hidden_size * share.itemsize
    size = sum(kept_bytes(model, share, choices[layer]) for layer in plan.layers[stage])
    if model.position == "rope":
        size += tokens * model.size_per_head * share.wide
    if not stage and share.tp > 1:
        size += 9 * tokens
    return size + (loss_bytes(job) if stage == plan.num_stages - 1 else stream)


def loss_bytes(job: Job) -> int:
    """What final norm and loss keep of one micro-batch."""
    model, share = job.model, job.share
    statistics = (1 if model.norm == "rms" else 2) * share.wide
    stream = share.stream_tokens * model.hidden_size * share.itemsize
    kept = stream + share.stream_tokens * statistics
    if share.tp > 1:
        return kept + stream + share.tokens * share.wide
    gradient = 0 if job.adds_in_place else vocabulary_rows(model) * model.hidden_size * share.wide
    return kept + share.tokens * model.hidden_size * share.itemsize + gradient


def weight_factors(job: Job, layers: int) -> int:
    """What waits for the W pass of one micro-batch: inputs and gradients of every product's output."""
    share, model = job.share, job.model
    kept = layer_bytes(model, share)
    whole = share.tokens * model.hidden_size * share.itemsize  # gathered, with sequence parallelism
    out = share.tokens * (model.num_attention_heads // share.tp) * model.size_per_head * share.itemsize
    projected = layer_bytes(model, Share(share.tokens, share.itemsize, share.tp)).projected
    return layers * (4 * whole + out + projected + kept.inner + kept.active)


def recompute_choices(job: Job) -> dict[int, Recompute]:
    """Layer → what it makes again, for all layers of the model.

    A budget is each pipeline rank's own, for all that it keeps when it keeps most.

    Raises:
        UserError: a budget that cannot be met.
    """
    plan, share = job.stages, job.share
    rows = _rows(job) if job.recompute.kind == "budget" else ()
    choices: dict[int, Recompute] = {}
    for rank in range(job.parallel.pp):
        own = plan.stages_of(rank)
        layers = [layer for stage in own for layer in plan.layers[stage]]

        def kept(chosen: Sequence[Recompute], own: Any = own, layers: Any = layers, rank: int = rank) -> int:
            trial = dict(zip(layers, chosen, strict=True))
            sizes = [0] * plan.num_stages
            for stage in own:
                sizes[stage] = _stage_bytes(job, plan, stage, trial)
            return _peak(rows[rank], sizes, _waiting(job, sizes))

        chosen = recompute_plan(job.model, job.recompute, share, len(layers), kept, cheap_choice(job))
        choices.update(zip(layers, chosen, strict=True))
    return choices


def cheap_choice(job: Job) -> Recompute:
    """What costs next to nothing to make again.

    On CPUs, whose passes over memory are a tenth of a step, only where the backward pass that reads a tensor's sources
    anyway writes it again (`megalite.parallel.handover`): no longer steps seen; passes of their own took 5 %.
    """
    if job.gpu or job.compiled or job.fp8 or not job.adds_in_place:
        return KEEP
    return Recompute(norm=job.parallel.tp == 1, activation=True)
