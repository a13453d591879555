"""FP8 in plain torch: what the scales are, how numbers are rounded, and what a product of them is.

A scale is a power of two: the smallest with `amax / scale <= LARGEST`. Dividing by it is exact, so the only error is
the rounding to 4 (e4m3) or 3 (e5m2) significant bits, `|x - data * scale| <= RELATIVE * |x| + ABSOLUTE * scale`, and it
depends on the scale for the smallest elements only, those below 2^-6 (2^-14) times the scale. A row that is quantised
in parts (tensor parallelism) or whole (one process) therefore has the same values but for those.

Source: Micikevicius et al., "FP8 Formats for Deep Learning", arXiv 2209.05433 (formats, e5m2 for gradients);
DeepSeek-AI, arXiv 2412.19437 section 3.3 (e4m3 for all tensors with fine scales, powers of two for some of them).
"""

from __future__ import annotations

import torch
from torch import Tensor

from megalite_kernels.reference.common import wide_dtype, widen

LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
"""1.75 * 2^8 and 1.75 * 2^15."""
EXPONENT = {torch.float8_e4m3fn: 8, torch.float8_e5m2: 15}
"""Exponent of LARGEST."""
RELATIVE = {torch.float8_e4m3fn: 2.0**-4, torch.float8_e5m2: 2.0**-3}
"""Half a unit in the last place, of the smallest significand."""
ABSOLUTE = {torch.float8_e4m3fn: 2.0**-10, torch.float8_e5m2: 2.0**-17}
"""Half the smallest subnormal."""


def scale_of(amax: Tensor, dtype: torch.dtype) -> Tensor:
    """The fp32 power of two for tensors or rows whose largest magnitude is `amax`.

    1 for an amax of 0; NaN for one that is not finite, so that all of its data become NaN; at least 2^-126.
    """
    bits = amax.float().view(torch.int32)
    # Adding a quarter of the significand carries into the exponent where it is over 1.75.
    exponent = ((bits + 0x1FFFFF) >> 23) - EXPONENT[dtype]
    scale = (exponent.clamp(min=1) << 23).view(torch.float32)
    scale = torch.where(amax == 0, 1.0, scale)
    return torch.where(torch.isfinite(amax), scale, torch.nan)


def quantize_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(data [R, C], scale [R]) of x [R, C], each row by its own amax."""
    scale = scale_of(widen(x).abs().amax(1), dtype) if x.shape[1] else _ones(x, x.shape[0])
    return _divided(x, scale[:, None], dtype), scale


def quantize_columns(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(data [C, R], scale [C]) of x [R, C], each column by its own amax, transposed."""
    return quantize_rows(x.t().contiguous(), dtype)


def tensor_scale(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale [] of x as a whole."""
    return scale_of(widen(x).abs().amax(), dtype) if x.numel() else _ones(x)


def cast(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x / scale [R, C] for x [R, C] and a scale [] of the whole tensor."""
    return _divided(x, scale, dtype)


def cast_transposed(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """As `cast`, transposed: [C, R]."""
    return _divided(x.t(), scale, dtype)


def product(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """(a * a_scale) @ (b * b_scale).T + bias for a [M, K], b [N, K]: fp32 sums, rounded once to `dtype`."""
    wide = torch.promote_types(dtype, torch.float32)
    out = dequantize(a, a_scale, wide) @ dequantize(b, b_scale, wide).t()
    return (out if bias is None else out + bias.to(wide)).to(dtype)


def dequantize(data: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """data * scale, for a scale [] or one for each row."""
    scale = scale.to(dtype)
    return data.to(dtype) * (scale if scale.dim() == 0 else scale[:, None])


def _divided(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return (widen(x) * (1.0 / scale).to(wide_dtype(x))).to(dtype).contiguous()


def _ones(x: Tensor, *shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.float32, device=x.device)
