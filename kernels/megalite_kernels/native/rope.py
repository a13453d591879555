"""Rotary embedding on the native library; q and k may be views into one projection."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megalite_kernels import _C
from megalite_kernels.native.common import DTYPES, address, by_token, float_weights, threads


def forward(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    """Backend "cpu" of `rope_fwd`."""
    cos, sin = float_weights(cos), float_weights(sin)
    return _rotated(q, cos, sin, interleaved, inverse), _rotated(k, cos, sin, interleaved, inverse)


def forward_(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> None:
    """Backend "cpu" of `rope_`."""
    cos, sin = float_weights(cos), float_weights(sin)
    for x in (q, k):
        if by_token(x) is x:
            _rotate(x, x, cos, sin, interleaved, inverse)
        else:
            x.copy_(_rotated(x, cos, sin, interleaved, inverse))


def norm_forward(
    q: Tensor,
    k: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Backend "cpu" of `rope_norm_fwd`."""
    cos, sin = float_weights(cos), float_weights(sin)
    found = []
    for x, weight in ((by_token(q), float_weights(q_norm)), (by_token(k), float_weights(k_norm))):
        y, rstd = torch.empty(x.shape, dtype=x.dtype), torch.empty(x.shape[:-1].numel(), dtype=torch.float32)
        if y.numel():
            shape = _shape(x, cos, sin, interleaved)
            _C.rope_norm_forward(
                DTYPES[x.dtype],
                _strided(x),
                address(weight),
                address(y),
                address(rstd),
                shape,
                eps,
                threads(),
            )
        found.append((y, rstd))
    (q_out, q_rstd), (k_out, k_rstd) = found
    return q_out, k_out, q_rstd, k_rstd


def norm_backward(
    dq_out: Tensor,
    dk_out: Tensor,
    q: Tensor,
    k: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    q_rstd: Tensor,
    k_rstd: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Backend "cpu" of `rope_norm_bwd`."""
    cos, sin = float_weights(cos), float_weights(sin)
    dq, dq_norm = _norm_backward(dq_out, q, q_norm, q_rstd, cos, sin, interleaved)
    dk, dk_norm = _norm_backward(dk_out, k, k_norm, k_rstd, cos, sin, interleaved)
    return dq, dk, dq_norm, dk_norm


def _norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    dy, x, gain = by_token(dy), by_token(x), float_weights(weight)
    dx, dweight = torch.empty(x.shape, dtype=x.dtype), torch.zeros_like(gain)
    if dx.numel():
        _C.rope_norm_backward(
            DTYPES[x.dtype], _strided(dy), _strided(x), address(gain), address(rstd), address(dx), address(dweight),
            _shape(x, cos, sin, interleaved), threads(),
        )  # fmt: skip
    return dx, dweight.to(weight.dtype)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    x = by_token(x)
    out = torch.empty(x.shape, dtype=x.dtype)
    _rotate(x, out, cos, sin, interleaved, inverse)
    return out


def _rotate(x: Tensor, out: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> None:
    if x.numel():
        shape = _shape(x, cos, sin, interleaved)
        _C.rope(DTYPES[x.dtype], _strided(x), _strided(out), shape, inverse, threads())


def _strided(x: Tensor) -> tuple[int, int, int]:
    return address(x), x.stride(-3), x.stride(-2)


def _shape(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Any, ...]:
    heads, dim = x.shape[-2:]
    half = cos.shape[-1]
    return (
        address(cos),
        address(sin),
        x.numel() // (heads * dim),
        heads,
        dim,
        half,
        cos.numel() // max(1, half),
        interleaved,
    )
