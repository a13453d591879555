"""Shape and ingredients of a model, as a configuration states them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megalite.config_checks import not_negative, positive, require

VOCAB_MULTIPLE = 128
"""Vocabulary rows are padded in memory to a multiple of this, whatever the layout; never in files."""

Family = Literal["gpt2", "llama", "qwen2", "qwen3", "mistral"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the length a model was first trained for."""

    kind: Literal["linear", "llama3"]
    """linear: every position divided by the factor; llama3: long wavelengths only, with a smooth transition."""
    factor: float
    """Stretch of the positions (8.0 for Llama 3.1)."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths longer than original / this are stretched in full."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths shorter than original / this are left alone."""
    original_max_position_embeddings: int = 8192
    """llama3: the length the unstretched model was trained for."""

    def __post_init__(self) -> None:
        require(self.factor >= 1.0, f"model.rope_scaling.factor={self.factor} must be at least 1")
        require(
            self.high_freq_factor > self.low_freq_factor > 0,
            f"model.rope_scaling needs high_freq_factor={self.high_freq_factor} > "
            f"low_freq_factor={self.low_freq_factor} > 0",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Shape and ingredients of one decoder-only transformer."""

    family: Family = "llama"
    """Which Hugging Face architecture its weights are written as."""
    vocab_size: int = 0
    """True number of token ids; 0 takes it from the data's tokenizer."""
    num_layers: int = 6
    """Transformer blocks."""
    hidden_size: int = 256
    """Width of the residual stream (H)."""
    ffn_hidden_size: int = 704
    """Width inside the MLP (F)."""
    num_attention_heads: int = 4
    """Query heads (N)."""
    num_key_value_heads: int = 0
    """Key/value heads (K); 0 means as many as query heads."""
    head_dim: int = 0
    """Size of one head (D); 0 means hidden_size / num_attention_heads."""
    max_position_embeddings: int = 4096
    """Longest sequence the positions are defined for."""
    norm: Literal["rms", "layer"] = "rms"
    """RMSNorm or LayerNorm."""
    norm_eps: float = 1e-6
    """Added to the variance inside the norms."""
    activation: Literal["swiglu", "geglu", "gelu_tanh", "relu2"] = "swiglu"
    """MLP activation; the gated ones have a gate and an up projection."""
    position: Literal["rope", "learned"] = "rope"
    """Rotary or learned absolute positions."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling | None = None
    """Stretching of the rotary frequencies, if any."""
    qkv_bias: bool = False
    """Biases on the q, k and v projections (GPT-2, Qwen 2)."""
    output_bias: bool = False
    """Bias on the attention output projection (GPT-2)."""
    mlp_bias: bool = False
    """Biases on the MLP projections (GPT-2)."""
    qk_norm: bool = False
    """RMSNorm on each query and key head before the rotation (Qwen 3)."""
    sliding_window: int = 0
    """Tokens a query may look back at, itself included; 0 is no limit."""
    sliding_window_start_layer: int = 0
    """First layer that uses the sliding window (Qwen 2's max_window_layers); earlier ones see everything."""
    tie_word_embeddings: bool = False
    """The output head reuses the embedding matrix."""
    init_std: float = 0.02
    """Standard deviation of the initial weights; output projections get it divided by sqrt(2 * num_layers)."""
    dropout: float = 0.0
    """Must stay 0: there is no dropout (it would tie the bits of a run to its layout)."""

    def __post_init__(self) -> None:
        positive(self, "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")
        positive(self, "max_position_embeddings", "norm_eps", "rope_theta", "init_std")
        not_negative(self, "vocab_size", "num_key_value_heads", "head_dim", "sliding_window")
        not_negative(self, "sliding_window_start_layer")
        require(
            self.dropout == 0.0,
            f"model.dropout={self.dropout} is not supported: set it to 0. Pre-training passes over its data about "
            "once, where dropout only costs quality, and its masks would differ between parallel layouts",
        )
        require(
            self.head_dim > 0 or self.hidden_size % self.num_attention_heads == 0,
            f"model.hidden_size={self.hidden_size} must be a multiple of "
            f"model.num_attention_heads={self.num_attention_heads}, or give model.head_dim",
        )
        require(
            self.num_attention_heads % self.kv_heads == 0,
            f"model.num_attention_heads={self.num_attention_heads} must be a multiple of "
            f"model.num_key_value_heads={self.kv_heads}",
        )
        require(
            self.position != "rope" or self.size_per_head % 2 == 0,
            f"model.head_dim={self.size_per_head} must be even for rotary positions",
        )

    @property
    def kv_heads(self) -> int:
        """Key/value heads with the default resolved."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def size_per_head(self) -> int:
        """Head dimension with the default resolved."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def gated(self) -> bool:
        """The MLP has a gate projection."""
        return self.activation in ("swiglu", "geglu")

    @property
    def padded_vocab_size(self) -> int:
        """Vocabulary rows held in memory."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    def window_of_layer(self, layer: int) -> int:
        """Sliding window of one layer; 0 is no limit."""
        return self.sliding_window if layer >= self.sliding_window_start_layer else 0
