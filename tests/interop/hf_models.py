"""Small random Hugging Face models of every family, and our model of the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.overrides import TorchFunctionMode

LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    # Short, so that sequences of a test reach stretched, blended and kept frequencies.
    "original_max_position_embeddings": 16,
}
BASE = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
    "attention_dropout": 0.0,
}

# name → (configuration class, its settings)
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "gpt2": (
        transformers.GPT2Config,
        {"vocab_size": 131, "n_embd": 48, "n_layer": 3, "n_head": 6, "n_positions": 64},
    ),
    "gpt2-untied-relu2": (
        transformers.GPT2Config,
        {
            "vocab_size": 256,
            "n_embd": 40,
            "n_layer": 2,
            "n_head": 2,
            "n_positions": 48,
            "n_inner": 56,
            "activation_function": "relu2",
            "tie_word_embeddings": False,
        },
    ),
    "llama": (transformers.LlamaConfig, {**BASE, "num_key_value_heads": 6}),
    "llama-gqa-tied-biases": (
        transformers.LlamaConfig,
        {
            **BASE,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            "attention_bias": True,
            "mlp_bias": True,
            "head_dim": 24,
        },
    ),
    "llama3-scaling": (
        transformers.LlamaConfig,
        {
            **BASE,
            "num_key_value_heads": 3,
            "rope_parameters": {"rope_theta": 500.0, **LLAMA3_SCALING},
            "rms_norm_eps": 1e-5,
        },
    ),
    "llama-linear-scaling-geglu": (
        transformers.LlamaConfig,
        {
            **BASE,
            "num_key_value_heads": 1,
            "rope_parameters": {"rope_theta": 10000.0, "rope_type": "linear", "factor": 4.0},
            "hidden_act": "gelu_pytorch_tanh",
        },
    ),
    "qwen2": (transformers.Qwen2Config, {**BASE, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen2-window": (
        transformers.Qwen2Config,
        {
            **BASE,
            "num_key_value_heads": 2,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 1,
        },
    ),
    "qwen3": (transformers.Qwen3Config, {**BASE, "num_key_value_heads": 2, "head_dim": 16}),
    "qwen3-window-biases": (
        transformers.Qwen3Config,
        {
            **BASE,
            "num_key_value_heads": 3,
            "head_dim": 16,
            "tie_word_embeddings": True,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 7,
            "max_window_layers": 2,
        },
    ),
    "mistral-window": (
        transformers.MistralConfig,
        {**BASE, "num_key_value_heads": 2, "sliding_window": 9, "head_dim": 16},
    ),
    "mistral": (transformers.MistralConfig, {**BASE, "num_key_value_heads": 3, "sliding_window": None}),
}


def build(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The Hugging Face model of a case, every parameter (norms and biases too) random."""
    kind, settings = CASES[name]
    torch.manual_seed(sum(map(ord, name)))
    model = transformers.AutoModelForCausalLM.from_config(
        kind(**settings, bos_token_id=0, eos_token_id=0), attn_implementation="eager"
    )
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.normal_(0.0, 0.1)
            if "norm" in parameter_name or "ln_" in parameter_name:
                parameter.add_(1.0)
    return model.to(dtype).eval()


def save(name: str, folder: Path, **options: Any) -> Path:
    """Save the case's model the way transformers does."""
    build(name).save_pretrained(folder, **options)
    return folder


class WidenFloat32(TorchFunctionMode):
    """Runs code that insists on float32 (transformers' norms, softmax and angles) in float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {k: _wide(v) for k, v in (kwargs or {}).items()}
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        return func(*(_wide(a) for a in args), **kwargs)


def _wide(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value
