"""Activations in plain torch: gelu, relu², and the gated swiglu and geglu.

Sources: Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016 (the tanh form is GPT-2's `gelu_new`);
So et al., "Primer", 2021 (relu²); Shazeer, "GLU Variants Improve Transformer", 2020 (swiglu, geglu).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from megalite_kernels.reference.common import widen

SQRT_2_OVER_PI = math.sqrt(2.0 / math.pi)
GELU_CUBIC = 0.044715  # coefficient of the tanh approximation


def activate(x: Tensor, kind: str) -> Tensor:
    """The scalar function `kind` ("gelu_tanh", "gelu", "relu2" or "silu") of a wide tensor."""
    if kind == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if kind == "gelu":
        return F.gelu(x)
    if kind == "relu2":
        return torch.relu(x).square()
    return F.silu(x)


def derivative(x: Tensor, kind: str) -> Tensor:
    """The derivative of `activate` at `x`."""
    if kind == "gelu_tanh":
        t = torch.tanh(SQRT_2_OVER_PI * (x + GELU_CUBIC * x.pow(3)))
        inner = SQRT_2_OVER_PI * (1 + 3 * GELU_CUBIC * x.square())
        return torch.where(t.abs() == 1, 0.5 * (1 + t), 0.5 * (1 + t) + 0.5 * x * (1 - t.square()) * inner)
    if kind == "gelu":
        cdf = 0.5 * torch.erfc(-x * math.sqrt(0.5))
        return cdf + x * torch.exp(-0.5 * x.square()) / math.sqrt(2 * math.pi)
    if kind == "relu2":
        return 2 * torch.relu(x)
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s))


def forward(x: Tensor, kind: str) -> Tensor:
    """`activate(x)` rounded once to x's dtype."""
    return activate(widen(x), kind).to(x.dtype)


def backward(dy: Tensor, x: Tensor, kind: str) -> Tensor:
    """dx = dy * activate'(x)."""
    return (widen(dy) * derivative(widen(x), kind)).to(x.dtype)


def gated_forward(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """`activate(gate) * up` rounded once."""
    return (activate(widen(gate), kind) * widen(up)).to(gate.dtype)


def gated_backward(dy: Tensor, gate: Tensor, up: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """(dgate, dup)."""
    wide_gate, wide_dy = widen(gate), widen(dy)
    dup = wide_dy * activate(wide_gate, kind)
    dgate = wide_dy * widen(up) * derivative(wide_gate, kind)
    return dgate.to(gate.dtype), dup.to(up.dtype)
