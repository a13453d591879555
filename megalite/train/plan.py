"""What a configuration means on so many processes, found out before any is started.

Times are in forward passes of one layer, from FLOPs alone: the two halves of a backward pass take as long as the
forward pass each, except that attention has no weights and that an unsplit head makes its gradients with the loss.
Transfers between stages take no time here; how long they do depends on the machine.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import get_args

import torch

from megalite.config import ModelConfig, ParallelConfig, RunConfig
from megalite.config_parallel import SINGLE_STAGE, V_SHAPED, Schedule
from megalite.data.dataset import open_prepared
from megalite.errors import UserError
from megalite.parallel.action_table import schedule_table
from megalite.parallel.mesh import Axis, Mesh
from megalite.parallel.simulate import StageBytes, StageTimes, Timeline, simulate
from megalite.parallel.stages import StageCosts, StagePlan, plan_stages, stage_costs
from megalite.train.communication import StepBytes, StepShape, step_bytes
from megalite.train.memory_activations import Job, recompute_choices
from megalite.train.memory_estimate import RankMemory, estimate_memory, layer_parameters, outer_parameters
from megalite.train.setup import settle_model, validate_layout


@dataclass(frozen=True, slots=True)
class Alternative:
    """A schedule for the same model, ranks and micro-batches."""

    schedule: Schedule
    stages_per_rank: int
    bubble: float | None = None
    """None where it cannot run."""
    peak_layers: float = 0.0
    """Micro-batches · layers that the fullest rank keeps."""
    reason: str = ""
    """Why it cannot run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """All that is known of a run beforehand."""

    config: RunConfig
    """With the vocabulary's size settled."""
    processes: int
    dp: int
    micro_batches: int
    dtype: torch.dtype
    stages: StagePlan
    costs: StageCosts
    timeline: Timeline | None
    """Of the configured schedule; None without a pipeline."""
    alternatives: tuple[Alternative, ...]
    sent: tuple[StepBytes, ...]
    """By pipeline rank."""
    memory: tuple[RankMemory, ...]
    """By pipeline rank."""

    @property
    def parameters(self) -> int:
        """Weights of the model, padding rows of the vocabulary included."""
        model = self.config.model
        return model.num_layers * layer_parameters(model) + outer_parameters(model)

    @property
    def shares(self) -> tuple[float, ...]:
        """Each pipeline rank's share of the model's FLOPs."""
        costs = self.stages.costs(self.costs)
        return tuple(
            sum(costs[stage] for stage in self.stages.stages_of(rank)) / sum(costs)
            for rank in range(self.stages.pp)
        )


def plan_run(config: RunConfig, processes: int) -> RunPlan:
    """Check a configuration for a number of processes and work out what it means.

    Raises:
        UserError: something does not fit; the message names it and what would.
    """
    if processes < 1:
        raise UserError(f"--processes {processes} must be at least 1")
    config = dataclasses.replace(config, model=_settled_model(config))
    model, parallel, train = config.model, config.parallel, config.train
    dp = parallel.dp_size(processes)
    validate_layout(
        config, Mesh(torch.device("cpu"), tp=Axis(parallel.tp), cp=Axis(parallel.cp), dp=Axis(dp))
    )
    micro_batches = train.global_batch_size // (train.micro_batch_size * dp)
    dtype = torch.float32 if train.precision == "fp32" else torch.bfloat16
    tokens = train.micro_batch_size * train.seq_length
    job = Job(
        model=model,
        parallel=parallel,
        world_size=processes,
        tokens=tokens,
        num_microbatches=micro_batches,
        itemsize=dtype.itemsize,
        recompute=config.recompute,
        seq_length=train.seq_length,
        gpu=train.device != "cpu",
        fp8_copies=train.precision == "fp8" and train.fp8_copies,
        remainders=config.optimizer.store_param_remainders,
        compiled=train.compile,
        fp8=train.precision == "fp8",
    )
    stages = plan_stages(model, parallel, train.seq_length)
    again = recompute_choices(job)
    shape = StepShape(
        micro_batches=micro_batches,
        micro_batch_tokens=tokens,
        seq_length=train.seq_length,
        dtype=dtype,
        made_again=frozenset(layer for layer, choice in again.items() if choice.full),
        mlp_made_again=frozenset(layer for layer, choice in again.items() if choice.mlp and not choice.full),
        rowwise_fp8=train.precision == "fp8" and train.fp8_scaling == "rowwise",
    )
    return RunPlan(
        config=config,
        processes=processes,
        dp=dp,
        micro_batches=micro_batches,
        dtype=dtype,
        stages=stages,
        costs=stage_costs(model, train.seq_length),
        timeline=_simulated(config, parallel, micro_batches) if parallel.pp > 1 else None,
        alternatives=_alternatives(config, micro_batches) if parallel.pp > 1 else (),
        sent=tuple(step_bytes(model, parallel, shape, processes=processes)),
        memory=tuple(estimate_memory(job)),
    )


def _settled_model(config: RunConfig) -> ModelConfig:
    """The model with its vocabulary, which the data's tokenizer knows where the configuration does not."""
    if config.model.vocab_size and not config.train.init_from:
        return config.model
    if not config.data.datasets:
        raise UserError(
            "model.vocab_size=0 takes the vocabulary's size from the data, and there are no datasets: give "
            "--model.vocab-size or --data.datasets"
        )
    return settle_model(config, open_prepared(config.data.datasets)[0].tokenizer())


def stage_times(model: ModelConfig, parallel: ParallelConfig, seq_length: int, plan: StagePlan) -> StageTimes:
    """Times of each stage's passes in forward passes of the model's first layer, by FLOPs."""
    costs = stage_costs(model, seq_length)
    products = [cost - attention for cost, attention in zip(costs.layers, costs.attention, strict=True)]
    unit = costs.layers[0] / 3
    forward, input_, weight = [], [], []
    for number, layers in enumerate(plan.layers):
        matrices = sum(products[layers.start : layers.stop]) / 3
        attention = sum(costs.attention[layers.start : layers.stop]) / 3
        embedding = costs.embedding / 3 if number == 0 else 0.0
        head = costs.head / 3 if number == plan.num_stages - 1 else 0.0
        early = 3 if parallel.tp == 1 else 1  # the fused loss of one rank makes its gradients at once
        forward.append((matrices + attention + embedding + early * head) / unit)
        input_.append((matrices + 2 * attention + 2 * embedding + (3 - early) * head) / unit)
        weight.append(matrices / unit)
    return StageTimes(tuple(forward), tuple(input_), tuple(weight))


def _simulated(config: RunConfig, parallel: ParallelConfig, micro_batches: int) -> Timeline:
    """The configured model under some schedule; memory in micro-batches · layers."""
    model, seq_length = config.model, config.train.seq_length
    plan = plan_stages(model, parallel, seq_length)
    table = schedule_table(parallel.pp_schedule, parallel.pp, parallel.stages_per_rank, micro_batches)
    layers = tuple(float(len(part)) for part in plan.layers)
    return simulate(table, stage_times(model, parallel, seq_length, plan), StageBytes(layers, layers))


def _alternatives(config: RunConfig, micro_batches: int) -> tuple[Alternative, ...]:
    """Every schedule, with as many stages per rank as configured where it takes any number of them."""
    result = []
    for schedule in get_args(Schedule):
        fixed = schedule in SINGLE_STAGE or schedule in V_SHAPED
        stages = 0 if fixed or config.parallel.stages_per_rank == 1 else config.parallel.stages_per_rank
        parallel = dataclasses.replace(config.parallel, pp_schedule=schedule, pp_stages=stages)
        count = parallel.stages_per_rank
        try:
            parallel.validate_model(config.model)
            parallel.validate_microbatches(micro_batches)
        except UserError as error:
            result.append(Alternative(schedule, count, reason=str(error)))
            continue
        timeline = _simulated(config, parallel, micro_batches)
        result.append(Alternative(schedule, count, timeline.bubble, max(timeline.peak_bytes)))
    return tuple(result)
