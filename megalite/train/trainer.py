"""The training loop: tokens → loss → gradients → update, and what happens between steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megalite.config import IGNORE_INDEX, RunConfig
from megalite.data.copying import CopyStream
from megalite.data.loader import MicroBatch, TrainLoader
from megalite.data.tokenize import Tokenizer
from megalite.data.validation import ValidationSet
from megalite.errors import DivergedError
from megalite.models.transformer import Transformer
from megalite.optim.adamw import AdamW
from megalite.optim.clip import clip_coefficient
from megalite.optim.schedule import learning_rate
from megalite.parallel.collectives import all_reduce_sum, gather_objects
from megalite.parallel.mesh import Mesh
from megalite.parallel.reduction import is_finite
from megalite.parallel.state import ModelState
from megalite.train.collector import Collector
from megalite.train.evaluate import sample_texts, validate
from megalite.train.graphed import GraphedStep
from megalite.train.guard import StepGuard
from megalite.train.metrics import Metrics, ProgressLine, StepResult
from megalite.train.replica import Replica
from megalite.train.runlog import RunLog, TensorBoard
from megalite.train.step import StepInputs, StepOutputs
from megalite.train.stop import StopSignal
from megalite.train.timer import StepTimer


@dataclass
class Trainer:
    """Everything a step needs, built by `megalite.train.setup`."""

    config: RunConfig
    replica: Replica
    optimizer: AdamW
    guard: StepGuard
    loader: TrainLoader
    validation: ValidationSet | None
    tokenizer: Tokenizer
    metrics: Metrics
    log: RunLog
    tensorboard: TensorBoard
    progress: ProgressLine
    timer: StepTimer
    copies: CopyStream
    save: Callable[[int], None]
    """Saves a checkpoint of the given number of completed steps."""
    completed_steps: int = 0
    graphs: GraphedStep | None = None
    """Runs `compute` as CUDA graphs."""

    @property
    def mesh(self) -> Mesh:
        """The processes of the run."""
        return self.replica.mesh

    @property
    def model(self) -> Transformer:
        """The layers that this process holds."""
        return self.replica.model

    @property
    def state(self) -> ModelState:
        """Their weights, gradients and optimizer state."""
        return self.replica.state

    def train(self, stop: StopSignal, after_step: Callable[[int], None] = lambda step: None) -> bool:
        """Run the remaining steps; False if a signal ended the run early (a checkpoint was saved).

        Args:
            stop: asked after every step.
            after_step: called with the number of completed steps (the profiler's hook).

        Raises:
            DivergedError: more consecutive steps were skipped than `train.max_skipped_steps`.
        """
        with Collector(self.config.train.gc_interval) as collector:
            return self._steps(stop, after_step, collector)

    def _steps(self, stop: StopSignal, after_step: Callable[[int], None], collector: Collector) -> bool:
        total = self.config.train.steps
        while self.completed_steps < total:
            self.mesh.calls.step = self.completed_steps + 1
            result, requests = self.train_step(self.completed_steps, stop)
            self.metrics.add(result)
            self.completed_steps = done = result.step
            after_step(done)
            collector.after_step(done)
            stopping = stop.agreed(requests)
            evaluating = not stopping and _due(done, self.config.eval.interval, total)
            saving = stopping or _due(done, self.config.checkpoint.interval, total)
            if evaluating or saving or done % self.config.train.log_interval == 0:
                self.flush()
            if evaluating:
                self.evaluate(done, complete=done == total)
            if saving:
                self.save(done)
            if stopping and done < total:
                return False
        return True

    def train_step(self, step: int, stop: StopSignal) -> tuple[StepResult, Tensor]:
        """One optimizer step (0-based number `step`) over this process's micro-batches.

        Returns:
            The step's results, and the number of processes that want to stop (device scalar).
        """
        timer, device = self.timer, self.mesh.device
        timer.start()
        batches = self.load(step)
        timer.mark("data_wait")
        rate = torch.full((), learning_rate(self.config, step), device=device)
        stopping = torch.full((), float(stop.requested), dtype=torch.float64, device=device)
        inputs = StepInputs(batches, rate, stopping)
        if self.graphs is None:
            out = self.compute(inputs, timer.mark)
        else:
            out = self.graphs.run(inputs)
            timer.mark("graph")
        scalars = (out.loss, out.grad_norm, out.valid_tokens, out.bad_ranks, out.verdict)
        return StepResult(step + 1, *scalars, timer.finish()), out.stopping

    def compute(self, inputs: StepInputs, mark: Callable[[str], None] = lambda phase: None) -> StepOutputs:
        """The device's part of a step: gradients, judgement, update.

        The loss is the sum over all valid tokens of the step, on all processes, divided by their number; the
        number is known before the first backward pass and scales the gradients there. Nothing here waits for
        the device or depends on values that are there.

        Args:
            inputs: on the device.
            mark: called after each phase.
        """
        mesh, batches = self.mesh, inputs.batches
        valid_tokens = all_reduce_sum(count_valid_tokens(batches), mesh.dp)
        scale = 1.0 / valid_tokens.clamp(min=1).float()
        mark("communication")

        loss_sum = self.replica.gradients(batches, scale, mark)
        self.state.finish_gradients()
        mark("communication")
        norms = self.replica.local_norms()
        mark("optimizer")
        shared = self.local_report(loss_sum, norms, inputs.stop)
        all_reduce_sum(shared, mesh.world)
        mark("communication")

        grad_norm = self.replica.total_norm(norms)
        loss_mean = shared[0] * scale
        verdict = self.guard.judge(loss_mean, grad_norm, norms)
        clip = clip_coefficient(grad_norm, self.config.optimizer.clip_grad_norm)
        self.optimizer.step(inputs.rate, clip, verdict.skip)
        self.state.publish()
        mark("optimizer")
        return StepOutputs(loss_mean, grad_norm, valid_tokens, shared[2:], shared[1], verdict)

    def load(self, step: int) -> list[MicroBatch]:
        """This process's micro-batches of a step, on the device; the next step starts loading."""
        train = self.config.train
        batches = self.loader.step(train.samples_before(step), train.batch_size_at(step))
        if step + 1 < train.steps:
            self.loader.prefetch_step(train.samples_before(step + 1), train.batch_size_at(step + 1))
        return self.copies.bring(batches)

    def local_report(self, loss_sum: Tensor, norms: Tensor, stop: Tensor) -> Tensor:
        """What the processes tell each other in a step: float64 [2 + world].

        The sum of losses, whether this process wants to stop, and one flag per process that is set where its
        own loss or gradients are not finite (after the reduction everybody's would be).
        """
        report = torch.zeros(2 + self.mesh.world_size, dtype=torch.float64, device=self.mesh.device)
        # One process has seen its gradients when it took their norms.
        gradients = is_finite(norms).all() if self.mesh.world_size == 1 else self.state.local_finite()
        finite = is_finite(loss_sum) & gradients
        report[0] = loss_sum if self.mesh.tp.rank == 0 else 0.0  # tensor-parallel ranks score the same labels
        report[1] = stop
        report[2 + self.mesh.rank] = (~finite).double()
        return report

    def flush(self) -> None:
        """Bring the finished steps' results to the host: files, progress line, spikes, divergence."""
        records = self.metrics.flush()
        if not records:
            return
        if not records[-1]["skipped"]:
            last = records[-1]
            last["update_ratio"], last["weight_norm"] = self.optimizer.update_ratio(last["learning_rate"])
        for record in records:
            if record["skipped"] or record["spike"]:
                self.report_step(record)
        self.log.append(RunLog.METRICS, records)
        self.tensorboard.add_metrics(records)
        self.progress.update(records)
        limit = self.config.train.max_skipped_steps
        consecutive = int(self.guard.consecutive_skips.item())
        if consecutive >= limit:
            raise DivergedError(
                f"the last {consecutive} steps had non-finite losses or gradients (train.max_skipped_steps={limit}): "
                f"lower optimizer.learning_rate={self.config.optimizer.learning_rate} or lengthen schedule.warmup"
            )

    def report_step(self, record: dict[str, Any]) -> None:
        """Log a skipped step or a spike with everything that locates it."""
        kind = "skip" if record["skipped"] else "spike"
        details = {
            "loss": record["loss"],
            "grad_norm": record["grad_norm"],
            "rank": record.pop("bad_rank", -1),
        }
        bad = record.pop("bad_parameter", -1)
        here = self.state.boxes("main_grad")[bad].piece.name if bad >= 0 else ""
        details["parameter"] = next(filter(None, gather_objects(here, self.mesh.world)), "")
        self.log.event(kind, record["step"], **details)
        where = f", first in {details['parameter']} on rank {details['rank']}" if details["parameter"] else ""
        self.progress.say(
            f"step {record['step']}: {kind}, loss {record['loss']}, grad norm {record['grad_norm']}{where}"
        )

    def evaluate(self, step: int, *, complete: bool) -> None:
        """Score held-out documents and sample texts; adds a record to evals.jsonl."""
        if self.validation is None:
            return
        train = self.config.train
        scores = validate(
            self.replica,
            self.validation,
            self.config.eval,
            seq_length=train.seq_length,
            tokens_per_batch=train.micro_batch_size * train.seq_length,
            complete=complete,
        )
        record = {"step": step, "tokens": train.tokens_before(step), **scores, "samples": []}
        # All ranks of one replica hold the model together; with ZeRO-3 all ranks do.
        if self.mesh.data.rank == 0 or self.replica.gathers_weights:
            record["samples"] = sample_texts(self.replica, self.tokenizer, self.config.eval, seed=train.seed)
        self.log.append(RunLog.EVALS, [record])
        self.tensorboard.add_eval(record)
        part = "all" if scores["complete"] else f"{scores['val_tokens']:,} tokens of"
        self.progress.say(
            f"step {step}: validation loss {scores['val_loss']:.4f}, {scores['val_bits_per_byte']:.4f} bits per byte "
            f"({part} held-out documents, {scores['seconds']:.1f} s)"
        )


def count_valid_tokens(batches: Sequence[MicroBatch]) -> Tensor:
    """Labels that carry loss, over micro-batches: int64 scalar on the device."""
    return torch.stack([(batch.labels != IGNORE_INDEX).sum() for batch in batches]).sum()


def _due(done: int, interval: int, total: int) -> bool:
    """Something that happens every `interval` steps (0: never) and at the end."""
    return done == total or (interval > 0 and done % interval == 0)
