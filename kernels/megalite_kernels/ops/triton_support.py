"""What the Triton kernels take, asked before an op is given to them."""

from __future__ import annotations

import os
from typing import Any

import torch

from megalite_kernels.scaled_mm import lacks_fp8

TRITON = "triton"
"""Module that must import for the "triton" backend."""

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def triton_supports(*args: Any) -> str | None:
    """None if every tensor is on a GPU (or Triton interprets) and of at most 32 bits, else the reason."""
    for value in args:
        tensors = value if isinstance(value, (list, tuple)) else (value,)
        for tensor in tensors:
            if not isinstance(tensor, torch.Tensor):
                continue
            if tensor.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
                return (
                    f"runs on GPUs, a tensor is on {tensor.device} (TRITON_INTERPRET=1 interprets it there)"
                )
            if tensor.is_floating_point() and tensor.dtype not in _DTYPES:
                return f"takes bfloat16, float16 and float32, not {tensor.dtype}"
    return None


def triton_fp8_supports(*args: Any) -> str | None:
    """As `triton_supports`, on GPUs that convert to FP8: elsewhere these kernels do not compile."""
    reason = triton_supports(*args)
    if reason is not None or args[0].device.type != "cuda":
        return reason
    return lacks_fp8(args[0].device)


def triton_attention_supports(*args: Any) -> str | None:
    """As `triton_supports`, for `attention_fwd` and `attention_bwd`, whose first argument is like q."""
    dim = args[0].shape[-1]
    return f"takes head dims up to 256, not {dim}" if dim > 256 else triton_supports(*args)
