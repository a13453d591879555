"""Rotary embedding on the native library."""

from __future__ import annotations

import torch
from torch import Tensor

from megalite_kernels import _C
from megalite_kernels.native.common import DTYPES, address, by_token, threads


def forward(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    """Backend "cpu" of `rope_fwd`; q and k may be views into one projection."""
    cos, sin = (x.to(torch.float32).contiguous() for x in (cos, sin))
    return _rotate(q, cos, sin, interleaved, inverse), _rotate(k, cos, sin, interleaved, inverse)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    x = by_token(x)
    out = torch.empty(x.shape, dtype=x.dtype)
    heads, dim = x.shape[-2:]
    if out.numel():
        _C.rope(
            DTYPES[x.dtype], address(x), x.stride(-3), x.stride(-2), address(cos), address(sin), address(out),
            out.numel() // (heads * dim), heads, dim, cos.shape[-1], cos.numel() // max(1, cos.shape[-1]),
            interleaved, inverse, threads(),
        )  # fmt: skip
    return out
