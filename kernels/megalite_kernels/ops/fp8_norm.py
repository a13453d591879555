"""RMSNorm and LayerNorm whose output is quantised, row by row, before it leaves the kernel that makes it.

Quantising it afterwards reads it once more: 2 of 7 bytes an element (of 11 with a residual) of what both kernels move
in 16 bits, and a launch. With one scale for the whole tensor that can't be done: a row would be written before the
largest element of the others is known. (Its maximum could be a by-product: one of three reads fewer, 2 of 13 bytes.)
The output itself is written too: the weight gradient reads it in 16 bits.
"""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor

from megalite_kernels._library import define
from megalite_kernels.backend import register, register_lazy
from megalite_kernels.ops import checks
from megalite_kernels.ops.fp8 import E4M3
from megalite_kernels.ops.layer_norm import _backward as _layer_norm_backward
from megalite_kernels.ops.layer_norm import _contiguous
from megalite_kernels.ops.native_support import NATIVE, native_supports
from megalite_kernels.ops.quantized import QuantizedTensor
from megalite_kernels.ops.rms_norm import _backward as _rms_norm_backward
from megalite_kernels.ops.rms_norm import row_statistic
from megalite_kernels.ops.triton_support import TRITON, triton_fp8_supports
from megalite_kernels.reference import fp8_fused as reference


@overload
def fp8_rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-6, *, residual: None = None, zero_centered: bool = False
) -> QuantizedTensor: ...
@overload
def fp8_rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-6, *, residual: Tensor, zero_centered: bool = False
) -> tuple[QuantizedTensor, Tensor]: ...
def fp8_rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-6,
    *,
    residual: Tensor | None = None,
    zero_centered: bool = False,
) -> QuantizedTensor | tuple[QuantizedTensor, Tensor]:
    """`rms_norm` for an `fp8_linear` with rowwise scaling: its output and, from the same kernel, that in FP8.

    Args:
        x, weight, eps, residual, zero_centered: as in `rms_norm`.

    Returns:
        What `rms_norm` gives, its rows quantised as by `fp8_linear`; with a residual also x + residual.

    Raises:
        ValueError: as `rms_norm`.

    Saved: as `rms_norm`; the FP8 copy is not kept.
    """
    _check(x, weight, eps, residual)
    if residual is None:
        return QuantizedTensor(*_RMSNorm.apply(x, weight, eps, zero_centered))
    y, data, scale, total = _ResidualRMSNorm.apply(x, residual, weight, eps, zero_centered)
    return QuantizedTensor(y, data, scale), total


@overload
def fp8_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5, *, residual: None = None
) -> QuantizedTensor: ...
@overload
def fp8_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5, *, residual: Tensor
) -> tuple[QuantizedTensor, Tensor]: ...
def fp8_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
) -> QuantizedTensor | tuple[QuantizedTensor, Tensor]:
    """`layer_norm` for an `fp8_linear` with rowwise scaling: its output and, from the same kernel, that in FP8.

    Args:
        x, weight, bias, eps, residual: as in `layer_norm`.

    Returns:
        What `layer_norm` gives, its rows quantised as by `fp8_linear`; with a residual also x + residual.

    Raises:
        ValueError: as `layer_norm`.

    Saved: as `layer_norm`; the FP8 copy is not kept.
    """
    _check(x, weight, eps, residual)
    if bias is not None:
        checks.require_like(bias, weight, "bias", "weight")
    if residual is None:
        return QuantizedTensor(*_LayerNorm.apply(x, weight, bias, eps))
    y, data, scale, total = _ResidualLayerNorm.apply(x, residual, weight, bias, eps)
    return QuantizedTensor(y, data, scale), total


def _check(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> None:
    checks.require_float(x=x, weight=weight)
    checks.require_shape(weight, (x.shape[-1],), "weight", f"x with {x.shape[-1]} features")
    checks.require_same_device(weight, x, "weight", "x")
    checks.require_range(eps, "eps")
    if residual is not None:
        checks.require_like(residual, x, "residual", "x")


def fake_quantized(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y, and data and scale without values; for fakes."""
    rows = y.shape[:-1].numel()
    return y, y.new_empty((rows, y.shape[-1]), dtype=E4M3), y.new_empty((rows,), dtype=torch.float32)


def _fake(x: Tensor, residual: bool, statistics: int) -> tuple[Tensor, ...]:
    total = (x.new_empty(x.shape),) if residual else ()
    return *fake_quantized(x.new_empty(x.shape)), *total, *(row_statistic(x) for _ in range(statistics))


_rms_norm = define(
    "fp8_rms_norm_fwd(Tensor x, Tensor weight, float eps, bool zero_centered)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    fake=lambda x, weight, eps, zero_centered: _fake(x, False, 1),
)
"""(y, data, scale, rstd)."""
_rms_norm_residual = define(
    "fp8_rms_norm_residual_fwd(Tensor x, Tensor residual, Tensor weight, float eps, bool zero_centered)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=lambda x, residual, weight, eps, zero_centered: _fake(x, True, 1),
)
"""(y, data, scale, x + residual, rstd)."""
_layer_norm = define(
    "fp8_layer_norm_fwd(Tensor x, Tensor weight, Tensor? bias, float eps)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=lambda x, weight, bias, eps: _fake(x, False, 2),
)
"""(y, data, scale, mean, rstd)."""
_layer_norm_residual = define(
    "fp8_layer_norm_residual_fwd(Tensor x, Tensor residual, Tensor weight, Tensor? bias, float eps)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=lambda x, residual, weight, bias, eps: _fake(x, True, 2),
)
"""(y, data, scale, x + residual, mean, rstd)."""
for _name in ("rms_norm", "rms_norm_residual", "layer_norm", "layer_norm_residual"):
    _op = f"fp8_{_name}_fwd"
    register(_op, "reference", getattr(reference, _name))
    register_lazy(
        _op, "cpu", f"megalite_kernels.native.fp8_fused:{_name}", requires=NATIVE, supports=native_supports
    )
    register_lazy(
        _op,
        "triton",
        f"megalite_kernels.triton.fp8_norm:{_name}",
        requires=TRITON,
        supports=triton_fp8_supports,
    )


def _side_outputs(ctx: Any, data: Tensor, scale: Tensor) -> None:
    """Nothing flows back through these, and no zeros are made for them."""
    ctx.mark_non_differentiable(data, scale)
    ctx.set_materialize_grads(False)


def _filled(dy: Tensor | None, x: Tensor) -> Tensor:
    return torch.zeros_like(x) if dy is None else dy.contiguous()


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, zero_centered: bool) -> tuple[Tensor, ...]:
        x, weight = x.contiguous(), weight.contiguous()
        y, data, scale, rstd = _rms_norm(x, weight, eps, zero_centered)
        ctx.save_for_backward(x, weight, rstd)
        ctx.zero_centered = zero_centered
        _side_outputs(ctx, data, scale)
        return y, data, scale

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, ddata: None, dscale: None) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        dx, dweight = _rms_norm_backward(_filled(dy, x), None, x, weight, rstd, ctx.zero_centered)
        return dx, dweight, None, None


class _ResidualRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float, zero_centered: bool
    ) -> tuple[Tensor, ...]:
        x, residual, weight = x.contiguous(), residual.contiguous(), weight.contiguous()
        y, data, scale, total, rstd = _rms_norm_residual(x, residual, weight, eps, zero_centered)
        ctx.save_for_backward(total, weight, rstd)
        ctx.zero_centered = zero_centered
        _side_outputs(ctx, data, scale)
        return y, data, scale, total

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor | None, ddata: None, dscale: None, dtotal: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        total, weight, rstd = ctx.saved_tensors
        dx, dweight = _rms_norm_backward(
            _filled(dy, total), _contiguous(dtotal), total, weight, rstd, ctx.zero_centered
        )
        return dx, dx, dweight, None, None


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, ...]:
        x, weight = x.contiguous(), weight.contiguous()
        y, data, scale, mean, rstd = _layer_norm(x, weight, _contiguous(bias), eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.has_bias = bias is not None
        _side_outputs(ctx, data, scale)
        return y, data, scale

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, ddata: None, dscale: None) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        dx, dweight, dbias = _layer_norm_backward(_filled(dy, x), None, x, weight, mean, rstd)
        return dx, dweight, dbias if ctx.has_bias else None, None


class _ResidualLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, ...]:
        x, residual, weight = x.contiguous(), residual.contiguous(), weight.contiguous()
        y, data, scale, total, mean, rstd = _layer_norm_residual(x, residual, weight, _contiguous(bias), eps)
        ctx.save_for_backward(total, weight, mean, rstd)
        ctx.has_bias = bias is not None
        _side_outputs(ctx, data, scale)
        return y, data, scale, total

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor | None, ddata: None, dscale: None, dtotal: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        total, weight, mean, rstd = ctx.saved_tensors
        dx, dweight, dbias = _layer_norm_backward(
            _filled(dy, total), _contiguous(dtotal), total, weight, mean, rstd
        )
        return dx, dx, dweight, dbias if ctx.has_bias else None, None
