"""Models of other libraries, unmodified, each with a forward pass from tokens and labels to the mean loss."""

from __future__ import annotations

import functools
import importlib.util
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers.job import Job
from megalite.config import ModelConfig, ParallelConfig
from megalite.models.families import hf_tensors


class WithLoss(nn.Module):
    """A model that returns logits, and torch's cross-entropy in fp32 after it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """[B, S] and [B, S] → scalar"""
        logits = self.model(tokens)
        return F.cross_entropy(logits.float().view(-1, logits.shape[-1]), labels.view(-1))


def hf_state(job: Job, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights under their Hugging Face names."""
    return {tensor.name: tensor.assemble(weights.__getitem__) for tensor in hf_tensors(job.model)}


def load(model: nn.Module, state: dict[str, Tensor], may_miss: tuple[str, ...] = ()) -> None:
    """Fill a model; everything must fit but what ends in one of `may_miss` (tied or derived)."""
    missing, unexpected = model.load_state_dict(state, strict=False)
    left = [name for name in missing if not name.endswith(may_miss)] if may_miss else missing
    if left or unexpected:
        raise ValueError(f"the weights do not fit: missing {left}, unexpected {unexpected}")


# --- Hugging Face transformers --------------------------------------------------------------------------------------
class HuggingFace(nn.Module):
    """With its own loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """[B, S] and [B, S] → scalar"""
        answer = self.model(input_ids=tokens, labels=labels, shift_labels=labels, use_cache=False)
        loss: Tensor = answer.loss
        return loss


def hugging_face(job: Job, weights: dict[str, Tensor], *, liger: bool = False) -> nn.Module:
    """AutoModelForCausalLM with sdpa attention, with Liger's kernels where asked for."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(Path(job.folder) / "weights")
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    load(model, hf_state(job, weights), ("lm_head.weight", "inv_freq"))
    model.tie_weights()
    if liger:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model=model)
    return HuggingFace(model)


# --- litgpt ---------------------------------------------------------------------------------------------------------
def litgpt(job: Job, weights: dict[str, Tensor]) -> nn.Module:
    """litgpt's GPT. Its package imports lightning and more before its model, which needs none of them."""
    if "litgpt" not in sys.modules:
        spec = importlib.util.find_spec("litgpt")
        assert spec is not None
        package = types.ModuleType("litgpt")
        package.__path__ = list(spec.submodule_search_locations or ())
        package.__spec__ = spec
        convert = types.ModuleType("litgpt.scripts.convert_hf_checkpoint")
        convert.qkv_reassemble = None  # type: ignore[attr-defined] # for checkpoints of old versions
        sys.modules |= {"litgpt": package, convert.__name__: convert}
    from litgpt.config import Config
    from litgpt.model import GPT

    config = job.model
    model = GPT(
        Config(
            block_size=job.seq_length, n_layer=config.num_layers, n_embd=config.hidden_size,
            vocab_size=config.vocab_size, padded_vocab_size=config.vocab_size, norm_class_name="RMSNorm",
            norm_eps=config.norm_eps, parallel_residual=False, n_head=config.num_attention_heads,
            head_size=config.size_per_head, n_query_groups=config.kv_heads, rope_base=int(config.rope_theta),
            rotary_percentage=1.0, intermediate_size=config.ffn_hidden_size, bias=False, mlp_class_name="LLaMAMLP",
        )
    )  # fmt: skip
    names = {
        "attention_norm": "norm_1", "mlp_norm": "norm_2", "attention.o_proj": "attn.proj",
        "mlp.gate_proj": "mlp.fc_1", "mlp.up_proj": "mlp.fc_2", "mlp.down_proj": "mlp.proj",
    }  # fmt: skip
    state = {
        "transformer.wte.weight": weights["embedding.weight"],
        "transformer.ln_f.weight": weights["final_norm.weight"],
        "lm_head.weight": weights["embedding.weight" if config.tie_word_embeddings else "head.weight"],
    }
    for layer in range(config.num_layers):
        ours, theirs = f"layers.{layer}", f"transformer.h.{layer}"
        state |= {f"{theirs}.{b}.weight": weights[f"{ours}.{a}.weight"] for a, b in names.items()}
        parts = [weights[f"{ours}.attention.{x}_proj.weight"] for x in "qkv"]
        state[f"{theirs}.attn.qkv.weight"] = torch.cat(parts)
    load(model, state)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.transformer.wte.weight
    return WithLoss(model)


# --- torchtitan -----------------------------------------------------------------------------------------------------
def torchtitan(job: Job, weights: dict[str, Tensor]) -> nn.Module:
    """torchtitan's Llama 3 with its SDPA module: its default, flex attention, has no backward pass on CPUs."""
    from torchtitan.models import llama3
    from torchtitan.models.common.attention import ScaledDotProductAttention
    from torchtitan.models.llama3.state_dict_adapter import Llama3StateDictAdapter

    config = job.model
    rope = llama3.ComplexRoPE.Config(
        dim=config.size_per_head, max_seq_len=job.seq_length, theta=config.rope_theta, scaling="none"
    )
    layers = llama3._build_llama3_layers(
        n_layers=config.num_layers, dim=config.hidden_size, n_heads=config.num_attention_heads,
        n_kv_heads=config.kv_heads, hidden_dim=config.ffn_hidden_size, rope=rope, attn_backend="flex",
    )  # fmt: skip
    norm = functools.partial(llama3.RMSNorm.Config, normalized_shape=config.hidden_size, eps=config.norm_eps)
    for layer in layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
        layer.attention_norm = norm(param_init=layer.attention_norm.param_init)
        layer.ffn_norm = norm(param_init=layer.ffn_norm.param_init)
    whole = llama3.Llama3Model.Config(
        dim=config.hidden_size,
        vocab_size=config.vocab_size,
        tok_embeddings=llama3.Embedding.Config(
            num_embeddings=config.vocab_size,
            embedding_dim=config.hidden_size,
            param_init=llama3._EMBEDDING_INIT,
        ),
        norm=norm(param_init=llama3._NORM_INIT),
        lm_head=llama3.Linear.Config(
            in_features=config.hidden_size, out_features=config.vocab_size, param_init=llama3._LINEAR_INIT
        ),
        layers=layers,
        enable_weight_tying=config.tie_word_embeddings,
    )
    model = whole.build()
    state = Llama3StateDictAdapter(whole, None).from_hf(hf_state(job, weights))
    model.init_states(buffer_device=torch.device("cpu"))
    load(model, state, ("lm_head.weight", "tok_embeddings.weight") if config.tie_word_embeddings else ())
    return WithLoss(model)


# --- Megatron-LM ----------------------------------------------------------------------------------------------------
class Attention(nn.Module):
    """torch's attention as Megatron's core attention, whose own needs TransformerEngine or materialises all scores."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        """[S, B, N, D] each → [S, B, N·D]"""
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        return y.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)


class Megatron(nn.Module):
    """GPTModel with its own loss; on a CPU, within what answers for the GPU."""

    def __init__(self, model: nn.Module, device: str) -> None:
        super().__init__()
        self.model, self.device = model, device

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """[B, S] and [B, S] → scalar"""
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        with _answers(self.device):
            losses: Tensor = self.model(tokens, positions, None, labels=labels)
        return losses.mean()


def _answers(device: str) -> Any:
    from contextlib import nullcontext

    from tests.oracle.megatron_on_cpu import cuda_is_cpu

    return cuda_is_cpu() if device == "cpu" else nullcontext()


def megatron(job: Job, weights: dict[str, Tensor]) -> nn.Module:
    """megatron-core's GPTModel from its local layers, in one process."""
    import torch.distributed as dist

    from tests.oracle.megatron_model import build
    from tests.oracle.weights import to_megatron

    warnings.simplefilter("ignore")  # about what is not installed and what is deprecated
    with _answers(job.device):
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel import random

        if not dist.is_initialized():
            backend = "nccl" if job.device == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
            parallel_state.initialize_model_parallel()
            random.initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
        model: nn.Module = build(ParallelConfig(), job.model)
        state = to_megatron(weights, job.model, 1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(state[name])
        for layer in model.decoder.layers:  # type: ignore[union-attr]
            layer.self_attention.core_attention = Attention()
    return Megatron(model, job.device)


def only_llama(config: ModelConfig) -> str:
    """Why litgpt's and torchtitan's Llama cannot be this model; empty if they can."""
    if config.family != "llama" or config.rope_scaling or config.qkv_bias or config.mlp_bias:
        return f"only Llama shapes without biases and stretched positions, and the preset is {config.family}"
    return ""


def no_stretch(config: ModelConfig) -> str:
    """Why megatron-core cannot be this model as it is built here; empty if it can."""
    for name in ("rope_scaling", "sliding_window"):
        if getattr(config, name):
            return f"{name} is not set up for it, and the preset has one"
    return ""


def anything(config: ModelConfig) -> str:
    """No objection."""
    return ""
