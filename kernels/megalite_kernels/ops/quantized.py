"""What a fused norm or activation hands to an FP8 product."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class QuantizedTensor(NamedTuple):
    """A tensor and its rows in FP8 (e4m3), each by its own largest magnitude."""

    value: Tensor
    """[..., C]: gradients flow through it, and the weight's gradient is a product with it."""
    data: Tensor
    """[rows, C]."""
    scale: Tensor
    """[rows] fp32."""


Operand = Tensor | QuantizedTensor


def tensors_of(x: Operand) -> tuple[Tensor, ...]:
    """All that x is made of; `from_tensors` puts it together again."""
    return tuple(x) if isinstance(x, QuantizedTensor) else (x,)


def from_tensors(*parts: Tensor) -> Operand:
    """What `tensors_of` took apart."""
    return QuantizedTensor(*parts) if len(parts) == 3 else parts[0]


def value_of(x: Operand) -> Tensor:
    """The tensor itself, quantised or not."""
    return x.value if isinstance(x, QuantizedTensor) else x
