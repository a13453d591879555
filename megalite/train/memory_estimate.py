"""Bytes that one rank needs to train a model in a layout, term by term, before anything is allocated.

With P parameters on a rank, e bytes per number of the compute type, w = 4 (8 in float64), and n ranks that divide
the optimizer's state (dp_shard · cp; 1 with zero=0):

    weights         e · P                   zero=3: w · P / n, which is the master too
    gradients       w · P                   zero=3: w · P / n; a single process on a CPU with one micro-batch in
                    a step: what is there at the peak, on top of activations and workspace, which stand in gradients'
                    memory (`megalite.parallel.data`): mostly the head's V · H · w
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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from megalite.config import ModelConfig
from megalite.layers.recompute import Recompute
from megalite.layers.recompute_plan import kept_bytes, layer_bytes
from megalite.train.memory_activations import (
    Job,
    activation_peaks,
    cheap_choice,
    loss_bytes,
    matrix_sizes,
    recompute_choices,
    stage_bytes,
    vocabulary_rows,
)
from megalite_kernels.reference.linear_cross_entropy import CPU_LIMITS, ROW_ALIGNMENT, chunk_rows, cuda_limits

GPU_BALANCE = 295
"""Of an H100; decides the chunk of logits."""


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
    gradients = -(-count // n) * wide if divided else count * wide
    workspace = _workspace(job, sizes[0] if first else None, last, in_layers)
    if job.lends_gradients:
        gradients = _lending_gradients(job, gradients, workspace, list(choices.values()))
    return RankMemory(
        pp_rank=rank,
        parameters=count,
        weights=-(-count // n) * wide if divided else count * e,
        gradients=gradients,
        optimizer=(2 * wide + masters) * -(-count // n),
        quantized=layers * layer_copies(job.model, parallel.tp)
        if job.fp8_copies and job.num_microbatches > 1 and not divided
        else 0,
        gathered=e * (outside + 2 * layer) + (e + wide) * layer if divided else 0,
        activations=activations,
        pipeline=_pipeline_buffers(job, len(own), first, last),
        communication=_bucket_buffers(job, count),
        workspace=workspace,
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


def _stage_workspace(job: Job, choices: Sequence[Recompute], comes: int = 0) -> int:
    """Bytes on top of what all layers of a stage keep of one micro-batch, while they give it back from the last on.

    `comes` is what stays of each one's backward pass.
    """
    most = freed = 0
    for choice in reversed(choices):
        freed -= comes
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


def _lending_gradients(job: Job, gradients: int, workspace: int, choices: Sequence[Recompute]) -> int:
    """Bytes of gradients on top of activations and workspace at the peak, where gradients lend their memory.

    The largest bucket never does: it is the head's, or that of a layer's widest matrix. The head's comes with the loss,
    those of a layer before it has given back what it kept, the embedding's when all is given back.
    """
    share, model, wide = job.share, job.model, job.share.wide
    head, widest = matrix_sizes(model)
    there = wide * (head + (widest if widest > head else 0))
    layers = _stage_workspace(job, choices, layer_parameters(model) * wide) - loss_bytes(job)
    kept = loss_bytes(job) + sum(kept_bytes(model, share, choice) for choice in choices)
    end = gradients + share.tokens * model.hidden_size * share.itemsize - kept
    return max(there + _loss_workspace(job, 0), there + layers, end) - workspace


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
