"""The norms at training shapes: every kernel, and both sides of each limit on the length of a row."""

from __future__ import annotations

from collections.abc import Callable

import torch

from megalite_kernels.triton import layer_norm, rms_norm
from tests.triton_gate.gate import Case

BF16, FP32 = torch.bfloat16, torch.float32
ROWS = 8192


def _rms(hidden: int, dtype: torch.dtype, *, residual: bool) -> Callable[[], object]:
    def run() -> None:
        x = torch.empty(ROWS, hidden, dtype=dtype, device="meta")
        weight, rstd = x[0], torch.empty(ROWS, device="meta")
        if residual:
            rms_norm.residual_forward(x, x, weight, 1e-6, False)
        else:
            rms_norm.forward(x, weight, 1e-6, False)
        rms_norm.backward(x, x if residual else None, x, weight, rstd, False)

    return run


def _layer(hidden: int, dtype: torch.dtype, *, residual: bool) -> Callable[[], object]:
    def run() -> None:
        x = torch.empty(ROWS, hidden, dtype=dtype, device="meta")
        weight, rstd = x[0], torch.empty(ROWS, device="meta")
        if residual:
            layer_norm.residual_forward(x, x, weight, weight, 1e-5)
        else:
            layer_norm.forward(x, weight, weight, 1e-5)
        layer_norm.backward(x, x if residual else None, x, weight, rstd, rstd)

    return run


CASES = [
    Case(f"{name} {ROWS}x{hidden} {str(dtype).removeprefix('torch.')}{' residual' if residual else ''}", run)
    for hidden, dtype, residual, names in (
        (1024, BF16, False, ("rms_norm", "layer_norm")),
        (4096, BF16, False, ("rms_norm", "layer_norm")),
        (4096, FP32, False, ("rms_norm",)),
        (5120, BF16, True, ("layer_norm",)),
        (8192, BF16, True, ("rms_norm", "layer_norm")),
        (8192, FP32, True, ("layer_norm",)),
        (16384, BF16, True, ("rms_norm", "layer_norm")),
        (16384, FP32, False, ("rms_norm",)),
        (65536, BF16, True, ("rms_norm",)),
        (65536, FP32, False, ("layer_norm",)),
    )
    for name, run in (
        ("rms_norm", _rms(hidden, dtype, residual=residual)),
        ("layer_norm", _layer(hidden, dtype, residual=residual)),
    )
    if name in names
]
