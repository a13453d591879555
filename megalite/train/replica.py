"""This process's part of one model: its layers, their state, and how a step's micro-batches run through them.

The trainer, `megalite verify`, the tests and the benchmarks all run a model through this class, whatever the layout:

    replica = build_replica(...)
    loss_sum = replica.gradients(batches, scale)       forward and backward passes; reductions start on the way
    replica.state.finish_gradients()                    gradients of the whole step, each part where it is updated
    grad_norm, norms = replica.grad_norm()              every element of the model counted once
    optimizer.step(...); replica.state.publish()        new weights travel while the next step begins
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megalite.config import ModelConfig, ParallelConfig, RecomputeConfig
from megalite.data.loader import MicroBatch
from megalite.layers.cache import LayerCache
from megalite.layers.linear import keep_fp8_copies, use_fp8
from megalite.models.blocks import ModelPart
from megalite.models.compiled import compile_blocks
from megalite.models.stage import Stage
from megalite.models.transformer import Transformer
from megalite.parallel.collectives import broadcast
from megalite.parallel.context import ContextSplit
from megalite.parallel.fp8_weights import quantized_once
from megalite.parallel.make_state import make_state
from megalite.parallel.mesh import Mesh
from megalite.parallel.partial import box_norms, total_norm
from megalite.parallel.pipeline import MicroBatchInput, Pipeline
from megalite.parallel.stages import StagePlan, plan_stages
from megalite.parallel.state import ModelState
from megalite.parallel.tensor import TensorSplit
from megalite.train.memory_activations import Job, recompute_choices
from megalite_kernels.ops.fp8_linear import Scaling


class Replica:
    """One model in one layout, as this process sees it.

    Args:
        model: the layers that this process holds.
        state: their weights, gradients and optimizer state.
        mesh, parallel: the layout.
        plan: where the layers of the whole model are.
        micro_batch_tokens: tokens of one micro-batch of a data-parallel rank, context-parallel parts together.
    """

    def __init__(
        self,
        model: Transformer,
        state: ModelState,
        mesh: Mesh,
        parallel: ParallelConfig,
        plan: StagePlan,
        *,
        micro_batch_tokens: int,
        dtype: torch.dtype,
    ) -> None:
        self.model, self.state, self.mesh, self.parallel = model, state, mesh, parallel
        self.config = model.config
        self._copies = torch.tensor(state.box_copies(), dtype=torch.float64, device=mesh.device)
        self.dtype = dtype
        self.fp8_copies = True
        """Quantise weights once a step where several micro-batches use them in FP8."""
        # Not with ZeRO-3, which keeps no whole weights either.
        self._fp8_copies = [] if self.gathers_weights else keep_fp8_copies(model)
        self.pipeline: Pipeline | None = None
        self.stages: dict[int, Stage] = {}
        if mesh.pp.size > 1:
            self.stages = {s: Stage(model, plan.layers[s]) for s in plan.stages_of(mesh.pp.rank)}
            stream = self._stream(micro_batch_tokens // mesh.cp.size).requires_grad_()
            self.pipeline = Pipeline(
                self.stages, plan, mesh.pp, parallel.pp_schedule, stream=stream, device=mesh.device
            )

    def gradients(
        self, batches: Sequence[MicroBatch], scale: Tensor, mark: Callable[[str], None] = lambda phase: None
    ) -> Tensor:
        """Forward and backward passes of a step's micro-batches.

        Args:
            batches: this data-parallel rank's, whole, on its device; all ranks with the same data have the same.
            scale: scalar that multiplies every loss before it is differentiated.
            mark: called after each "forward" and "backward".

        Returns:
            Sum of the unscaled losses of the labels that this process scored: float64 scalar. Summed over the data
            and pipeline axes every label counts once.
        """
        self.state.start_step(len(batches))
        with quantized_once(self._fp8_copies if self.fp8_copies else (), len(batches)):
            if self.pipeline is not None:
                return self._pipeline_gradients(self.pipeline, batches, scale, mark)
            return self._gradients(batches, scale, mark)

    def _gradients(self, batches: Sequence[MicroBatch], scale: Tensor, mark: Callable[[str], None]) -> Tensor:
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        for batch in batches:
            tokens, labels, where = self._inputs(batch)
            loss = self.model.loss(tokens, labels, **where, grad_scale=scale)
            mark("forward")
            (loss * scale).backward()
            loss_sum += loss.detach()
            mark("backward")
        return loss_sum

    def _pipeline_gradients(
        self, pipeline: Pipeline, batches: Sequence[MicroBatch], scale: Tensor, mark: Callable[[str], None]
    ) -> Tensor:
        inputs = []
        for batch in batches:
            tokens, labels, where = self._inputs(batch)
            inputs.append(MicroBatchInput(tokens, {"labels": labels, "scale": scale, **where}))
        for stage in self.stages.values():
            stage.loss_sum.zero_()
        pipeline.run(inputs)
        mark("backward")  # forward and backward passes alternate here
        return torch.stack([stage.loss_sum for stage in self.stages.values()]).sum()

    def _inputs(self, batch: MicroBatch) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Tokens, labels and the rest of a micro-batch: this rank's part with context parallelism."""
        cp, sequence = self.mesh.cp, None
        if cp.size > 1:
            sequence = ContextSplit(cp, self.parallel.cp_method, batch.bounds)
            batch = batch.part(sequence)
        where: dict[str, Any] = {
            "positions": batch.positions,
            "cu_seqlens": batch.cu_seqlens,
            "max_seqlen": batch.max_seqlen,
            "sequence": sequence,
        }
        return batch.tokens, batch.labels, where

    @property
    def gathers_weights(self) -> bool:
        """A forward pass is a collective of all data-parallel ranks (ZeRO-3): they all make as many."""
        return self.parallel.zero == 3 and self.mesh.data.size > 1

    def grad_norm(self) -> tuple[Tensor, Tensor]:
        """Norm of the whole model's gradients, the same on all ranks, and [boxes] that of each local part."""
        norms = self.local_norms()
        return self.total_norm(norms), norms

    def local_norms(self) -> Tensor:
        """Norm of each part of the gradients that this process holds: [boxes]."""
        return box_norms(self.state.boxes("main_grad"), self.mesh.device)

    def total_norm(self, norms: Tensor) -> Tensor:
        """Norm of the whole model's gradients from every process's local norms."""
        return total_norm(norms, self._copies, self.mesh.world)

    @torch.no_grad()
    def token_losses(self, batch: MicroBatch) -> Tensor:
        """Cross-entropy (nats) of every token of a whole batch: fp32 [T], 0 at ignored labels.

        The ranks of one pipeline call it together with the same batch; all of them get the result.
        """
        where: dict[str, Any] = {
            "positions": batch.positions,
            "cu_seqlens": batch.cu_seqlens,
            "max_seqlen": batch.max_seqlen,
        }
        if self.pipeline is None:
            return self.model.token_losses(batch.tokens, batch.labels, **where)
        hidden = self._relay(self.pipeline, batch.tokens, self._stream(batch.tokens.shape[0]), **where)
        if hidden is None:
            losses = torch.empty(batch.tokens.shape, dtype=self._loss_dtype, device=self.mesh.device)
        else:
            losses = self.model.hidden_losses(hidden, batch.labels, "none")
        return broadcast(losses, self.mesh.pp, self.pipeline.last_rank)

    @property
    def _loss_dtype(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32)

    def _stream(self, tokens: int) -> Tensor:
        """Residual stream between stages of a packed batch, on the meta device."""
        split = self.model.split
        here = tokens // split.axis.size if split.sequence and tokens % split.axis.size == 0 else tokens
        return torch.empty(here, self.config.hidden_size, dtype=self.dtype, device="meta")

    def _relay(self, pipeline: Pipeline, tokens: Tensor, stream: Tensor, **where: Any) -> Tensor | None:
        return pipeline.relay(
            tokens, stream, lambda number, x: self.model.run(x, self.stages[number].layers, **where)
        )

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return self.mesh.device

    def new_cache(self, batch_size: int, capacity: int) -> list[LayerCache]:
        """An empty key/value cache for the layers of this process."""
        return self.model.new_cache(batch_size, capacity, self.dtype)

    @torch.no_grad()
    def next_logits(self, tokens: Tensor, cache: list[LayerCache] | None) -> Tensor:
        """Logits [V] of what follows `tokens` [1, S], on every rank of a pipeline (which all call it)."""
        if self.pipeline is None:
            return self.model.next_logits(tokens, cache)
        start = cache[0].length if cache else 0
        positions = torch.arange(start, start + tokens.shape[1], device=self.device)
        stream = torch.empty(*tokens.shape, self.config.hidden_size, dtype=self.dtype, device="meta")
        hidden = self._relay(self.pipeline, tokens, stream, positions=positions, cache=cache)
        if hidden is None:
            logits = torch.empty(self.config.vocab_size, dtype=self.dtype, device=self.device)
        else:
            logits = self.model.logits(hidden[0, -1]).contiguous()
        return broadcast(logits, self.mesh.pp, self.pipeline.last_rank)


def build_replica(
    config: ModelConfig,
    parallel: ParallelConfig,
    mesh: Mesh,
    *,
    dtype: torch.dtype,
    micro_batch_tokens: int,
    fill: Callable[[Transformer], None],
    recompute: RecomputeConfig | None = None,
    seq_length: int = 0,
    num_microbatches: int = 0,
    compile_backend: str = "",
    fp8: Scaling | None = None,
    remainders: bool = True,
) -> Replica:
    """Make this process's part of the model and its state.

    Args:
        config: the whole model.
        parallel, mesh: the layout.
        dtype: compute type of the weights; masters and gradients are fp32 (float64 for float64).
        micro_batch_tokens: tokens of one micro-batch of a data-parallel rank.
        fill: sets the initial weights of the fp32 model, before it is moved into its state.
        recompute: what the backward pass computes again.
        seq_length: tokens of a sample, for the balance of pipeline stages; 0: one micro-batch is one sample.
        num_microbatches: of a step on a data-parallel rank; a recomputation budget is shared by those in flight.
            0: as many as the pipeline has stages.
        compile_backend: of `torch.compile`, for the blocks; empty compiles nothing.
        fp8: multiply in FP8 in the blocks, with this scaling.
        remainders: see `make_state`.
    """
    plan = plan_stages(config, parallel, seq_length or micro_batch_tokens)
    own = plan.stages_of(mesh.pp.rank)
    layers = tuple(number for stage in own for number in plan.layers[stage])
    part = ModelPart(layers, embedding=0 in own, head=plan.num_stages - 1 in own)
    split = TensorSplit(mesh.tp, parallel.sequence_parallel and mesh.tp.size > 1, parallel.tp_chunks)
    model = Transformer(config, split, part=part, device=mesh.device)
    if recompute is not None:
        job = Job(
            model=config,
            parallel=parallel,
            world_size=mesh.world.size,
            tokens=micro_batch_tokens,
            num_microbatches=num_microbatches or plan.num_stages,
            itemsize=dtype.itemsize,
            recompute=recompute,
            seq_length=seq_length,
            gpu=mesh.device.type != "cpu",
            compiled=bool(compile_backend),
            fp8=fp8 is not None,
        )
        model.recompute = recompute_choices(job)
    if compile_backend:
        compile_blocks(model, compile_backend)
    fill(model)
    use_fp8(model, fp8)
    state = make_state(model, mesh, dtype, parallel, remainders=remainders)
    return Replica(model, state, mesh, parallel, plan, micro_batch_tokens=micro_batch_tokens, dtype=dtype)
