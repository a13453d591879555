"""Activations whose output is quantised, row by row, before it leaves the kernel that makes it.

Quantising it afterwards reads it once more: 2 of 9 bytes an element (gated; 7 without a gate) of what both kernels
move in 16 bits, and a launch.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from megalite_kernels._library import define
from megalite_kernels.backend import register, register_lazy
from megalite_kernels.ops import checks
from megalite_kernels.ops.activation import _activation_backward, _packed_backward
from megalite_kernels.ops.fp8_norm import fake_quantized
from megalite_kernels.ops.native_support import NATIVE, native_supports
from megalite_kernels.ops.quantized import QuantizedTensor
from megalite_kernels.ops.triton_support import TRITON, triton_fp8_supports
from megalite_kernels.reference import fp8_fused as reference

Activation = Literal["swiglu", "geglu", "gelu", "relu_squared"]
_GATED = {"swiglu": "silu", "geglu": "gelu_tanh"}
_PLAIN = {"gelu": "gelu_tanh", "relu_squared": "relu2"}


def fp8_activation(x: Tensor, activation: Activation) -> QuantizedTensor:
    """An activation for an `fp8_linear` with rowwise scaling: its output and, from the same kernel, that in FP8.

    Args:
        x: [..., F], bf16, fp16 or fp32; for swiglu and geglu [..., 2F], gate first.
        activation: "swiglu", "geglu", "gelu" (both of them in the tanh form) or "relu_squared".

    Returns:
        [..., F], what the function of that name gives, its rows quantised as by `fp8_linear`.

    Raises:
        ValueError: the activation is not known, or a packed x has an odd number of features.

    Saved: x; the FP8 copy is not kept.
    """
    checks.require_float(x=x)
    checks.require_option(activation, (*_GATED, *_PLAIN), "activation")
    if activation in _PLAIN:
        return QuantizedTensor(*_Activation.apply(x, _PLAIN[activation], False))
    if x.shape[-1] % 2:
        raise ValueError(f"x has {x.shape[-1]} features: a packed [gate, up] tensor needs an even number")
    return QuantizedTensor(*_Activation.apply(x, _GATED[activation], True))


_plain_forward = define(
    "fp8_activation_fwd(Tensor x, str kind) -> (Tensor, Tensor, Tensor)",
    fake=lambda x, kind: fake_quantized(x.new_empty(x.shape)),
)
"""(y, data, scale)."""
_gated_forward = define(
    "fp8_glu_fwd(Tensor packed, str kind) -> (Tensor, Tensor, Tensor)",
    fake=lambda packed, kind: fake_quantized(packed.new_empty((*packed.shape[:-1], packed.shape[-1] // 2))),
)
"""(y, data, scale)."""
for _op, _name in (("fp8_activation_fwd", "forward"), ("fp8_glu_fwd", "packed_forward")):
    register(_op, "reference", getattr(reference, _name))
    register_lazy(
        _op, "cpu", f"megalite_kernels.native.fp8_fused:{_name}", requires=NATIVE, supports=native_supports
    )
    _target = f"megalite_kernels.triton.fp8_activation:{_name}"
    register_lazy(_op, "triton", _target, requires=TRITON, supports=triton_fp8_supports)


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: str, gated: bool) -> tuple[Tensor, ...]:
        x = x.contiguous()
        y, data, scale = (_gated_forward if gated else _plain_forward)(x, kind)
        ctx.save_for_backward(x)
        ctx.kind, ctx.gated = kind, gated
        ctx.mark_non_differentiable(data, scale)
        ctx.set_materialize_grads(False)
        return y, data, scale

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, ddata: None, dscale: None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return None, None, None
        (x,) = ctx.saved_tensors
        backward = _packed_backward if ctx.gated else _activation_backward
        return backward(dy.contiguous(), x, ctx.kind), None, None
