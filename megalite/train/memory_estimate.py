"""Bytes that one rank needs to train a model in a layout, term by term, before anything is allocated.

With P parameters on a rank, e bytes per number of the compute type, w = 4 (8 in float64), and n ranks that divide
the optimizer's state (dp_shard · cp; 1 with zero=0):

    weights         e · P                   zero=3: w · P / n, which is the master too
    gradients       w · P                   zero=3: w · P / n
    optimizer       2 w · P / n moments, and where the compute type is narrower w · P / n masters, or 2 · P / n bytes
                    of remainders (`OptimizerConfig.store_param_remainders`)
    quantized       FP8, several micro-batches, not zero=3: rows and columns of every matrix of a layer, 2 bytes a
                    number and 4 for each row and column, while a step's passes run (train.fp8_copies)
    gathered        zero=3: e · (what no layer holds + 2 layers), and one layer's gradient before and after widening
    activations     peak over the schedule of the sum over micro-batches in flight of what each stage keeps:
                    its layers (`megalite.layers.recompute_plan`), T · D · w of angle tables, and
                      first stage, tp > 1   9 bytes per token (local ids, mask)
                      stage not the last    T' · H · e, its output, which the engine keeps
                      last stage            the final norm's T' · (H · e + s · w), and of the loss
                                            tp = 1: dx T · H · e, made in the forward pass, and with zero=3 dweight
                                            V · H · w, which elsewhere is added to the gradients there;
                                            tp > 1: T' · H · e hidden states and T · w log-sum-exps
    pipeline        T' · H · e for each stage that receives activations, and for each that receives gradients: what
                    is on its way (looped_bfs posts the receives of a whole step: as much for each micro-batch)
    communication   grad_reduce_dtype="bf16": two buckets on their way, sent and received; fp32 travels in place
    workspace       the largest of: the loss (a chunk of logits; with tp > 1 also tokens and dx); the backward pass of
                    one layer (gradients of T · (3f + 2H), and what is made again; with a handover on CPUs the
                    activation's output stands over its gradient and the gradient of its input over that) less what
                    the loss and the layers after it have given back by then. With zero=3 the loss
                    also makes a gradient of V / tp rows, which waits for the embedding's where the matrix is tied;
                    and the embedding's gradient is the largest where it is larger than all activations of that
                    micro-batch.

P of a layer is (n + 2k) D H + n D H + (2 or 1) f H + f H with biases and norms; V is padded to a multiple that tp
divides. Between the I and the W pass of a zero-bubble schedule a stage keeps the factors of its layers' weight
gradients instead: T · (4 H + (n + 2k) D + n D + 3f) · e for each layer (2f without a gate), recomputed or not.

Not counted: alignment of flat buffers (less than 0.1 % of real models), what the allocator loses to fragments, the
collective library's own buffers, the CUDA context, and the gradients of a pipeline's inputs, which the engine could
free once they are sent but holds until the next step (micro_batches · T' · H · e for each stage that receives
activations).

Source: Korthikanti et al., arXiv 2205.05198 (activations); Rajbhandari et al., arXiv 1910.02054 (state).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from megalite.config import ModelConfig, ParallelConfig, RecomputeConfig
from megalite.config_parallel import ZERO_BUBBLE
from megalite.layers.recompute import KEEP, Recompute
from megalite.layers.recompute_plan import Share, kept_bytes, layer_bytes, recompute_plan
from megalite.parallel.action_table import Op, Step, Table, schedule_table
from megalite.parallel.stages import StagePlan, plan_stages
from megalite_kernels.reference.linear_cross_entropy import CPU_LIMITS, ROW_ALIGNMENT, chunk_rows, cuda_limits

GPU_BALANCE = 295
"""Of an H100; decides the chunk of logits."""


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
    def state_ranks(self) -> int:
        """n: ranks that divide the optimizer's state."""
        if self.parallel.zero == 0:
            return 1
        dp = self.parallel.dp_size(self.world_size)
        return (self.parallel.dp_shard or dp) * self.parallel.cp


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMemory:
    """Bytes of one pipeline rank; the module's docstring has the formulas."""

    pp_rank: int
    parameters: int
    """Elements of weights on the rank (before zero=3 divides them)."""
    weights: int
    gradients: int
    optimizer: int
    quantized: int
    gathered: int
    activations: int
    pipeline: int
    communication: int
    workspace: int

    @property
    def terms(self) -> dict[str, int]:
        """Bytes by name."""
        return {
            f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("pp_rank", "parameters")
        }

    @property
    def total(self) -> int:
        """The sum of all terms."""
        return sum(self.terms.values())


def estimate_memory(job: Job) -> tuple[RankMemory, ...]:
    """The memory of every pipeline rank; ranks of the other axes need the same.

    Raises:
        UserError: the schedule does not fit the number of micro-batches, the layout not the model or the number of
            processes, or the recomputation budget is too small.
    """
    job.parallel.validate_model(job.model)
    job.parallel.validate_microbatches(job.num_microbatches)
    kept, sizes = activation_peaks(job), stage_bytes(job)
    choices = recompute_choices(job)
    return tuple(_rank_memory(job, rank, kept[rank], sizes, choices) for rank in range(job.parallel.pp))


def worst_rank(job: Job) -> RankMemory:
    """The rank that needs most; raises as `estimate_memory`."""
    return max(estimate_memory(job), key=lambda memory: memory.total)


def _rank_memory(
    job: Job, rank: int, activations: int, sizes: list[int], choices: Mapping[int, Recompute]
) -> RankMemory:
    e, wide, n = job.itemsize, job.share.wide, job.state_ranks
    parallel, plan = job.parallel, job.stages
    own = plan.stages_of(rank)
    layers = sum(len(plan.layers[stage]) for stage in own)
    first, last = 0 in own, plan.num_stages - 1 in own
    layer = layer_parameters(job.model, parallel.tp)
    outside = outer_parameters(job.model, parallel.tp, embedding=first, head=last)
    count = layers * layer + outside
    divided = parallel.zero == 3 and n > 1  # one rank has nothing to divide: flat buffers
    masters = 0 if divided or e == wide else 2 if job.remainders and e == 2 else wide
    in_layers = max(_stage_workspace(job, [choices[layer] for layer in plan.layers[stage]]) for stage in own)
    return RankMemory(
        pp_rank=rank,
        parameters=count,
        weights=-(-count // n) * wide if divided else count * e,
        gradients=-(-count // n) * wide if divided else count * wide,
        optimizer=(2 * wide + masters) * -(-count // n),
        quantized=layers * layer_copies(job.model, parallel.tp)
        if job.fp8_copies and job.num_microbatches > 1 and not divided
        else 0,
        gathered=e * (outside + 2 * layer) + (e + wide) * layer if divided else 0,
        activations=activations,
        pipeline=_pipeline_buffers(job, len(own), first, last),
        communication=_bucket_buffers(job, count),
        workspace=_workspace(job, sizes[0] if first else None, last, in_layers),
    )


def layer_parameters(model: ModelConfig, tp: int = 1) -> int:
    """Elements of one layer's weights on a tensor-parallel rank."""
    hidden, inner, head = model.hidden_size, model.ffn_hidden_size // tp, model.size_per_head
    queries, keys = model.num_attention_heads // tp * head, max(1, model.kv_heads // tp) * head
    ups = 2 if model.gated else 1
    norms = (2 if model.norm == "rms" else 4) * hidden + (2 * head if model.qk_norm else 0)
    biases = (queries + 2 * keys) * model.qkv_bias + hidden * model.output_bias
    biases += (ups * inner + hidden) * model.mlp_bias
    return hidden * (2 * queries + 2 * keys) + (ups + 1) * hidden * inner + norms + biases


def layer_copies(model: ModelConfig, tp: int = 1) -> int:
    """Bytes of both FP8 copies of one layer's matrices on a tensor-parallel rank, each row with a scale."""
    hidden, inner, head = model.hidden_size, model.ffn_hidden_size // tp, model.size_per_head
    queries, keys = model.num_attention_heads // tp * head, max(1, model.kv_heads // tp) * head
    ups = (2 if model.gated else 1) * inner
    shapes = ((queries + 2 * keys, hidden), (hidden, queries), (ups, hidden), (hidden, inner))
    return sum(2 * rows * columns + 4 * (rows + columns) for rows, columns in shapes)


def vocabulary_rows(model: ModelConfig, tp: int = 1) -> int:
    """Rows of the embedding, or of the head, that a tensor-parallel rank holds."""
    return -(-model.padded_vocab_size // tp)


def outer_parameters(model: ModelConfig, tp: int = 1, *, embedding: bool = True, head: bool = True) -> int:
    """Elements of what no layer holds: embeddings on the first stage, final norm and head on the last."""
    hidden, matrix = model.hidden_size, vocabulary_rows(model, tp) * model.hidden_size
    count = 0
    if embedding:
        count += matrix + (model.max_position_embeddings * hidden if model.position == "learned" else 0)
    if head:
        count += hidden * (1 if model.norm == "rms" else 2)
        if not (model.tie_word_embeddings and embedding):
            count += matrix
    return count


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


def _pipeline_buffers(job: Job, stages: int, first: bool, last: bool) -> int:
    if job.parallel.pp == 1:
        return 0
    stream = job.share.stream_tokens * job.model.hidden_size * job.itemsize
    posted = job.num_microbatches if job.parallel.pp_schedule == "looped_bfs" else 1
    return posted * stream * (2 * stages - first - last)


def _bucket_buffers(job: Job, parameters: int) -> int:
    parallel = job.parallel
    alone = parallel.dp_size(job.world_size) * parallel.cp == 1
    if alone or parallel.grad_reduce_dtype == "fp32" or parallel.zero == 3:
        return 0
    return min(2 * parallel.bucket_size, parameters) * 2 * 2


def _workspace(job: Job, first: int | None, last: bool, layers: int) -> int:
    """Bytes on top of what is kept; `first` is what the first stage keeps of a micro-batch, if it is here.

    `layers` is what a stage's layers need.
    """
    share, model = job.share, job.model
    gradient = vocabulary_rows(model, share.tp) * model.hidden_size * share.itemsize
    gradient = 0 if job.adds_in_place else gradient
    tied = gradient if model.tie_word_embeddings and first is not None and last else 0
    layer = layers + tied - (loss_bytes(job) if last else 0)
    embedding = 0 if first is None else gradient + tied - first
    return max(0, layer, embedding, _loss_workspace(job, gradient) if last else 0)


def _stage_workspace(job: Job, choices: Sequence[Recompute]) -> int:
    """Bytes on top of what all layers of a stage keep of one micro-batch, while they give it back from the last on."""
    most = freed = 0
    for choice in reversed(choices):
        most = max(most, _layer_workspace(job, choice) - freed)
        freed += kept_bytes(job.model, job.share, choice)
    return most


def _layer_workspace(job: Job, again: Recompute) -> int:
    """Gradients within a layer, and its activations if they are made again."""
    share, model = job.share, job.model
    kept, more = layer_bytes(model, share), again.full or again.mlp
    in_place = (again.activation or more) and cheap_choice(job).activation
    gradients = kept.active + 2 * share.tokens * model.hidden_size * share.itemsize
    made = sum(kept) - kept_bytes(model, share, again) if more else again.activation * kept.active
    return gradients + made + (-kept.active if in_place else kept.inner)


def _loss_workspace(job: Job, gradient: int) -> int:
    """What is made on the way to the loss, or to its gradients."""
    share, model = job.share, job.model
    rows, narrow = vocabulary_rows(model, share.tp), share.itemsize < share.wide
    stride = -(-rows // ROW_ALIGNMENT) * ROW_ALIGNMENT
    limits = cuda_limits(GPU_BALANCE) if job.gpu else CPU_LIMITS
    chunk = chunk_rows(share.tokens, stride, share.itemsize, limits) * stride * share.itemsize
    if share.tp == 1:
        return max(chunk, gradient if narrow else 0)
    # The gathered tokens, dx of all tokens, and the gradient in fp32 and narrow.
    whole = share.tokens * model.hidden_size * share.itemsize
    wide = 0 if job.adds_in_place else rows * model.hidden_size * share.wide
    return chunk + 2 * whole + wide + (gradient if narrow else 0)
