"""Published model shapes by name. Each is the model's own configuration file, in our words."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

from megalite.config import ModelConfig, RopeScaling
from megalite.errors import UserError


def _gpt2(layers: int, hidden: int, heads: int) -> ModelConfig:
    return ModelConfig(
        family="gpt2",
        vocab_size=50257,
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=4 * hidden,
        num_attention_heads=heads,
        max_position_embeddings=1024,
        norm="layer",
        norm_eps=1e-5,
        activation="gelu_tanh",
        position="learned",
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
    )


def _llama2(layers: int, hidden: int, ffn: int, heads: int, kv_heads: int = 0) -> ModelConfig:
    return ModelConfig(
        family="llama",
        vocab_size=32000,
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=4096,
        norm_eps=1e-5,
    )


def _llama3(layers: int, hidden: int, ffn: int, heads: int, **changes: Any) -> ModelConfig:
    config = ModelConfig(
        family="llama",
        vocab_size=128256,
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        norm_eps=1e-5,
        rope_theta=500000.0,
    )
    return dataclasses.replace(config, **changes)


def _long(factor: float) -> dict[str, Any]:
    """Llama 3.1's and 3.2's stretch from 8,192 to 131,072 positions."""
    return {"max_position_embeddings": 131072, "rope_scaling": RopeScaling(kind="llama3", factor=factor)}


def _qwen2(
    layers: int, hidden: int, ffn: int, heads: int, kv_heads: int, positions: int, **changes: Any
) -> ModelConfig:
    config = ModelConfig(
        family="qwen2",
        vocab_size=151936,
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=positions,
        rope_theta=1000000.0,
        qkv_bias=True,
        tie_word_embeddings=True,
    )
    return dataclasses.replace(config, **changes)


def _qwen3(layers: int, hidden: int, ffn: int, heads: int, *, tied: bool) -> ModelConfig:
    return ModelConfig(
        family="qwen3",
        vocab_size=151936,
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        rope_theta=1000000.0,
        qk_norm=True,
        tie_word_embeddings=tied,
    )


PRESETS: dict[str, ModelConfig] = {
    # For the first run on a CPU; the vocabulary comes from the data's tokenizer. Small, so that it sees many
    # tokens in the minutes that run has: with so little compute, larger models at equal FLOPs end worse.
    "tiny": ModelConfig(
        family="qwen3",
        num_layers=4,
        hidden_size=128,
        ffn_hidden_size=352,
        num_attention_heads=2,
        max_position_embeddings=1024,
        qk_norm=True,
    ),
    # Small enough to compare trainers on a CPU, large enough that matrix products decide (58M parameters).
    "llama-60m": dataclasses.replace(_llama2(8, 512, 1408, 8), max_position_embeddings=512),
    "gpt2-124m": _gpt2(12, 768, 12),
    "gpt2-350m": _gpt2(24, 1024, 16),
    "gpt2-774m": _gpt2(36, 1280, 20),
    "gpt2-1.5b": _gpt2(48, 1600, 25),
    "llama2-7b": _llama2(32, 4096, 11008, 32),
    "llama2-13b": _llama2(40, 5120, 13824, 40),
    "llama2-70b": _llama2(80, 8192, 28672, 64, 8),
    "llama3-8b": _llama3(32, 4096, 14336, 32),
    "llama3-70b": _llama3(80, 8192, 28672, 64),
    "llama3.1-8b": _llama3(32, 4096, 14336, 32, **_long(8.0)),
    "llama3.1-70b": _llama3(80, 8192, 28672, 64, **_long(8.0)),
    "llama3.1-405b": _llama3(126, 16384, 53248, 128, **_long(8.0)),
    "llama3.2-1b": _llama3(16, 2048, 8192, 32, tie_word_embeddings=True, **_long(32.0)),
    "llama3.2-3b": _llama3(28, 3072, 8192, 24, tie_word_embeddings=True, **_long(32.0)),
    "qwen2.5-0.5b": _qwen2(24, 896, 4864, 14, 2, 32768),
    "qwen2.5-1.5b": _qwen2(28, 1536, 8960, 12, 2, 131072),
    "qwen2.5-7b": _qwen2(28, 3584, 18944, 28, 4, 131072, vocab_size=152064, tie_word_embeddings=False),
    "qwen3-0.6b": _qwen3(28, 1024, 3072, 16, tied=True),
    "qwen3-1.7b": _qwen3(28, 2048, 6144, 16, tied=True),
    "qwen3-4b": _qwen3(36, 2560, 9728, 32, tied=True),
    "qwen3-8b": _qwen3(36, 4096, 12288, 32, tied=False),
    "mistral-7b": ModelConfig(
        family="mistral",
        vocab_size=32000,
        num_layers=32,
        hidden_size=4096,
        ffn_hidden_size=14336,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=32768,
        norm_eps=1e-5,
        sliding_window=4096,
    ),
}


def preset(name: str) -> ModelConfig:
    """The model called `name`.

    Raises:
        UserError: there is none; the message has the nearest names.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"use one of {', '.join(PRESETS)}"
        raise UserError(f"unknown model preset {name!r}: {hint}")
    return PRESETS[name]
