"""What the native CPU library takes, asked before an op is given to it."""

from __future__ import annotations

from typing import Any

import torch

NATIVE = "megalite_kernels._C"
"""Module that must import for the "cpu" backend."""


def native_supports(*args: Any) -> str | None:
    """None if every floating-point tensor is bfloat16, float16 or float32 on the CPU, else the reason."""
    for value in args:
        if not isinstance(value, torch.Tensor):
            continue
        if value.device.type != "cpu":
            return f"runs on the CPU, a tensor is on {value.device}"
        if value.is_floating_point() and value.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            return f"takes bfloat16, float16 and float32, not {value.dtype}"
    return None


def native_accumulator_supports(*args: Any) -> str | None:
    """As `native_supports`; the last tensor is an accumulator, contiguous float32."""
    main_grad = [value for value in args if isinstance(value, torch.Tensor)][-1]
    if main_grad.dtype != torch.float32 or not main_grad.is_contiguous():
        return f"adds into contiguous float32, not {main_grad.dtype} of stride {main_grad.stride()}"
    return native_supports(*args)


def native_attention_supports(q: Any, k: Any, v: Any, *rest: Any) -> str | None:
    """As `native_supports`, for `attention_fwd`; bounds and sinks are converted."""
    return native_supports(q, k, v)


def native_attention_backward_supports(
    dout: Any, dlse: Any, q: Any, k: Any, v: Any, *rest: Any
) -> str | None:
    """As `native_attention_supports`, for `attention_bwd`."""
    return native_attention_supports(q, k, v)
