"""Pipeline parallelism: stages of the model on different ranks, run by the schedules of torch.distributed.pipelining.

The engine executes the action table of a schedule (GPipe; 1F1B, arXiv 2006.09503; breadth-first, arXiv 2211.05953;
interleaved 1F1B, arXiv 2104.04473; zero bubble and ZB-V, arXiv 2401.10241; DualPipeV, arXiv 2412.19437). Ours are the
stages, how the layers are divided over them (`megalite.parallel.stages`), and the separate weight-gradient pass: the
products wait in a `WeightQueue` that the engine's W action empties. The engine's own W pass would run the same
autograd nodes a second time, and with them whatever a backward pass adds to the main gradients.

Micro-batches come split already: a packed batch cannot be cut by the engine, which knows nothing of documents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megalite.config_parallel import SINGLE_STAGE, ZERO_BUBBLE, Schedule
from megalite.parallel.action_table import ENGINE_NAMES
from megalite.parallel.collectives import receive, send
from megalite.parallel.engine_stage import make_lean_stage
from megalite.parallel.gradients import WeightQueue, get_sink
from megalite.parallel.mesh import Axis
from megalite.parallel.stages import StagePlan


@dataclass(frozen=True, slots=True)
class MicroBatchInput:
    """What the stages get of one micro-batch besides the activations that travel."""

    tokens: Tensor
    """[T] int64: the first stage's input."""
    extra: dict[str, Any]
    """Keyword arguments of every stage."""


class Pipeline:
    """This process's stages and the schedule that runs them.

    Args:
        stages: stage number → module; the first takes tokens, the others the residual stream, and the last returns
            the loss that is to be differentiated.
        plan: where all stages are.
        axis: pipeline axis.
        schedule: name of the schedule.
        stream: residual stream between stages, [T', H] on the meta device.
    """

    def __init__(
        self,
        stages: Mapping[int, nn.Module],
        plan: StagePlan,
        axis: Axis,
        schedule: Schedule,
        *,
        stream: Tensor,
        device: torch.device,
    ) -> None:
        self.stages = dict(sorted(stages.items()))
        self.plan, self.axis, self.schedule = plan, axis, schedule
        self.stream, self.device = stream, device
        self.queues: dict[int, WeightQueue] = {}
        if schedule in ZERO_BUBBLE:
            self._defer_weight_gradients()
        self._engines: dict[int, Any] = {}

    def _defer_weight_gradients(self) -> None:
        for number, module in self.stages.items():
            self.queues[number] = WeightQueue()
            for parameter in module.parameters():
                if (sink := get_sink(parameter)) is not None:
                    sink.queue = self.queues[number]

    def run(self, batches: Sequence[MicroBatchInput]) -> None:
        """Forward and backward passes of a step's micro-batches; gradients are accumulated where they belong."""
        engine = self._engine(len(batches), batches[0].tokens)
        self.axis.note("pipeline_passes")  # the engine sends and receives by itself
        for stage in engine.megalite_stages:
            stage.has_backward = True
            stage.clear_runtime_states()
        engine._step_microbatches(
            [(batch.tokens,) for batch in batches],
            [batch.extra for batch in batches],
            [None] * len(batches),
            None,
            return_outputs=False,
        )

    def _engine(self, num_microbatches: int, tokens: Tensor) -> Any:
        """The schedule for so many micro-batches; one is kept for each number that a batch-size ramp goes through."""
        if num_microbatches not in self._engines:
            # Importing the engine takes 2 s, which other runs need not pay.
            from torch.distributed.pipelining.schedules import get_schedule_class

            stages = [self._engine_stage(number, tokens) for number in self.stages]
            schedule = get_schedule_class(ENGINE_NAMES[self.schedule])(
                stages[0] if self.schedule in SINGLE_STAGE else stages,
                num_microbatches,
                # The last stage's output is the loss, scaled by the whole step's number of labels: contract of a
                # sum over all valid tokens, which the engine must not average again.
                loss_fn=lambda loss, _: loss,
                scale_grads=False,
            )
            schedule.megalite_stages = stages
            self._engines = {num_microbatches: schedule}
        return self._engines[num_microbatches]

    def _engine_stage(self, number: int, tokens: Tensor) -> Any:
        last = number == self.plan.num_stages - 1
        loss = torch.empty((), dtype=torch.float32, device="meta", requires_grad=True)
        queue = self.queues.get(number)
        return make_lean_stage(
            self.stages[number],
            number,
            self.plan.num_stages,
            self.device,
            input_args=torch.empty_like(tokens, device="meta") if number == 0 else self.stream,
            output_args=loss if last else self.stream,
            group=self.axis.group,
            dw_builder=None if queue is None else queue.take,
        )

    def relay(self, first: Tensor, stream: Tensor, compute: Any) -> Tensor | None:
        """One forward pass through all stages, without gradients.

        Args:
            first: the first stage's input.
            stream: [..., H] shape and type of what travels between stages, on any device.
            compute: (stage number, its input) → its output.

        Returns:
            The last stage's output on the rank that holds it, else None.
        """
        x: Tensor | None = first
        for number in range(self.plan.num_stages):
            if self.plan.rank_of(number) != self.axis.rank:
                continue
            before = self.plan.rank_of(number - 1) if number else self.axis.rank
            if before != self.axis.rank:
                x = receive(torch.empty_like(stream, device=self.device), self.axis, before)
            x = compute(number, x)
            if number == self.plan.num_stages - 1:
                return x
            after = self.plan.rank_of(number + 1)
            if after != self.axis.rank:
                assert x is not None
                send(x.contiguous(), self.axis, after)
        return None

    @property
    def last_rank(self) -> int:
        """Pipeline rank that holds the last stage."""
        return self.plan.rank_of(self.plan.num_stages - 1)
