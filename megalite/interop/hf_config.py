"""Hugging Face ``config.json`` ↔ `ModelConfig`.

Reading refuses, by field and value, whatever would change the function the model computes and that we do not
have; fields that only matter elsewhere (generation, dropout in training, caches) are passed over.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from megalite.config import ModelConfig, RopeScaling
from megalite.errors import UserError
from megalite.models.families import check_family

_ARCHITECTURES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mistral": "MistralForCausalLM",
}
_GATED_NAMES = {"swiglu": "silu", "geglu": "gelu_pytorch_tanh"}
_PLAIN_NAMES = {"gelu_tanh": "gelu_new", "relu2": "relu2"}
_ACTIVATIONS = {"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu", "gelu_new": "geglu"}
_GPT2_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu2": "relu2"}
# Settings of other architectures; at these values, or absent, they change nothing.
_NEUTRAL = {
    "quantization_config": (None,),
    "num_local_experts": (None, 0, 1),
    "num_experts": (None, 0),
    "n_routed_experts": (None, 0),
    "add_cross_attention": (None, False),
    "is_encoder_decoder": (None, False),
    "scale_attn_weights": (None, True),
    "scale_attn_by_inverse_layer_idx": (None, False),
    "attention_sinks": (None, False, 0),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "logit_scale": (None, 1.0),
    "partial_rotary_factor": (None, 1.0),
}


def config_to_hf(
    config: ModelConfig, *, dtype: str = "float32", eos_token_id: int | None = None
) -> dict[str, Any]:
    """The ``config.json`` of `config`.

    Args:
        config: a model whose family can express it.
        dtype: "float32", "bfloat16" or "float16": what the tensors are stored in.
        eos_token_id: end-of-document token; it is also the one that starts a document.

    Raises:
        UserError: the family cannot express the configuration.
    """
    check_family(config)
    common: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[config.family]],
        "model_type": config.family,
        "dtype": dtype,
        "vocab_size": config.vocab_size,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": eos_token_id,
        "eos_token_id": eos_token_id,
    }
    return common | (_gpt2_to_hf(config) if config.family == "gpt2" else _llama_to_hf(config))


def _gpt2_to_hf(config: ModelConfig) -> dict[str, Any]:
    return {
        "n_positions": config.max_position_embeddings,
        "n_embd": config.hidden_size,
        "n_layer": config.num_layers,
        "n_head": config.num_attention_heads,
        "n_inner": config.ffn_hidden_size,
        "activation_function": _PLAIN_NAMES[config.activation],
        "layer_norm_epsilon": config.norm_eps,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }


def _llama_to_hf(config: ModelConfig) -> dict[str, Any]:
    values: dict[str, Any] = {
        "max_position_embeddings": config.max_position_embeddings,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.size_per_head,
        "hidden_act": _GATED_NAMES[config.activation],
        "rms_norm_eps": config.norm_eps,
        "attention_dropout": 0.0,
        # Written in the form that transformers 4 and 5 and other readers all know.
        "rope_theta": config.rope_theta,
        "rope_scaling": _scaling_to_hf(config.rope_scaling),
    }
    if config.family in ("llama", "qwen3"):
        values["attention_bias"] = config.qkv_bias
    if config.family == "llama":
        values["mlp_bias"] = config.mlp_bias
    if config.family == "mistral":
        values["sliding_window"] = config.sliding_window or None
    if config.family in ("qwen2", "qwen3"):
        windows = [config.window_of_layer(i) for i in range(config.num_layers)]
        values["use_sliding_window"] = config.sliding_window > 0
        values["sliding_window"] = config.sliding_window or None
        values["max_window_layers"] = min(config.sliding_window_start_layer, config.num_layers)
        values["layer_types"] = ["sliding_attention" if w else "full_attention" for w in windows]
    return values


def _scaling_to_hf(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    values: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        values["low_freq_factor"] = scaling.low_freq_factor
        values["high_freq_factor"] = scaling.high_freq_factor
        values["original_max_position_embeddings"] = scaling.original_max_position_embeddings
    return values


def config_from_hf(values: Mapping[str, Any]) -> ModelConfig:
    """The `ModelConfig` of a ``config.json``.

    Raises:
        UserError: another architecture, a missing field, or a setting that changes what the model computes
            and that we do not have; the message names the field and its value.
    """
    family = values.get("model_type")
    if family not in _ARCHITECTURES:
        _refuse("model_type", family, f"one of {', '.join(_ARCHITECTURES)}")
    for field, neutral in _NEUTRAL.items():
        if values.get(field) not in neutral:
            _refuse(field, values[field], f"{' or '.join(repr(v) for v in neutral)}")
    config = _gpt2_from_hf(values) if family == "gpt2" else _llama_from_hf(family, values)
    check_family(config)
    return config


def _gpt2_from_hf(values: Mapping[str, Any]) -> ModelConfig:
    hidden = _required(values, "n_embd")
    return ModelConfig(
        family="gpt2",
        vocab_size=_required(values, "vocab_size"),
        num_layers=_required(values, "n_layer"),
        hidden_size=hidden,
        ffn_hidden_size=values.get("n_inner") or 4 * hidden,
        num_attention_heads=_required(values, "n_head"),
        max_position_embeddings=_required(values, "n_positions"),
        norm="layer",
        norm_eps=values.get("layer_norm_epsilon", 1e-5),
        activation=_choose(values, "activation_function", "gelu_new", _GPT2_ACTIVATIONS),
        position="learned",
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        tie_word_embeddings=values.get("tie_word_embeddings", True),
        init_std=values.get("initializer_range", 0.02),
    )


def _llama_from_hf(family: Any, values: Mapping[str, Any]) -> ModelConfig:
    heads = _required(values, "num_attention_heads")
    layers = _required(values, "num_hidden_layers")
    attention_bias = bool(values.get("attention_bias", False))
    theta, scaling = _rope_from_hf(values)
    window, start = _window_from_hf(family, values, layers)
    # What transformers assumes where the field is absent; null means "as many as query heads".
    default_kv_heads = {"llama": heads, "qwen2": 32, "qwen3": 32, "mistral": 8}[family]
    hidden = _required(values, "hidden_size")
    default_head_dim = 128 if family == "qwen3" else None
    return ModelConfig(
        family=family,
        vocab_size=_required(values, "vocab_size"),
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=_required(values, "intermediate_size"),
        num_attention_heads=heads,
        num_key_value_heads=values.get("num_key_value_heads", default_kv_heads) or heads,
        head_dim=values.get("head_dim", default_head_dim) or hidden // heads,
        max_position_embeddings=_required(values, "max_position_embeddings"),
        norm_eps=values.get("rms_norm_eps", 1e-6),
        activation=_choose(values, "hidden_act", "silu", _ACTIVATIONS),
        rope_theta=theta,
        rope_scaling=scaling,
        qkv_bias=family == "qwen2" or attention_bias,
        output_bias=attention_bias and family != "qwen2",
        mlp_bias=bool(values.get("mlp_bias", False)),
        qk_norm=family == "qwen3",
        sliding_window=window,
        sliding_window_start_layer=start,
        tie_word_embeddings=values.get("tie_word_embeddings", False),
        init_std=values.get("initializer_range", 0.02),
    )


def _rope_from_hf(values: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """(theta, scaling) from transformers 5's `rope_parameters` or 4's `rope_theta` and `rope_scaling`."""
    field = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    rope: Mapping[str, Any] = values.get(field) or {}
    for key, value in rope.items():
        if isinstance(value, Mapping):
            _refuse(f"{field}.{key}", value, "one setting for all layers")
    theta = float(rope.get("rope_theta", values.get("rope_theta", 10000.0)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        _refuse(f"{field}.partial_rotary_factor", rope["partial_rotary_factor"], "1.0")
    if kind == "default":
        return theta, None
    if kind not in ("linear", "llama3"):
        _refuse(f"{field}.rope_type", kind, "'default', 'linear' or 'llama3'")
    factor = float(_required(rope, "factor", field))
    if kind == "linear":
        return theta, RopeScaling(kind="linear", factor=factor)
    original = rope.get("original_max_position_embeddings", values.get("max_position_embeddings"))
    return theta, RopeScaling(
        kind="llama3",
        factor=factor,
        low_freq_factor=float(_required(rope, "low_freq_factor", field)),
        high_freq_factor=float(_required(rope, "high_freq_factor", field)),
        original_max_position_embeddings=original,
    )


def _window_from_hf(family: str, values: Mapping[str, Any], layers: int) -> tuple[int, int]:
    """(sliding window or 0, first layer that has it)."""
    types = values.get("layer_types")
    if family == "mistral":
        window = values.get("sliding_window", 4096) or 0
        if types is not None and set(types) != {"sliding_attention" if window else "full_attention"}:
            _refuse("layer_types", types, "the same type in every layer of a mistral model")
        return window, 0
    if family == "llama":
        if types is not None and set(types) != {"full_attention"}:
            _refuse("layer_types", types, "'full_attention' in every layer of a llama model")
        return 0, 0
    window = (values.get("sliding_window", 4096) or 0) if values.get("use_sliding_window") else 0
    start = values.get("max_window_layers", 28)
    if types is None:
        return (window, start) if window and start < layers else (0, 0)
    full = types.count("full_attention")
    if len(types) != layers or types != ["full_attention"] * full + ["sliding_attention"] * (layers - full):
        _refuse("layer_types", types, f"{layers} layers, full_attention first and sliding_attention after")
    if full == layers:
        return 0, 0
    if not window:
        _refuse("sliding_window", values.get("sliding_window"), "a window, as layer_types has sliding layers")
    return window, full


def _required(values: Mapping[str, Any], field: str, where: str = "") -> Any:
    if values.get(field) is None:
        dotted = f"{where}.{field}" if where else field
        raise UserError(f"config.json has no {dotted}: it is needed to know the model's shape")
    return values[field]


def _choose(values: Mapping[str, Any], field: str, default: str, known: Mapping[str, str]) -> Any:
    value = values.get(field, default)
    if value not in known:
        _refuse(field, value, " or ".join(map(repr, known)))
    return known[value]


def _refuse(field: str, value: Any, supported: str) -> NoReturn:
    raise UserError(f"config.json: {field}={value!r} is not supported: only {supported}")
