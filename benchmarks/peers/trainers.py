"""A contender at work in this process: our trainer, or a peer's model in a plain training loop."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.peers.contenders import Contender
from benchmarks.peers.job import SEED, Batches, Job, read_weights
from megalite.config import DataConfig, EvalConfig, RunConfig, ScheduleConfig, TrainConfig
from megalite.parallel.failure import ends_together
from megalite.parallel.mesh import close_mesh, make_mesh
from megalite.train.setup import Session, build_session, prepare_process


class Trainer(Protocol):
    """What the measurement asks of a contender."""

    def step(self) -> Tensor:
        """Take the next step; its mean loss, a scalar on the device."""
        ...

    def state_bytes(self) -> int:
        """Parameters, gradients and optimizer state that it holds at the end of a backward pass."""
        ...


class Ours:
    """The trainer of this project, as `megalite pretrain` runs it."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.taken = 0

    def step(self) -> Tensor:
        """The next step."""
        trainer = self.session.trainer
        result, _ = trainer.train_step(self.taken, self.session.stop)
        trainer.metrics.add(result)
        self.taken += 1
        return result.loss

    def state_bytes(self) -> int:
        """Weights of the compute type, and what the optimizer has for each."""
        seen: dict[int, int] = {}
        tensors = [*self.session.trainer.model.parameters()]
        for shard in self.session.trainer.state.optimizer_shards():
            tensors += [shard.weights, shard.main_grad, shard.exp_avg, shard.exp_avg_sq]
            tensors += [kept for kept in (shard.master, shard.remainder) if kept is not None]
        for tensor in tensors:
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
        return sum(seen.values())


def run_config(job: Job, contender: Contender | None = None) -> RunConfig:
    """The job as our trainer's configuration: a constant learning rate, no validation, no checkpoints."""
    precision = contender.precision if contender else ""
    return RunConfig(
        name="throughput",
        run_dir=str(Path(job.folder) / "run"),
        model=job.model,
        parallel=job.parallel,
        data=DataConfig(datasets=job.datasets),
        optimizer=job.optimizer,
        schedule=ScheduleConfig(kind="constant", warmup=0),
        train=TrainConfig(
            steps=job.steps,
            seq_length=job.seq_length,
            micro_batch_size=job.micro_batch_size,
            global_batch_size=job.global_batch_size,
            precision=precision or job.precision,  # type: ignore[arg-type]
            device=job.device,  # type: ignore[arg-type]
            threads=job.threads,
            seed=SEED,
            compile=contender is not None and contender.compiled,
            cuda_graph=contender is not None and contender.cuda_graph,
            log_interval=job.steps + 1,
        ),
        eval=EvalConfig(interval=0),
    )


@contextmanager
def our_session(job: Job, contender: Contender | None = None) -> Iterator[Session]:
    """Our trainer on the job's tokens, ready for its steps; closed at the end of the block."""
    config = run_config(job, contender)
    mesh = make_mesh(config.parallel, config.train.device)
    keep_pages = job.keep_pages and (contender is None or contender.keep_pages)
    setting = nullcontext() if keep_pages else mock.patch("megalite.train.setup.keep_freed_pages")
    with setting:
        prepare_process(config, mesh)
    try:
        with ends_together(mesh.watch):
            session = build_session(config, mesh)
            try:
                yield session
            finally:
                session.trainer.loader.close()
                session.trainer.tensorboard.close()
                session.trainer.progress.close()
    finally:
        close_mesh(mesh)


class Peer:
    """A model in a plain loop: fused AdamW, clipping, gradients set to None after each step.

    Matrices and embeddings decay, norms and biases do not, as in our optimizer. With bf16 weights the optimizer
    updates fp32 masters, which are then copied to the weights.
    """

    def __init__(self, job: Job, contender: Contender, model: nn.Module, batches: Batches) -> None:
        self.job, self.batches, self.taken = job, batches, 0
        model = model.to(job.device)
        self.masters: list[Tensor] = []
        if contender.weights == "bf16w":
            self.masters = [p.detach().clone() for p in model.parameters()]
            for parameter in model.parameters():  # buffers stay: positions need fp32
                parameter.data = parameter.data.to(torch.bfloat16)
        self.parameters = list(model.parameters())
        self.autocast: Callable[[], Any] = nullcontext
        if contender.weights == "autocast":
            self.autocast = lambda: torch.autocast(job.device, torch.bfloat16)
        settings = job.optimizer
        updated = self.masters or self.parameters
        groups = [
            {"params": [p for p in updated if p.dim() >= 2], "weight_decay": settings.weight_decay},
            {"params": [p for p in updated if p.dim() < 2], "weight_decay": 0.0},
        ]
        betas = (settings.beta1, settings.beta2)
        self.optimizer = torch.optim.AdamW(
            groups, lr=settings.learning_rate, betas=betas, eps=settings.eps, fused=True
        )
        self.model = torch.compile(model, dynamic=False) if contender.compiled else model
        self.gradient_bytes = sum(p.numel() * p.element_size() for p in self.parameters)

    def step(self) -> Tensor:
        """The next step."""
        micro_batches = self.batches.step(self.taken)
        self.taken += 1
        total = torch.zeros((), device=self.job.device)
        for tokens, labels in micro_batches:
            with self.autocast():
                loss = self.model(tokens, labels) / len(micro_batches)
            loss.backward()
            total += loss.detach().float()
        self._update()
        return total

    def _update(self) -> None:
        if self.masters:
            for master, parameter in zip(self.masters, self.parameters, strict=True):
                assert parameter.grad is not None
                master.grad, parameter.grad = parameter.grad.float(), None
        updated = self.masters or self.parameters
        if self.job.optimizer.clip_grad_norm:
            torch.nn.utils.clip_grad_norm_(updated, self.job.optimizer.clip_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.masters:
            with torch.no_grad():
                torch._foreach_copy_(self.parameters, self.masters)

    def state_bytes(self) -> int:
        """Weights, their gradients, masters and moments."""
        state = [v for values in self.optimizer.state.values() for v in values.values()]
        tensors = [*self.parameters, *self.masters, *(t for t in state if isinstance(t, Tensor))]
        return self.gradient_bytes + sum(t.numel() * t.element_size() for t in tensors)


@contextmanager
def open_trainer(job: Job, contender: Contender) -> Iterator[Trainer]:
    """The contender, built and ready; closed at the end of the block."""
    if contender.build is None:
        with our_session(job, contender) as session:
            yield Ours(session)
        return
    batches = Batches(job)
    try:
        yield Peer(job, contender, contender.build(job, read_weights(job)), batches)
    finally:
        batches.close()


@dataclasses.dataclass
class Stepper:
    """Times steps: by events on a GPU, which is not waited for between them, else by the asked-for clock."""

    trainer: Trainer
    job: Job

    def run(self, count: int) -> tuple[list[float], list[float]]:
        """(milliseconds, loss) of each of `count` steps."""
        losses = []
        if self.job.device == "cuda":
            events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
            torch.cuda.synchronize()
            events[0].record()
            for event in events[1:]:
                losses.append(self.trainer.step())
                event.record()
            torch.cuda.synchronize()
            times = [a.elapsed_time(b) for a, b in itertools.pairwise(events)]
            return times, [float(loss) for loss in losses]
        clock = time.process_time if self.job.clock == "process" else time.perf_counter
        times = []
        for _ in range(count):
            start = clock()
            losses.append(self.trainer.step())
            times.append((clock() - start) * 1e3)
        return times, [float(loss) for loss in losses]
