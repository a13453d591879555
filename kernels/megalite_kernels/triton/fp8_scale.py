"""What every kernel that writes FP8 shares: magnitudes, and the scale of the largest.

Magnitudes are compared as the integers that their bits are: that is exact, puts NaN above infinity, and lets programs
meet in an atomic maximum whose result does not depend on their order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megalite_kernels.reference.fp8 import EXPONENT

E4M3_EXPONENT = tl.constexpr(EXPONENT[torch.float8_e4m3fn])


@triton.jit
def magnitude_bits(x):
    """Bits of |x| as an integer, fp32."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def power_of_two(bits, EXPONENT: tl.constexpr):
    """(scale, 1 / scale) for a largest magnitude given by its bits; `scale_of` of the reference."""
    exponent = tl.maximum(((bits + 0x1FFFFF) >> 23) - EXPONENT, 1)
    exponent = tl.where(bits == 0, 127, exponent)
    scale = (exponent << 23).to(tl.float32, bitcast=True)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    finite = bits < 0x7F800000
    return tl.where(finite, scale, float("nan")), tl.where(finite, inverse, float("nan"))
