"""Rotary embedding on the native library."""

from __future__ import annotations

import torch
from torch import Tensor

from megalite_kernels import _C
from megalite_kernels.native.common import DTYPES, address, threads


def forward(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    """Backend "cpu" of `rope_fwd`; q and k may be views into one projection."""
    cos, sin = (x.to(torch.float32).contiguous() for x in (cos, sin))
    return _rotate(q, cos, sin, interleaved, inverse), _rotate(k, cos, sin, interleaved, inverse)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    if not _is_strided_by_token(x):
        x = x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype)
    heads, dim = x.shape[-2:]
    if out.numel():
        _C.rope(
            DTYPES[x.dtype], address(x), x.stride(-3), x.stride(-2), address(cos), address(sin), address(out),
            out.numel() // (heads * dim), heads, dim, cos.shape[-1], cos.numel() // max(1, cos.shape[-1]),
            interleaved, inverse, threads(),
        )  # fmt: skip
    return out


def _is_strided_by_token(x: Tensor) -> bool:
    """Features side by side, and one stride that leads from each token to the next, across batch rows too."""
    if x.stride(-1) != 1:
        return False
    return x.dim() == 3 or x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1)
