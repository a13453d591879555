"""The norms at training shapes."""

from __future__ import annotations

import torch

from megalite_kernels.triton import rms_norm
from tests.triton_gate.gate import Case


def _rms_forward() -> None:
    x = torch.empty(8192, 4096, dtype=torch.bfloat16, device="meta")
    rms_norm.forward(x, x[0], 1e-6, False)


CASES = [Case("rms_norm_fwd 8192x4096 bf16", _rms_forward)]
