"""Weight gradient of 8,192 tokens, 14,336 outputs and 4,096 inputs.

NVIDIA GPUs take torch's own product for it; the kernel is compiled for them too, since it serves while GEMMs are tuned.
"""

from __future__ import annotations

import torch

from megalite_kernels.triton import linear
from tests.triton_gate.gate import Case


def _accumulate(dtype: torch.dtype) -> None:
    dy = torch.empty(8192, 14336, dtype=dtype, device="meta")
    x = torch.empty(8192, 4096, dtype=dtype, device="meta")
    linear.accumulate_(dy, x, torch.empty(14336, 4096, device="meta"))


CASES = [
    Case(
        "linear_weight_grad_ 8192x14336x4096 bf16",
        lambda: _accumulate(torch.bfloat16),
        tensor_cores=("weight_grad_kernel",),
    ),
    Case("linear_weight_grad_ 8192x14336x4096 fp32", lambda: _accumulate(torch.float32)),
]
