"""The whole configuration: frozen dataclasses, every field documented, every check in one place.

Only the standard library is imported here, so any tool can read a configuration. Values derived from
others are properties, never fields. Files are parsed in ``megalite.cli``; `megalite.config_values` turns
nested dictionaries into these dataclasses and back, and refuses unknown keys.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megalite.config_checks import not_negative, positive, require
from megalite.config_model import VOCAB_MULTIPLE as VOCAB_MULTIPLE
from megalite.config_model import Family as Family
from megalite.config_model import ModelConfig as ModelConfig
from megalite.config_model import RopeScaling as RopeScaling
from megalite.config_parallel import ParallelConfig as ParallelConfig
from megalite.config_parallel import RecomputeConfig as RecomputeConfig

IGNORE_INDEX = -100
"""Label of positions that carry no loss (torch's own default)."""

FP8_MULTIPLE = 16
"""Sizes of FP8 matrix products are multiples of this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetSpec:
    """One prepared dataset folder and its share of the training samples."""

    path: str
    """Folder written by `megalite data prepare`."""
    weight: float = 1.0
    """Relative share of samples; weights need not sum to one."""

    def __post_init__(self) -> None:
        require(bool(self.path), "data.datasets.path must name a prepared dataset folder")
        require(self.weight > 0, f"data.datasets.weight={self.weight} of {self.path} must be greater than 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """What the model reads."""

    datasets: tuple[DatasetSpec, ...] = ()
    """Prepared dataset folders; all must share one tokenizer."""
    seed: int = 1234
    """Key of the sample order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101) and gradient clipping."""

    learning_rate: float = 3e-4
    """Peak learning rate."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices and embeddings; norms and biases are never decayed."""
    clip_grad_norm: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    store_param_remainders: bool = True
    """Keep of an fp32 master only the 16 bits that its bf16 weight lacks: 2 bytes per parameter less, and the same
    masters to the bit. A weight half-way between two bf16 numbers is rounded away from zero, not to even. Nothing in
    fp32, and with zero = 3, where weights are fp32."""

    def __post_init__(self) -> None:
        positive(self, "learning_rate", "eps")
        not_negative(self, "weight_decay", "clip_grad_norm")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            require(0.0 <= value < 1.0, f"optimizer.{name}={value} must be in [0, 1)")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleConfig:
    """Learning rate over the run. Lengths are in steps, or in tokens where `unit = "tokens"`."""

    kind: Literal["cosine", "wsd", "constant"] = "cosine"
    """cosine: to the floor over the run; wsd: warm-up, stable, decay; constant: after warm-up."""
    unit: Literal["steps", "tokens"] = "steps"
    """What `warmup` and `decay` count."""
    warmup: int = 100
    """Linear rise from 0 to the peak."""
    decay: int = 0
    """wsd: length of the final decay; 0 takes a fifth of the run."""
    min_ratio: float = 0.1
    """Floor as a share of the peak."""

    def __post_init__(self) -> None:
        not_negative(self, "warmup", "decay")
        require(0.0 <= self.min_ratio <= 1.0, f"schedule.min_ratio={self.min_ratio} must be in [0, 1]")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Length and batch of the run."""

    steps: int = 1000
    """Optimizer steps."""
    seq_length: int = 256
    """Tokens per sample (S)."""
    micro_batch_size: int = 16
    """Samples of one forward and backward pass on one process."""
    global_batch_size: int = 16
    """Samples of one optimizer step over all processes."""
    rampup_start: int = 0
    """Batch-size ramp: samples per step at the start; 0 is no ramp."""
    rampup_steps: int = 0
    """Batch-size ramp: steps over which it grows linearly to global_batch_size."""
    rampup_increment: int = 0
    """Batch-size ramp: it grows in multiples of this; 0 takes rampup_start."""
    seed: int = 1
    """Key of the initial weights."""
    precision: Literal["auto", "bf16", "fp32", "fp8"] = "auto"
    """auto: bf16 compute where a measured GEMM is faster in it, else fp32. fp8: the matrix products of the blocks in
    FP8, the rest in bf16; emulated on CPUs. Masters and moments are fp32."""
    fp8_scaling: Literal["rowwise", "tensorwise"] = "rowwise"
    """fp8: a scale for each token and weight row, with weight gradients in bf16; or one for each tensor, with all
    products in FP8, where tokens of one document change those of others in the last bits."""
    fp8_copies: bool = True
    """fp8: quantise weights once a step of several micro-batches, not at every use, for 2 bytes a number of the layers'
    matrices while it runs; the same bits. Never with parallel.zero=3, which keeps no whole weights."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU of this process if there is one."""
    threads: int = 0
    """CPU threads per process; 0 divides the cores among the local processes."""
    init_from: str = ""
    """Hugging Face folder whose weights the run starts from."""
    max_skipped_steps: int = 20
    """Consecutive non-finite steps after which the run ends as diverged."""
    spike_sigma: float = 6.0
    """A loss or gradient norm this many deviations above its recent mean is reported as a spike."""
    skip_spikes: bool = False
    """Spikes also skip the update, as non-finite steps always do."""
    log_interval: int = 10
    """Steps between progress lines (and between host synchronisations)."""
    profile: bool = False
    """Write a torch profiler trace of a few steps into the run directory."""
    compile: bool = False
    """Compile each block with `torch.compile`, our kernels inside it. Off: on CPUs it costs 10 to 30 s at the start and
    gains little, on GPUs nobody has measured it yet. Validation, sampling and replay run uncompiled."""
    cuda_graph: bool = False
    """Capture a whole step into one CUDA graph and replay it, which frees the host; one process on a GPU. Off: not
    measured yet."""
    gc_interval: int = 0
    """Steps between runs of Python's garbage collector, which is held off in between; 0 leaves it alone."""

    def __post_init__(self) -> None:
        positive(self, "steps", "seq_length", "micro_batch_size", "global_batch_size")
        positive(self, "max_skipped_steps", "spike_sigma", "log_interval")
        not_negative(self, "rampup_start", "rampup_steps", "rampup_increment", "threads", "gc_interval")
        require(
            self.global_batch_size % self.micro_batch_size == 0,
            f"train.global_batch_size={self.global_batch_size} must be a multiple of "
            f"train.micro_batch_size={self.micro_batch_size}",
        )
        if self.rampup_start:
            require(
                self.rampup_start % self.micro_batch_size == 0
                and self.ramp_increment % self.micro_batch_size == 0
                and self.rampup_start <= self.global_batch_size,
                f"train.rampup_start={self.rampup_start} and rampup_increment={self.ramp_increment} must be "
                f"multiples of micro_batch_size={self.micro_batch_size} and start at most at "
                f"global_batch_size={self.global_batch_size}",
            )
            positive(self, "rampup_steps")

    @property
    def ramp_increment(self) -> int:
        """Granularity of the batch-size ramp with the default resolved."""
        return self.rampup_increment or self.rampup_start

    def batch_size_at(self, step: int) -> int:
        """Samples of step `step` (0-based), the ramp included."""
        if not self.rampup_start or step >= self.rampup_steps:
            return self.global_batch_size
        span = self.global_batch_size - self.rampup_start
        grown = span * step // self.rampup_steps // self.ramp_increment * self.ramp_increment
        return self.rampup_start + grown

    @property
    def batch_sizes(self) -> list[int]:
        """Every number of samples that a step of the run has, ascending."""
        return sorted({self.batch_size_at(step) for step in range(self.rampup_steps + 1)})

    def samples_before(self, step: int) -> int:
        """Samples consumed by all steps before `step` (0-based): the first sample number of `step`."""
        if not self.rampup_start:
            return step * self.global_batch_size
        ramp = sum(self.batch_size_at(s) for s in range(min(step, self.rampup_steps)))
        return ramp + max(0, step - self.rampup_steps) * self.global_batch_size

    def tokens_before(self, step: int) -> int:
        """Tokens consumed by all steps before `step` (0-based)."""
        return self.samples_before(step) * self.seq_length

    def validate_world(self, dp_size: int) -> None:
        """Raise if a step's samples cannot be divided over `dp_size` processes."""
        unit = self.micro_batch_size * dp_size
        sizes = {self.global_batch_size}
        if self.rampup_start:
            sizes |= {self.rampup_start, self.ramp_increment}
        for size in sorted(sizes):
            require(
                size % unit == 0,
                f"{size} samples a step cannot be divided over dp={dp_size} processes with "
                f"train.micro_batch_size={self.micro_batch_size}: use multiples of {unit}, "
                f"for example train.global_batch_size={-(-size // unit) * unit}",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalConfig:
    """Validation during and after training."""

    interval: int = 200
    """Steps between validations; 0 validates only at the end."""
    max_tokens: int = 65536
    """Tokens scored at the validations during training; the last one always scores every document."""
    overlap: float = 0.5
    """Share of each window that repeats earlier text as context (its labels are not scored again)."""
    samples: int = 3
    """Texts sampled at each validation; 0 samples none."""
    sample_tokens: int = 128
    """Tokens of each sampled text."""
    temperature: float = 0.8
    """Sampling temperature; 0 takes the likeliest token."""
    prompts: tuple[str, ...] = ("",)
    """Texts the samples start from, in turn; the empty prompt starts a new document."""

    def __post_init__(self) -> None:
        not_negative(self, "interval", "samples", "temperature")
        positive(self, "max_tokens", "sample_tokens")
        require(0.0 <= self.overlap < 1.0, f"eval.overlap={self.overlap} must be in [0, 1)")


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
    """When and how the run is saved."""

    interval: int = 500
    """Steps between checkpoints; 0 saves only at the end and on SIGTERM/SIGINT."""
    keep_last: int = 2
    """Checkpoints kept; 0 keeps all."""
    asynchronous: bool = True
    """Write in the background while training goes on."""

    def __post_init__(self) -> None:
        not_negative(self, "interval", "keep_last")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """One pre-training run."""

    name: str = "run"
    """Name of the run."""
    run_dir: str = ""
    """Folder of the run; empty is runs/<name>."""
    preset: str = ""
    """Model preset that fills [model]; fields given explicitly win."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        require(
            self.train.seq_length <= self.model.max_position_embeddings,
            f"train.seq_length={self.train.seq_length} must be at most "
            f"model.max_position_embeddings={self.model.max_position_embeddings}",
        )
        if self.train.compile:
            self._require_plain_layout("train.compile=true", ("tp", "cp", "pp"))
        if self.train.cuda_graph:
            self._require_plain_layout("train.cuda_graph=true", ("tp", "cp", "pp"))

    def _require_plain_layout(self, what: str, axes: tuple[str, ...]) -> None:
        """Raise if a setting meets a layout that it does not know."""
        split = [f"parallel.{axis}={size}" for axis in axes if (size := getattr(self.parallel, axis)) > 1]
        if self.parallel.zero == 3:
            split.append("parallel.zero=3")
        require(not split, f"{what} does not go with {', '.join(split)}: turn off one or the other")

    def validate_fp8(self) -> None:
        """Check that the products of a run with `train.precision = "fp8"` have sizes that FP8 units take.

        Raises:
            UserError: naming the size and what it must be a multiple of.
        """
        if self.train.precision != "fp8":
            return
        model, tp, cp = self.model, self.parallel.tp, self.parallel.cp
        heads, kv_heads = model.num_attention_heads // tp, max(1, model.kv_heads // tp)
        tokens = self.train.micro_batch_size * self.train.seq_length // cp
        sizes = {
            "model.hidden_size": model.hidden_size,
            f"model.ffn_hidden_size / parallel.tp={tp}": model.ffn_hidden_size // tp,
            f"model.num_attention_heads · head_dim / parallel.tp={tp}": heads * model.size_per_head,
            f"all query, key and value heads · head_dim / parallel.tp={tp}": (heads + 2 * kv_heads)
            * model.size_per_head,
            f"train.micro_batch_size · train.seq_length / parallel.cp={cp}": tokens,
        }
        for name, size in sizes.items():
            require(
                size % FP8_MULTIPLE == 0,
                f"{name} = {size} must be a multiple of {FP8_MULTIPLE} with train.precision='fp8': change it, or take "
                "train.precision='bf16'",
            )
        require(
            self.parallel.tp_chunks == 1,
            f"parallel.tp_chunks={self.parallel.tp_chunks}: FP8 products are not cut, set it to 1 with "
            "train.precision='fp8'",
        )

    @property
    def directory(self) -> str:
        """Folder of the run with the default resolved."""
        return self.run_dir or f"runs/{self.name}"
