"""One of our models as Megatron's GPTModel, and steps of Megatron's own training loop with it."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megalite.config import IGNORE_INDEX, ModelConfig, ParallelConfig
from megalite.data.loader import MicroBatch
from tests.oracle.megatron_on_cpu import TorchNorm, cuda_is_cpu
from tests.oracle.weights import Part


@dataclass(frozen=True)
class Step:
    """What one rank has after a step. Parts are of Megatron's tensors."""

    loss: float
    """Mean over the valid labels of the step."""
    norm: float
    gradients: list[Part]
    """Where the optimizer is distributed, NaN outside of what this rank's reduce-scatter gave it."""
    weights: list[Part]
    """After the update."""


@dataclass(frozen=True)
class Optimizer:
    """What Megatron is to update with."""

    name: str = "sgd"
    learning_rate: float = 1.0
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    distributed: bool = False


def megatron_steps(
    layout: ParallelConfig,
    config: ModelConfig,
    weights: dict[str, Tensor],
    steps: list[list[MicroBatch]],
    optimizer: Optimizer,
) -> list[Step]:
    """One rank's part of a run: a job for ranks in which nothing but Megatron runs.

    Args:
        layout: tp, sequence_parallel and pp; what is left of the ranks is dp.
        config: of our model.
        weights: Megatron's tensors of the whole model (`weights.to_megatron`).
        steps: the micro-batches of each step, of all data-parallel ranks.
        optimizer: what to update with.
    """
    warnings.simplefilter("ignore")  # Megatron's, about what is not installed and what it deprecated
    with cuda_is_cpu():
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel import random

        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tp, pipeline_model_parallel_size=layout.pp
        )
        # Nothing random is left (no dropout, weights given), and a CPU has no state of a CUDA generator to fork.
        random.initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
        try:
            return _run(layout, config, weights, steps, optimizer)
        finally:
            parallel_state.destroy_model_parallel()


def _run(
    layout: ParallelConfig,
    config: ModelConfig,
    weights: dict[str, Tensor],
    steps: list[list[MicroBatch]],
    wanted: Optimizer,
) -> list[Step]:
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func

    model = build(layout, config)
    for name, parameter, place in _places(model):
        parameter.data.copy_(weights[name][place])
    settings = DistributedDataParallelConfig(use_distributed_optimizer=wanted.distributed)
    ddp = DistributedDataParallel(model.config, settings, model)
    optimizer = get_megatron_optimizer(_optimizer_config(OptimizerConfig, wanted), [ddp])
    _set_rates(optimizer, wanted)
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    done = []
    for batches in steps:
        mine = batches[rank::size]
        ddp.zero_grad_buffer()
        optimizer.zero_grad()
        reports = get_forward_backward_func()(
            forward_step_func=functools.partial(_forward_step, window=config.sliding_window),
            data_iterator=iter(mine),
            model=ddp,
            num_microbatches=len(mine),
            seq_length=mine[0].tokens.numel(),
            micro_batch_size=1,
        )
        gradients = [
            Part(name, place, _owned(optimizer, p, wanted.distributed)) for name, p, place in _places(model)
        ]
        updated, norm, _ = optimizer.step()
        assert updated
        after = [Part(name, place, parameter.data.clone()) for name, parameter, place in _places(model)]
        done.append(Step(_mean_loss(reports), float(norm), gradients, after))
    return done


def build(layout: ParallelConfig, config: ModelConfig) -> Any:
    """This rank's stage of Megatron's model, its weights not yet filled."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    layer = get_gpt_layer_local_spec(qk_layernorm=config.qk_norm, normalization="RMSNorm")
    attention = layer.submodules.self_attention.submodules
    layer.submodules = dataclasses.replace(
        layer.submodules, input_layernorm=TorchNorm, pre_mlp_layernorm=TorchNorm
    )
    if config.qk_norm:
        attention.q_layernorm = attention.k_layernorm = TorchNorm
    own_layers = config.num_layers // layout.pp
    return GPTModel(
        config=transformer_config(layout, config),
        transformer_layer_spec=TransformerBlockSubmodules(
            layer_specs=[layer] * own_layers, layer_norm=TorchNorm
        ),
        vocab_size=config.vocab_size,
        max_sequence_length=config.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=config.tie_word_embeddings,
        position_embedding_type="rope" if config.position == "rope" else "learned_absolute",
        rotary_base=config.rope_theta,
    )


def transformer_config(layout: ParallelConfig, config: ModelConfig) -> Any:
    """Our model's shape and ingredients in Megatron's words; every fusion that needs a GPU or a compiler is off."""
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.transformer import TransformerConfig

    activation = torch.nn.functional.silu
    if not config.gated:
        activation = functools.partial(torch.nn.functional.gelu, approximate="tanh")
    return TransformerConfig(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.kv_heads,
        kv_channels=config.size_per_head,
        normalization="RMSNorm" if config.norm == "rms" else "LayerNorm",
        layernorm_epsilon=config.norm_eps,
        qk_layernorm=config.qk_norm,
        gated_linear_unit=config.gated,
        activation_func=activation,
        add_bias_linear=config.mlp_bias,
        add_qkv_bias=config.qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=layout.tp,
        sequence_parallel=layout.sequence_parallel and layout.tp > 1,
        pipeline_model_parallel_size=layout.pp,
        params_dtype=torch.float32,
        pipeline_dtype=torch.float32,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        calculate_per_token_loss=True,  # sum over all valid labels of the step, divided once by their number
        finalize_model_grads_func=finalize_model_grads,
    )


def _forward_step(batches: Any, model: Any, window: int) -> tuple[Tensor, Any]:
    """A packed micro-batch, as Megatron's unfused attention takes it: one row, and a mask of what is not seen."""
    batch: MicroBatch = next(batches)
    valid = batch.labels != IGNORE_INDEX
    labels = batch.labels.masked_fill(~valid, 0)[None]
    output = model(batch.tokens[None], batch.positions[None], _hidden(batch, window), labels=labels)

    def loss(losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        total, count = (losses * valid).sum(), valid.sum().int()
        return total, count, torch.stack((total.detach().double(), count.double()))

    return output, loss


def _hidden(batch: MicroBatch, window: int) -> Tensor:
    """[1, 1, T, T], True where a query does not see a key: the future, other documents, and beyond the window.

    Megatron counts its rotary positions through the whole row, ours restart in each document: the mask leaves only
    pairs within a document, for which the rotation depends on the distance alone.
    """
    place = torch.arange(batch.tokens.numel())
    document = torch.searchsorted(batch.cu_seqlens, place, right=True)
    distance = place[:, None] - place[None, :]
    hidden = (distance < 0) | (document[:, None] != document[None, :])
    return (hidden | (distance >= window) if window else hidden)[None, None]


def _mean_loss(reports: list[Tensor]) -> float:
    """Over all micro-batches of all data-parallel ranks, told to every rank; only last stages have any."""
    sums = torch.zeros(2, dtype=torch.float64)
    for report in reports:
        sums += report
    dist.all_reduce(sums)  # tensor-parallel ranks each count the same labels, so the mean stays
    return float(sums[0] / sums[1])


def _places(model: Any) -> list[tuple[str, torch.nn.Parameter, tuple[slice, ...]]]:
    """Each parameter of this stage with its name in the whole model, and its place in the whole tensor.

    Which dim is cut is Megatron's own mark on the parameter.
    """
    from megatron.core import parallel_state

    rank = parallel_state.get_tensor_model_parallel_rank()
    found = []
    for name, parameter in model.named_parameters():
        if name.startswith("decoder.layers."):
            head, number, rest = name.split(".", 3)[1:]
            name = f"decoder.{head}.{model.decoder.layers[int(number)].layer_number - 1}.{rest}"
        place = [slice(0, size) for size in parameter.shape]
        if getattr(parameter, "tensor_model_parallel", False):
            dim, size = parameter.partition_dim, parameter.shape[parameter.partition_dim]
            place[dim] = slice(rank * size, (rank + 1) * size)
        if name == "output_layer.weight" and model.share_embeddings_and_output_weights:
            name = "embedding.word_embeddings.weight"  # the last stage's copy
        found.append((name, parameter, tuple(place)))
    return found


def _owned(optimizer: Any, parameter: torch.nn.Parameter, distributed: bool) -> Tensor:
    """The gradient; of a distributed optimizer's, what this rank owns of it, and NaN elsewhere."""
    whole = parameter.main_grad.clone()  # type: ignore[attr-defined]
    if not distributed:
        return whole
    for part in optimizer.chained_optimizers:
        if parameter in part.model_param_gbuf_map:
            own = part._get_model_param_range_map(parameter)["param"]
            owned = torch.full_like(whole, torch.nan)
            owned.view(-1)[own.start : own.end] = whole.view(-1)[own.start : own.end]
            return owned
    return torch.full_like(whole, torch.nan)


def _set_rates(optimizer: Any, wanted: Optimizer) -> None:
    """By Megatron's scheduler: only it brings to the optimizer that vectors do not decay."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    rate, decay = wanted.learning_rate, wanted.weight_decay
    OptimizerParamScheduler(
        optimizer,
        init_lr=rate,
        max_lr=rate,
        min_lr=rate,
        lr_warmup_steps=0,
        lr_decay_steps=1,
        lr_decay_style="constant",
        start_wd=decay,
        end_wd=decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )


def _optimizer_config(make: Any, wanted: Optimizer) -> Any:
    return make(
        optimizer=wanted.name,
        lr=wanted.learning_rate,
        weight_decay=wanted.weight_decay,
        sgd_momentum=0.0,
        adam_beta1=wanted.beta1,
        adam_beta2=wanted.beta2,
        adam_eps=wanted.eps,
        clip_grad=1e9,  # never clips; without a limit Megatron computes no norm
        use_distributed_optimizer=wanted.distributed,
    )
