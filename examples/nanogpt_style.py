"""A nanoGPT-style script before and after `megalite_kernels.patch`: the same losses; tokens/s and peak memory of both.

    python examples/nanogpt_style.py                          # a small model on the CPU, under a minute
    python examples/nanogpt_style.py --dtype bfloat16 --hidden 384 --layers 6 --steps 20

The model is plain torch: its own LayerNorm, `F.scaled_dot_product_attention`, and `F.cross_entropy` inside the
forward. None of it changes; your own script needs the one line between the asterisks.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence

import torch
from before_and_after import VOCAB, compare, parse, read_batches
from torch import Tensor, nn
from torch.nn import functional as F

import megalite_kernels


class LayerNorm(nn.Module):
    """LayerNorm without a bias."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, None, 1e-5)


class CausalSelfAttention(nn.Module):
    """One projection for q, k and v."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.c_attn = nn.Linear(width, 3 * width, bias=False)
        self.c_proj = nn.Linear(width, width, bias=False)
        self.n_head = heads

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.size()
        q, k, v = (y.view(B, T, self.n_head, -1).transpose(1, 2) for y in self.c_attn(x).split(C, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))


class MLP(nn.Module):
    """Two projections with GELU between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width, bias=False)
        self.gelu = nn.GELU(approximate="tanh")
        self.c_proj = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.gelu(self.c_fc(x)))


class Block(nn.Module):
    """Attention and MLP, each behind its norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln_1, self.attn = LayerNorm(width), CausalSelfAttention(width, width // 64)
        self.ln_2, self.mlp = LayerNorm(width), MLP(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """Gives (logits, loss), as nanoGPT's does."""

    def __init__(self, width: int, layers: int, length: int) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCAB, width), nn.Embedding(length, width)
        self.h = nn.ModuleList([Block(width) for _ in range(layers)])
        self.ln_f = LayerNorm(width)
        self.lm_head = nn.Linear(width, VOCAB, bias=False)
        self.wte.weight = self.lm_head.weight
        nn.init.normal_(self.lm_head.weight, std=0.02)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1], device=idx.device))
        for block in self.h:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Run the comparison; returns its figures."""
    options = parse(argv, __doc__)
    batches = read_batches(options)
    before = build(options)
    after = copy.deepcopy(before)

    # ****************************************
    report = megalite_kernels.patch(after)
    # ****************************************

    print(report)
    figures = compare(
        {"before": before, "after": after},
        lambda model, batch: model(batch[:, :-1], batch[:, 1:].contiguous())[1],
        batches,
    )
    megalite_kernels.unpatch(after)
    after.load_state_dict(before.state_dict())
    same = torch.equal(after.eval()(batches[0])[0], before.eval()(batches[0])[0])
    print(f"after unpatch, with the weights of the other: logits bitwise equal: {same}")
    return {**figures, "replaced": len(report.replaced), "restored": same}


def build(options: argparse.Namespace) -> nn.Module:
    """A GPT with random weights."""
    torch.manual_seed(0)
    model = GPT(options.hidden, options.layers, options.length)
    return model.to(options.device, getattr(torch, options.dtype)).train()


if __name__ == "__main__":
    main()
