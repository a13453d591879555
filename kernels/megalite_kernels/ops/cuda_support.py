"""What the CUDA kernels take, asked before an op is given to them."""

from __future__ import annotations

import functools
import os
from typing import Any

import torch

from megalite_kernels.native.cuda import binaries
from megalite_kernels.native.cuda.kernels.rope import MAX_DIM
from megalite_kernels.native.cuda.runtime import EMULATE

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_HALF_DTYPES = (torch.bfloat16, torch.float16)
_FARTHEST = 1 << 28
"""Positions of attention are sums of a few such numbers in 32 bits."""


def cuda_supports(*args: Any) -> str | None:
    """None if every tensor is on an NVIDIA GPU (or emulated) and of at most 32 bits, else the reason."""
    return _reason(args, _DTYPES)


def cuda_half_supports(*args: Any) -> str | None:
    """As `cuda_supports`, for kernels of the tensor cores: the first tensor is bfloat16 or float16."""
    first = args[0]
    if first.is_floating_point() and first.dtype not in _HALF_DTYPES:
        return f"takes bfloat16 and float16, not {first.dtype}"
    return _reason(args, _DTYPES)


def cuda_attention_supports(q: Any, k: Any, v: Any, *rest: Any) -> str | None:
    """As `cuda_half_supports`, for `attention_fwd`; also of the head's dim and of how far positions go."""
    return _attention_reason(q, k, rest, widest=256) or cuda_half_supports(q, k, v, *rest)


def cuda_attention_backward_supports(dout: Any, dlse: Any, q: Any, k: Any, v: Any, *rest: Any) -> str | None:
    """As `cuda_attention_supports`, for `attention_bwd`: gradients of wider heads don't fit a thread's registers."""
    return _attention_reason(q, k, rest, widest=128) or cuda_half_supports(q, dout, dlse, k, v, *rest)


def _attention_reason(q: Any, k: Any, rest: tuple[Any, ...], *, widest: int) -> str | None:
    dim, tokens, offset = q.shape[-1], max(q.shape[-3], k.shape[-3]), rest[-4]
    if dim > widest or dim % 8 or dim == 0:
        return f"takes head dims that are multiples of 8 up to {widest}, not {dim}"
    if max(tokens, abs(offset)) >= _FARTHEST:
        return f"takes up to {_FARTHEST} tokens and offsets, not {tokens} and {offset}"
    return None


def cuda_rope_supports(q: Any, *rest: Any) -> str | None:
    """As `cuda_supports`, for the rotary kernels: a head is held by one warp or less."""
    if q.shape[-1] > MAX_DIM:
        return f"takes heads up to {MAX_DIM} features, not {q.shape[-1]}"
    return _reason((q, *rest), _DTYPES)


def _reason(args: tuple[Any, ...], dtypes: tuple[torch.dtype, ...]) -> str | None:
    for value in args:
        for tensor in value if isinstance(value, (list, tuple)) else (value,):
            if not isinstance(tensor, torch.Tensor):
                continue
            if tensor.device.type != "cuda" and (tensor.device.type != "cpu" or not os.environ.get(EMULATE)):
                return f"runs on GPUs, a tensor is on {tensor.device} ({EMULATE}=80 emulates them there)"
            if tensor.is_floating_point() and tensor.dtype not in dtypes:
                return f"takes bfloat16, float16 and float32, not {tensor.dtype}"
            if tensor.device.type == "cuda" and (reason := missing(tensor.device.index)) is not None:
                return reason
    return None


@functools.cache
def missing(index: int) -> str | None:
    """Why CUDA kernels can't run on a GPU of torch's: a vendor, its age, or nothing to compile them with; or None."""
    if torch.version.cuda is None:
        return "needs an NVIDIA GPU"
    return binaries.missing(torch.cuda.get_device_capability(index), int(torch.version.cuda.split(".")[0]))
