"""Plain PyTorch models in the idiom of nanoGPT: what one writes first, and what `torch.compile` likes best.

One linear layer for q, k and v, ``F.scaled_dot_product_attention``, ``F.cross_entropy`` over all logits at once. A
GPT-2 shape has LayerNorm, learned positions, GELU and biases; a Llama shape RMSNorm, rotary positions and SwiGLU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers.job import Job
from megalite.config import ModelConfig


class SelfAttention(nn.Module):
    """Causal self-attention; rotary positions where tables are given."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head = (
            config.num_attention_heads,
            config.kv_heads,
            config.size_per_head,
        )
        width = (self.heads + 2 * self.kv_heads) * self.head
        self.c_attn = nn.Linear(config.hidden_size, width, bias=config.qkv_bias)
        self.c_proj = nn.Linear(self.heads * self.head, config.hidden_size, bias=config.output_bias)

    def forward(self, x: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        """[B, S, H] → [B, S, H]"""
        batch, length, _ = x.shape
        sizes = [self.heads * self.head, self.kv_heads * self.head, self.kv_heads * self.head]
        q, k, v = self.c_attn(x).split(sizes, dim=2)
        q = q.view(batch, length, self.heads, self.head).transpose(1, 2)
        k = k.view(batch, length, self.kv_heads, self.head).transpose(1, 2)
        v = v.view(batch, length, self.kv_heads, self.head).transpose(1, 2)
        if cos is not None and sin is not None:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.kv_heads != self.heads)
        return self.c_proj(y.transpose(1, 2).reshape(batch, length, -1))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The halves of each head turned by position: x [B, N, S, D], tables [S, D / 2]."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x.dtype)


class GatedMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.ffn_hidden_size, bias=config.mlp_bias)
        self.up = nn.Linear(config.hidden_size, config.ffn_hidden_size, bias=config.mlp_bias)
        self.down = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, H] → [B, S, H]"""
        return self.down(F.silu(self.gate(x)) * self.up(x))


class MLP(nn.Module):
    """GELU between two linear layers."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.hidden_size, config.ffn_hidden_size, bias=config.mlp_bias)
        self.down = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, H] → [B, S, H]"""
        return self.down(F.gelu(self.up(x), approximate="tanh"))


def make_norm(config: ModelConfig) -> nn.Module:
    """The configured norm."""
    make = nn.RMSNorm if config.norm == "rms" else nn.LayerNorm
    return make(config.hidden_size, eps=config.norm_eps)


class Block(nn.Module):
    """Attention and MLP, each after a norm and around a residual."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = make_norm(config), make_norm(config)
        self.attn = SelfAttention(config)
        self.mlp = GatedMLP(config) if config.gated else MLP(config)

    def forward(self, x: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        """[B, S, H] → [B, S, H]"""
        x = x + self.attn(self.ln_1(x), cos, sin)
        return x + self.mlp(self.ln_2(x))


class Model(nn.Module):
    """Tokens and labels to the mean loss."""

    cos: Tensor | None
    sin: Tensor | None

    def __init__(self, config: ModelConfig, seq_length: int) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.wpe = None
        if config.position == "learned":
            self.wpe = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.h = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.ln_f = make_norm(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.wte.weight
        cos, sin = rotary_tables(config, seq_length) if config.position == "rope" else (None, None)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """[B, S] and [B, S] → scalar"""
        x = self.wte(tokens)
        if self.wpe is not None:
            x = x + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.h:
            x = block(x, self.cos, self.sin)
        logits = self.lm_head(self.ln_f(x))
        return F.cross_entropy(logits.float().view(-1, logits.shape[-1]), labels.view(-1))


def rotary_tables(config: ModelConfig, seq_length: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines, fp32 [S, D / 2] each."""
    half = torch.arange(0, config.size_per_head, 2, dtype=torch.float32) / config.size_per_head
    angles = torch.outer(torch.arange(seq_length, dtype=torch.float32), config.rope_theta**-half)
    return angles.cos(), angles.sin()


def refuse(config: ModelConfig) -> str:
    """Why the model cannot be one of these; empty if it can."""
    for name in ("qk_norm", "sliding_window", "rope_scaling"):
        if getattr(config, name):
            return f"the plain model has no {name}, and the preset does"
    return "" if config.activation in ("swiglu", "gelu_tanh") else f"no activation {config.activation}"


def build(job: Job, weights: dict[str, Tensor]) -> nn.Module:
    """The model with the given weights (canonical names)."""
    config = job.model
    model = Model(config, job.seq_length)
    names = {
        "wte": "embedding", "wpe": "position_embedding", "ln_f": "final_norm", "lm_head": "head",
        "ln_1": "attention_norm", "ln_2": "mlp_norm", "attn.c_proj": "attention.o_proj",
        "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj",
    }  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            stem, _, kind = name.rpartition(".")
            prefix = ""
            if stem.startswith("h."):
                _, layer, stem = stem.split(".", 2)
                prefix = f"layers.{layer}."
            if stem == "attn.c_attn":
                parts = [weights[f"{prefix}attention.{x}_proj.{kind}"] for x in "qkv"]
                parameter.copy_(torch.cat(parts))
            else:
                parameter.copy_(weights[f"{prefix}{names[stem]}.{kind}"])
    return model
