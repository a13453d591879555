"""FP8 quantisation of 8,192 tokens and of a 14,336 x 4,096 weight, alone and within norms and activations, for GPUs
that multiply these formats.

Triton converts to e4m3fn from sm_89 on; gfx942 has other formats.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from megalite_kernels.triton import fp8, fp8_activation, fp8_norm
from tests.triton_gate.gate import Case

TARGETS = ("sm_90", "sm_100")
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def _tensor(rows: int, columns: int, dtype: torch.dtype, fp8_dtype: torch.dtype) -> Callable[[], object]:
    def run() -> None:
        x = torch.empty(rows, columns, dtype=dtype, device="meta")
        scale = fp8.tensor_scale(x, fp8_dtype)
        fp8.cast(x, scale, fp8_dtype)
        fp8.cast_transposed(x, scale, fp8_dtype)

    return run


def _rows(rows: int, columns: int, dtype: torch.dtype) -> Callable[[], object]:
    return lambda: fp8.quantize_rows(torch.empty(rows, columns, dtype=dtype, device="meta"), E4M3)


def _norm(hidden: int, *, layer: bool) -> Callable[[], object]:
    """With a residual, in training the usual case; and alone."""

    def run() -> None:
        x = torch.empty(8192, hidden, dtype=torch.bfloat16, device="meta")
        if layer:
            fp8_norm.layer_norm(x, x[0], x[0], 1e-5)
            fp8_norm.layer_norm_residual(x, x, x[0], x[0], 1e-5)
        else:
            fp8_norm.rms_norm(x, x[0], 1e-6, False)
            fp8_norm.rms_norm_residual(x, x, x[0], 1e-6, False)

    return run


def _activation(features: int, kind: str) -> Callable[[], object]:
    def run() -> None:
        x = torch.empty(8192, features * (2 if kind == "silu" else 1), dtype=torch.bfloat16, device="meta")
        (fp8_activation.packed_forward if kind == "silu" else fp8_activation.forward)(x, kind)

    return run


CASES = [
    Case("fp8 rms_norm 8192x4096", _norm(4096, layer=False), targets=TARGETS),
    Case("fp8 layer_norm 8192x5120", _norm(5120, layer=True), targets=TARGETS),
    Case("fp8 rms_norm 8192x16384", _norm(16384, layer=False), targets=TARGETS),
    Case("fp8 layer_norm 8192x65536", _norm(65536, layer=True), targets=TARGETS),
    Case("fp8 swiglu 8192x1408", _activation(1408, "silu"), targets=TARGETS),
    Case("fp8 swiglu 8192x14336", _activation(14336, "silu"), targets=TARGETS),
    Case("fp8 swiglu 8192x28672", _activation(28672, "silu"), targets=TARGETS),
    Case("fp8 gelu 8192x16384", _activation(16384, "gelu_tanh"), targets=TARGETS),
    Case("fp8 tensor 8192x4096 bf16 e5m2", _tensor(8192, 4096, torch.bfloat16, E5M2), targets=TARGETS),
    Case("fp8 rows 8192x4096 bf16 e4m3", _rows(8192, 4096, torch.bfloat16), targets=TARGETS),
    Case("fp8 rows 8192x65536 bf16 e4m3", _rows(8192, 65536, torch.bfloat16), targets=TARGETS),
    Case(
        "fp8 columns 14336x4096 bf16 e4m3",
        lambda: fp8.quantize_columns(torch.empty(14336, 4096, dtype=torch.bfloat16, device="meta"), E4M3),
        targets=TARGETS,
    ),
]
