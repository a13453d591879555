"""FP8 products by torch's own `_scaled_mm` (cuBLASLt and CUTLASS), on NVIDIA GPUs that have FP8 tensor cores."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FP8_CAPABILITY = (8, 9)
"""First compute capability with FP8 tensor cores (Ada; Hopper is 9.0)."""
MULTIPLE = 16
"""Elements that the summed dim and the output's columns must be a multiple of."""


def lacks_fp8(device: torch.device) -> str | None:
    """None if this device multiplies FP8 matrices, else the reason."""
    if device.type != "cuda":
        return f"runs on NVIDIA GPUs, a tensor is on {device}"
    if torch.version.hip is not None:
        return "AMD's GPUs of today multiply other FP8 formats (fnuz) than e4m3fn and e5m2"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < FP8_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        return f"{name} has compute capability {major}.{minor}: FP8 tensor cores start at 8.9"
    return None


def scaled_mm_supports(*args: Any) -> str | None:
    """As `lacks_fp8`, for the arguments of `fp8_product`, whose sizes must be multiples of 16."""
    a, b = args[0], args[2]
    if a.shape[1] % MULTIPLE or b.shape[0] % MULTIPLE or a.numel() == 0:
        return f"takes sizes in multiples of {MULTIPLE}, not {tuple(a.shape)} x {tuple(b.shape)}"
    return lacks_fp8(a.device)


def scaled_mm(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Backend "cuda" of `fp8_product`.

    Sums are kept in fp32: without `use_fast_accum=False` Hopper's tensor cores keep 14 bits of them until the end
    (DeepSeek-AI, arXiv 2412.19437, section 3.3.2).
    """
    if a_scale.dim() == 1:
        a_scale, b_scale = a_scale[:, None], b_scale[None, :]
    # Only bf16 comes out of the kernels for row scales, and only then with a bias in all versions of torch.
    out_dtype = torch.bfloat16 if a_scale.dim() == 2 else dtype
    fused = bias if bias is not None and out_dtype == bias.dtype == torch.bfloat16 else None
    out = torch._scaled_mm(
        a, b.t(), scale_a=a_scale, scale_b=b_scale, bias=fused, out_dtype=out_dtype, use_fast_accum=False
    ).to(dtype)
    return out if bias is None or fused is not None else out + bias
