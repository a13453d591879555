"""Embedding gradient of 8,192 tokens by 4,096 into 128,256 rows."""

from __future__ import annotations

import torch
from torch import Tensor

from megalite_kernels.triton import embedding
from tests.triton_gate.gate import Case


def _inputs() -> tuple[Tensor, Tensor]:
    dy = torch.empty(8192, 4096, dtype=torch.bfloat16, device="meta")
    return dy, torch.empty(8192, dtype=torch.int64, device="meta")


CASES = [
    Case("embedding_bwd 8192x4096 into 128256 bf16", lambda: embedding.backward(*_inputs(), 128256)),
    Case(
        "embedding_bwd_ 8192x4096 into 128256 fp32",
        lambda: embedding.backward_(*_inputs(), torch.empty(128256, 4096, device="meta")),
    ),
]
