"""config.json ↔ ModelConfig, and what is refused, by field and value."""

from __future__ import annotations

import json
import re

import pytest

from megalite.config import ModelConfig, RopeScaling
from megalite.errors import UserError
from megalite.interop.hf_config import config_from_hf, config_to_hf
from megalite.models.presets import PRESETS
from tests.interop.hf_models import CASES, LLAMA3_SCALING, build


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "tiny"])
def test_presets_survive_the_round_trip(name):
    config = PRESETS[name]
    values = json.loads(json.dumps(config_to_hf(config)))
    reread = config_from_hf(values)
    assert config_to_hf(reread) == values
    for field in ("kv_heads", "size_per_head", "rope_scaling", "rope_theta", "norm_eps", "activation"):
        assert getattr(reread, field) == getattr(config, field), field


@pytest.mark.parametrize("name", CASES)
def test_our_file_means_the_same_to_transformers(name, tmp_path):
    """Every field that transformers itself would write has the same value after a trip through ours."""
    kind, _ = CASES[name]
    theirs = build(name).config
    ours = config_to_hf(config_from_hf(theirs.to_dict()), eos_token_id=0)
    (tmp_path / "config.json").write_text(json.dumps(ours))
    reread = kind.from_pretrained(tmp_path).to_dict()
    expected = theirs.to_dict()
    free = {"_name_or_path", "transformers_version", "architectures", "dtype", "pad_token_id"}
    free |= {"attn_pdrop", "embd_pdrop", "resid_pdrop", "n_inner", "head_dim"}  # no effect, or now explicit
    if "window" not in name:
        free |= {"sliding_window", "max_window_layers"}
    different = {k for k in expected if k not in free and reread.get(k) != expected[k]}
    assert not different, {k: (expected[k], reread.get(k)) for k in different}


def test_old_and_new_ways_to_write_rope_settings():
    values = config_to_hf(ModelConfig(vocab_size=7))
    del values["rope_theta"], values["rope_scaling"]
    scaling = RopeScaling(
        kind="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=16,
    )
    new = config_from_hf(values | {"rope_parameters": {"rope_theta": 5e5, **LLAMA3_SCALING}})
    old = config_from_hf(values | {"rope_theta": 5e5, "rope_scaling": LLAMA3_SCALING})
    assert new == old
    assert (new.rope_theta, new.rope_scaling) == (5e5, scaling)
    ancient = config_from_hf(values | {"rope_scaling": {"type": "linear", "factor": 2}})
    assert ancient.rope_scaling == RopeScaling(kind="linear", factor=2.0)


LLAMA = config_to_hf(ModelConfig(vocab_size=7))
QWEN3 = config_to_hf(ModelConfig(family="qwen3", vocab_size=7, qk_norm=True, num_layers=4, sliding_window=8))
GPT2 = config_to_hf(PRESETS["gpt2-124m"])
REFUSED = {
    "mixture of experts": ({**LLAMA, "model_type": "mixtral"}, "model_type='mixtral' is not supported"),
    "no type": ({"vocab_size": 7}, "model_type=None is not supported"),
    "experts": ({**LLAMA, "num_local_experts": 8}, "num_local_experts=8 is not supported"),
    "sinks": ({**LLAMA, "attention_sinks": True}, "attention_sinks=True is not supported"),
    "quantised": ({**LLAMA, "quantization_config": {"bits": 4}}, "quantization_config={'bits': 4}"),
    "yarn": (
        {**LLAMA, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        "rope_scaling.rope_type='yarn' is not supported: only 'default', 'linear' or 'llama3'",
    ),
    "partial rotary": (
        {**LLAMA, "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "rope_parameters.partial_rotary_factor=0.5 is not supported",
    ),
    "rope by layer type": (
        {**LLAMA, "rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
        "rope_parameters.full_attention={'rope_theta': 10000.0} is not supported: only one setting",
    ),
    "no factor": ({**LLAMA, "rope_scaling": {"type": "linear"}}, "config.json has no rope_scaling.factor"),
    "activation": ({**LLAMA, "hidden_act": "relu"}, "hidden_act='relu' is not supported: only 'silu'"),
    "no vocabulary": ({**LLAMA, "vocab_size": None}, "config.json has no vocab_size"),
    "layer pattern": (
        {**QWEN3, "layer_types": ["sliding_attention", "full_attention"] * 2},
        "layer_types=['sliding_attention', 'full_attention'",
    ),
    "chunked": ({**QWEN3, "layer_types": ["chunked_attention"] * 4}, "layer_types=['chunked_attention'"),
    "too few layer types": ({**QWEN3, "layer_types": ["sliding_attention"]}, "layer_types=['sliding_att"),
    "sliding without window": ({**QWEN3, "use_sliding_window": False}, "sliding_window=8 is not supported"),
    "llama with window": ({**LLAMA, "layer_types": ["sliding_attention"] * 6}, "layer_types=['sliding_att"),
    "gpt2 activation": ({**GPT2, "activation_function": "gelu"}, "activation_function='gelu'"),
    "gpt2 scale": ({**GPT2, "scale_attn_weights": False}, "scale_attn_weights=False is not supported"),
    "gpt2 layer scale": (
        {**GPT2, "scale_attn_by_inverse_layer_idx": True},
        "scale_attn_by_inverse_layer_idx=True is not supported",
    ),
    "gpt2 cross attention": ({**GPT2, "add_cross_attention": True}, "add_cross_attention=True"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_field_and_value(case):
    values, message = REFUSED[case]
    with pytest.raises(UserError, match=re.escape(message)):
        config_from_hf(values)


UNWRITABLE = {
    "llama with LayerNorm": (ModelConfig(vocab_size=7, norm="layer"), "model.norm='layer'"),
    "llama with window": (ModelConfig(vocab_size=7, sliding_window=4), "model.sliding_window=4"),
    "llama with relu2": (ModelConfig(vocab_size=7, activation="relu2"), "model.activation='relu2'"),
    "llama with qk-norm": (ModelConfig(vocab_size=7, qk_norm=True), "model.qk_norm=True"),
    "qwen3 without qk-norm": (ModelConfig(vocab_size=7, family="qwen3"), "model.qk_norm=False"),
    "qwen2 without biases": (ModelConfig(vocab_size=7, family="qwen2"), "model.qkv_bias=False"),
    "qwen2 with its own head size": (
        ModelConfig(vocab_size=7, family="qwen2", qkv_bias=True, head_dim=32),
        "model.head_dim=32 cannot be written as a qwen2 model, which has 0 or 64",
    ),
    "gpt2 with rotary positions": (ModelConfig(vocab_size=7, family="gpt2", norm="layer"), "model.position"),
    "llama with half the biases": (ModelConfig(vocab_size=7, qkv_bias=True), "model.output_bias=False"),
}


@pytest.mark.parametrize("case", UNWRITABLE)
def test_what_a_family_cannot_express_is_refused(case):
    config, message = UNWRITABLE[case]
    with pytest.raises(UserError, match=re.escape(message)):
        config_to_hf(config)
