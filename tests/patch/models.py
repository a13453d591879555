"""Tiny random models of every covered family, with the number of modules that patch replaces in each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from megalite_kernels.backend import choose

VOCAB = 97
LAYERS = 2
BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
WINDOW = 7
"""Shorter than the sequences of the tests."""


@dataclass(frozen=True)
class Family:
    """A Hugging Face architecture."""

    config: Any
    settings: dict[str, Any]
    per_layer: dict[str, int]
    norm: str = "rms_norm"

    def counts(self) -> dict[str, int]:
        """Replaced modules: those of the layers, the last norm and the loss."""
        total = {kind: LAYERS * count for kind, count in self.per_layer.items()}
        total[self.norm] += 1
        return {**total, "linear_cross_entropy": 1}


LLAMA = {"rms_norm": 2, "rope": 1, "attention": 1, "swiglu": 1}
FAMILIES = {
    "gpt2": Family(
        transformers.GPT2Config,
        {
            "vocab_size": VOCAB, "n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 64, "bos_token_id": 1,
            "eos_token_id": None, "pad_token_id": 0, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
            "loss_type": "ForCausalLM",
        },
        {"layer_norm": 2, "attention": 1, "gelu": 1},
        norm="layer_norm",
    ),
    "llama": Family(transformers.LlamaConfig, BASE, LLAMA),
    "llama-tied": Family(transformers.LlamaConfig, {**BASE, "tie_word_embeddings": True}, LLAMA),
    "qwen2": Family(transformers.Qwen2Config, BASE, LLAMA),
    "qwen3": Family(transformers.Qwen3Config, {**BASE, "head_dim": 16}, {**LLAMA, "rms_norm": 4}),
    "mistral": Family(transformers.MistralConfig, {**BASE, "sliding_window": WINDOW}, LLAMA),
    "gemma2": Family(
        transformers.Gemma2Config,
        {
            **BASE, "head_dim": 16, "sliding_window": WINDOW, "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0,
        },
        {"rms_norm": 4, "rope": 1, "attention": 1, "geglu": 1},
    ),
    "gemma3": Family(
        transformers.Gemma3TextConfig,
        {
            **BASE, "head_dim": 16, "sliding_window": WINDOW, "query_pre_attn_scalar": 24,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        {"rms_norm": 6, "rope": 1, "attention": 1, "geglu": 1},
    ),
}  # fmt: skip


def hugging_face(name: str, **settings: Any) -> nn.Module:
    """A model of the family with random weights, every one of them different from zero and one."""
    family = FAMILIES[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(family.config(**{**family.settings, **settings}))
    return randomize(model)


def randomize(model: nn.Module) -> nn.Module:
    """Away from the starting values, which hide mistakes: no bias zero, no gain one, attention far from uniform."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
            elif not any(word in name for word in ("embed", "wte", "wpe", "lm_head")):
                parameter.mul_(1.2 / (parameter.std() * parameter.shape[-1] ** 0.5))
    return model


def tokens(batch: int = 2, length: int = 13, vocab: int = VOCAB) -> Tensor:
    """Random ids without the special ones."""
    return torch.randint(3, vocab, (batch, length), generator=torch.Generator().manual_seed(2))


class NanoLayerNorm(nn.Module):
    """LayerNorm with an optional bias."""

    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, input: Tensor) -> Tensor:
        return F.layer_norm(input, self.weight.shape, self.weight, self.bias, 1e-5)


class NanoAttention(nn.Module):
    """Causal self-attention with one projection for q, k and v."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.c_attn = nn.Linear(width, 3 * width, bias=False)
        self.c_proj = nn.Linear(width, width, bias=False)
        self.resid_dropout = nn.Dropout(dropout)
        self.n_head, self.dropout = heads, dropout

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.size()
        q, k, v = (
            y.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for y in self.c_attn(x).split(C, 2)
        )
        dropout = self.dropout if self.training else 0
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, None, dropout, is_causal=True)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C)))


class NanoMLP(nn.Module):
    """Two projections with GELU between them."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.gelu = nn.GELU()
        self.c_proj = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class NanoBlock(nn.Module):
    """Pre-norm block."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = NanoLayerNorm(width, False), NanoLayerNorm(width, True)
        self.attn, self.mlp = NanoAttention(width, heads, dropout), NanoMLP(width, dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class NanoGPT(nn.Module):
    """A model in nanoGPT's style: the loss is computed in the forward, from (idx, targets)."""

    def __init__(self, vocab: int = VOCAB, width: int = 32, heads: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocab, width),
                "wpe": nn.Embedding(64, width),
                "h": nn.ModuleList([NanoBlock(width, heads, dropout) for _ in range(LAYERS)]),
                "ln_f": NanoLayerNorm(width, False),
            }
        )
        self.lm_head = nn.Linear(width, vocab, bias=False)
        self.transformer.wte.weight = self.lm_head.weight

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        x = self.transformer.wte(idx) + self.transformer.wpe(torch.arange(idx.shape[1]))
        for block in self.transformer.h:
            x = block(x)
        x = self.transformer.ln_f(x)
        if targets is None:
            return self.lm_head(x[:, [-1], :]), None
        logits = self.lm_head(x)
        loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)
        return logits, loss


def nano_counts() -> dict[str, int]:
    """Of NanoGPT; exact GELU only where a kernel of its own exists."""
    counts = {"layer_norm": 2 * LAYERS + 1, "attention": LAYERS, "linear_cross_entropy": 1}
    return {**counts, "gelu": LAYERS} if has_exact_gelu() else counts


def has_exact_gelu() -> bool:
    """Whether a backend other than the reference does it on this CPU."""
    return "reference" not in choose("activation_fwd", "cpu", (torch.zeros(1), "gelu")).__module__


class Gated(nn.Module):
    """A gated MLP in another codebase's names."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Linear(width, inner), nn.Linear(inner, width)
        self.w3 = nn.Linear(width, inner)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.act(self.w1(x)) * self.w3(x))


def plain_stack() -> nn.Module:
    """torch's own modules in a row."""
    torch.manual_seed(0)
    return randomize(
        nn.Sequential(
            nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(approximate="tanh"), nn.Linear(64, 32), nn.RMSNorm(32),
            Gated(32, 48), nn.RMSNorm(32, eps=1e-5), nn.LayerNorm(32, bias=False),
        )
    )  # fmt: skip


PLAIN_COUNTS = {"layer_norm": 2, "rms_norm": 2, "gelu": 1, "swiglu": 1}
