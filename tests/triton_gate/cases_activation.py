"""The activations at training shapes."""

from __future__ import annotations

from collections.abc import Callable

import torch

from megalite_kernels.triton import activation
from tests.triton_gate.gate import Case

BF16, FP32 = torch.bfloat16, torch.float32
ROWS = 8192


def _packed(features: int, dtype: torch.dtype, kind: str) -> Callable[[], object]:
    def run() -> None:
        packed = torch.empty(ROWS, 2 * features, dtype=dtype, device="meta")
        activation.packed_backward(activation.packed_forward(packed, kind), packed, kind)

    return run


def _pair(features: int, dtype: torch.dtype, kind: str) -> Callable[[], object]:
    def run() -> None:
        gate = torch.empty(ROWS, features, dtype=dtype, device="meta")
        activation.gated_backward(activation.gated_forward(gate, gate, kind), gate, gate, kind)

    return run


def _plain(features: int, dtype: torch.dtype, kind: str) -> Callable[[], object]:
    def run() -> None:
        x = torch.empty(ROWS, features, dtype=dtype, device="meta")
        activation.backward(activation.forward(x, kind), x, kind)

    return run


CASES = [
    Case(f"swiglu packed {ROWS}x14336 bfloat16", _packed(14336, BF16, "silu")),
    Case(f"swiglu packed {ROWS}x11008 float32", _packed(11008, FP32, "silu")),
    Case(f"swiglu pair {ROWS}x14336 bfloat16", _pair(14336, BF16, "silu")),
    Case(f"geglu pair {ROWS}x16384 bfloat16", _pair(16384, BF16, "gelu_tanh")),
    Case(f"gelu {ROWS}x16384 bfloat16", _plain(16384, BF16, "gelu_tanh")),
    Case(f"exact gelu {ROWS}x16384 float32", _plain(16384, FP32, "gelu")),
    Case(f"relu_squared {ROWS}x16384 bfloat16", _plain(16384, BF16, "relu2")),
]
