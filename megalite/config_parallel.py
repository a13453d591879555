"""How a run is spread over processes, and what it computes again to save memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from megalite.config_checks import not_negative, positive, require, require_divides

if TYPE_CHECKING:
    from megalite.config import ModelConfig

Schedule = Literal[
    "gpipe", "1f1b", "looped_bfs", "interleaved", "interleaved_zero_bubble", "zbv", "dualpipev"
]
SINGLE_STAGE = ("gpipe", "1f1b")
"""Schedules in which a pipeline rank holds one stage."""
V_SHAPED = ("zbv", "dualpipev")
"""Schedules in which rank r holds stages r and 2 · pp - 1 - r, so that the first rank also has the last stage."""
ZERO_BUBBLE = ("interleaved_zero_bubble", "zbv", "dualpipev")
"""Schedules that compute the gradients of weights apart from those of activations, to fill idle time with them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    """How the run is spread over processes: dp follows from their number, dp = processes / (tp · cp · pp)."""

    tp: int = 1
    """Ranks that split the matrices of every layer (tensor parallel)."""
    sequence_parallel: bool = True
    """With tp > 1: norms and residual stream are split over the same ranks, by tokens."""
    cp: int = 1
    """Ranks that split the tokens of every sequence (context parallel)."""
    cp_method: Literal["ring", "ulysses"] = "ring"
    """ring: keys and values travel; ulysses: all-to-all over heads, which cp must divide."""
    pp: int = 1
    """Ranks that split the layers (pipeline parallel)."""
    pp_schedule: Schedule = "1f1b"
    """Order of the forward and backward passes of a step's micro-batches."""
    pp_stages: int = 0
    """Stages on each pipeline rank; 0 takes the schedule's: 1 for gpipe and 1f1b, 2 for the others."""
    zero: Literal[0, 1, 3] = 1
    """What data-parallel ranks divide: 0 nothing; 1 optimizer state (ZeRO-1); 3 weights and gradients too (FSDP2)."""
    dp_shard: int = 0
    """Ranks of dp that divide the state between them, each such group holding all of it; 0: all of dp."""
    grad_reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """Type in which gradients travel between data-parallel ranks; they are summed in fp32 either way."""
    bucket_size: int = 40_000_000
    """Parameters whose gradients are reduced together, while the backward pass goes on."""
    tp_chunks: int = 1
    """Parts into which forward products of tensor-parallel layers are cut, so that communication hides behind them."""
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    """Collective library; auto is nccl on GPUs and gloo on CPUs."""
    timeout_s: float = 600.0
    """Seconds a collective may wait before the run is ended with an error."""

    def __post_init__(self) -> None:
        positive(self, "tp", "cp", "pp", "timeout_s", "bucket_size", "tp_chunks")
        not_negative(self, "pp_stages", "dp_shard")
        stages, schedule = self.pp_stages, self.pp_schedule
        require(
            stages <= 1 or schedule not in SINGLE_STAGE,
            f"parallel.pp_stages={stages} does not fit pp_schedule={schedule!r}, whose ranks hold 1 stage: take "
            "pp_schedule='interleaved'",
        )
        require(
            stages in (0, 2) or schedule not in V_SHAPED,
            f"parallel.pp_stages={stages} does not fit pp_schedule={schedule!r}, whose ranks hold 2 stages",
        )

    @property
    def stages_per_rank(self) -> int:
        """Stages on each pipeline rank with the default resolved."""
        return self.pp_stages or (1 if self.pp_schedule in SINGLE_STAGE or self.pp == 1 else 2)

    @property
    def num_stages(self) -> int:
        """Stages of the pipeline; 1 without one."""
        return self.pp * self.stages_per_rank if self.pp > 1 else 1

    def validate_microbatches(self, count: int) -> None:
        """Check that the schedule can run a step of `count` micro-batches per data-parallel rank.

        Raises:
            UserError: naming the schedule, the count and the nearest that fit.
        """
        if self.pp == 1:
            return
        schedule, rounds = self.pp_schedule, max(1, count // self.pp)
        least = {"1f1b": self.pp, "dualpipev": self.num_stages}.get(schedule, 1)
        require(
            count >= least,
            f"parallel.pp_schedule={schedule!r} over pp={self.pp} ranks needs at least {least} micro-batches a step, "
            f"not {count}: raise train.global_batch_size or lower train.micro_batch_size",
        )
        require(
            not schedule.startswith("interleaved") or count % rounds == 0,
            f"parallel.pp_schedule={schedule!r} needs micro-batches in whole rounds of pp={self.pp}, not {count} a "
            f"step: take {count // self.pp * self.pp} or {-(-count // self.pp) * self.pp}",
        )

    def dp_size(self, world_size: int) -> int:
        """Data-parallel ranks among `world_size` processes.

        Raises:
            UserError: the processes do not divide into whole replicas of the model.
        """
        replica = self.tp * self.cp * self.pp
        below, above = world_size // replica * replica, -(-world_size // replica) * replica
        require(
            world_size % replica == 0,
            f"parallel.tp={self.tp} · cp={self.cp} · pp={self.pp} needs a multiple of {replica} processes, not "
            f"{world_size}: start {f'{below} or ' if below else ''}{above}",
        )
        dp = world_size // replica
        if self.dp_shard:
            require_divides("dp_shard", self.dp_shard, dp, "the data-parallel ranks dp")
        return dp

    def validate_model(self, model: ModelConfig) -> None:
        """Check that the model can be cut this way.

        Raises:
            UserError: naming the degree, the size it does not divide, and the nearest degrees that do.
        """
        heads, kv_heads = model.num_attention_heads, model.kv_heads
        require_divides("tp", self.tp, heads, "model.num_attention_heads")
        require_divides("tp", self.tp, model.ffn_hidden_size, "model.ffn_hidden_size")
        require(
            kv_heads % self.tp == 0 or self.tp % kv_heads == 0,
            f"parallel.tp={self.tp} must divide model.num_key_value_heads={kv_heads} or be a multiple of it",
        )
        if self.cp_method == "ulysses":
            local = max(1, kv_heads // self.tp)
            require_divides("cp", self.cp, local, "the key/value heads of a tensor-parallel rank")
        require(
            self.num_stages <= model.num_layers,
            f"parallel.pp={self.pp} · {self.stages_per_rank} stages each = {self.num_stages} must be at most "
            f"model.num_layers={model.num_layers}: a stage needs a layer",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RecomputeConfig:
    """What the backward pass computes again instead of the forward pass keeping it (activation checkpointing)."""

    kind: Literal["auto", "none", "selective", "full", "budget"] = "auto"
    """auto: what costs next to nothing (on CPUs the parts norm and activation, where the backward passes of norms and
    activations write their outputs again; on GPUs nothing); none; selective: the parts named in `parts`; full: whole
    layers; budget: as little as fits `budget_gb`."""
    parts: tuple[Literal["attention", "norm", "activation", "mlp"], ...] = ("norm", "activation")
    """What selective recomputes in every layer. mlp takes a matrix product, the others passes over memory."""
    budget_gb: float = 0.0
    """budget: GB (1e9 bytes) of activations that one rank may keep."""

    def __post_init__(self) -> None:
        not_negative(self, "budget_gb")
        require(
            self.kind != "budget" or self.budget_gb > 0,
            f"recompute.budget_gb={self.budget_gb} must be greater than 0 with recompute.kind='budget'",
        )
        require(
            self.kind != "selective" or bool(self.parts),
            "recompute.parts must name at least one part with recompute.kind='selective'",
        )
