"""FP8 quantisation of 8,192 tokens and of a 14,336 x 4,096 weight, for GPUs that multiply these formats.

Triton converts to e4m3fn from sm_89 on; gfx942 has other formats.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from megalite_kernels.triton import fp8
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


CASES = [
    Case("fp8 tensor 8192x4096 bf16 e5m2", _tensor(8192, 4096, torch.bfloat16, E5M2), targets=TARGETS),
    Case("fp8 rows 8192x4096 bf16 e4m3", _rows(8192, 4096, torch.bfloat16), targets=TARGETS),
    Case("fp8 rows 8192x65536 bf16 e4m3", _rows(8192, 65536, torch.bfloat16), targets=TARGETS),
    Case(
        "fp8 columns 14336x4096 bf16 e4m3",
        lambda: fp8.quantize_columns(torch.empty(14336, 4096, dtype=torch.bfloat16, device="meta"), E4M3),
        targets=TARGETS,
    ),
]
