"""Norms and activations with their output in FP8 beside it, in plain torch: their definition is one after the other."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from megalite_kernels.reference import activation
from megalite_kernels.reference import layer_norm as layer
from megalite_kernels.reference import rms_norm as rms
from megalite_kernels.reference.fp8 import quantize_rows


def rows_of(y: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 [rows, C] and scale [rows] of y [..., C]."""
    return quantize_rows(y.reshape(y.shape[:-1].numel(), y.shape[-1]), torch.float8_e4m3fn)


class OneAfterTheOther:
    """A back-end's own norms and activations, then `rows_of` what they give.

    Args:
        rms, layer: modules with `forward` and `residual_forward`.
        activate, activate_packed: activation of (x, kind), and of (gate and up in one tensor, kind).
    """

    def __init__(
        self,
        rms: ModuleType,
        layer: ModuleType,
        activate: Callable[[Tensor, str], Tensor],
        activate_packed: Callable[[Tensor, str], Tensor],
    ) -> None:
        self._rms, self._layer = rms, layer
        self._activate, self._activate_packed = activate, activate_packed

    def rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, zero_centered: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(y, data, scale, rstd)."""
        y, rstd = self._rms.forward(x, weight, eps, zero_centered)
        return y, *rows_of(y), rstd

    def rms_norm_residual(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, zero_centered: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(y, data, scale, x + residual, rstd)."""
        y, total, rstd = self._rms.residual_forward(x, residual, weight, eps, zero_centered)
        return y, *rows_of(y), total, rstd

    def layer_norm(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(y, data, scale, mean, rstd)."""
        y, mean, rstd = self._layer.forward(x, weight, bias, eps)
        return y, *rows_of(y), mean, rstd

    def layer_norm_residual(
        self, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(y, data, scale, x + residual, mean, rstd)."""
        y, total, mean, rstd = self._layer.residual_forward(x, residual, weight, bias, eps)
        return y, *rows_of(y), total, mean, rstd

    def forward(self, x: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor]:
        """(y, data, scale)."""
        y = self._activate(x, kind)
        return y, *rows_of(y)

    def packed_forward(self, packed: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor]:
        """(y, data, scale)."""
        y = self._activate_packed(packed, kind)
        return y, *rows_of(y)


def _activate_packed(packed: Tensor, kind: str) -> Tensor:
    gate, up = packed.chunk(2, dim=-1)
    return activation.gated_forward(gate, up, kind).contiguous()


_OPS = OneAfterTheOther(rms, layer, activation.forward, _activate_packed)
rms_norm, rms_norm_residual = _OPS.rms_norm, _OPS.rms_norm_residual
layer_norm, layer_norm_residual = _OPS.layer_norm, _OPS.layer_norm_residual
forward, packed_forward = _OPS.forward, _OPS.packed_forward
