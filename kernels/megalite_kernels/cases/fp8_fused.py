"""Cases of the ops that write FP8 beside their output, which is compared; its FP8 has the bits of `fp8_quantize_rows`
of it, as tests say: rounded to 16 steps a binade it is no matter of accuracy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from megalite_kernels.cases.base import Case, Shape, Work
from megalite_kernels.cases.rowwise import ACTIVATIONS, NORMS
from megalite_kernels.ops.fp8_activation import fp8_activation
from megalite_kernels.ops.fp8_norm import fp8_layer_norm, fp8_rms_norm


def _rms_residual(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    y, total = fp8_rms_norm(x, weight, 1e-6, residual=residual)
    return y.value, total


def _layer_residual(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    y, total = fp8_layer_norm(x, weight, bias, 1e-5, residual=residual)
    return y.value, total


def _quantizing(case: Case, op: str, name: str, ours: Callable[..., Any], features: str) -> Case:
    """`case` of the plain op; one byte an element and four a row more are written."""

    def work(shape: Shape, itemsize: int) -> Work:
        plain = case.work(shape, itemsize)
        elements = shape["T"] * shape[features]
        return replace(
            plain,
            forward_bytes=plain.forward_bytes + elements + 4 * shape["T"],
            forward_flops=plain.forward_flops + 2 * elements,  # a maximum, a product
        )

    return replace(case, op=op, name=name, ours=ours, work=work)


_BY_NAME = {case.name: case for case in (*NORMS, *ACTIVATIONS)}

CASES = (
    _quantizing(_BY_NAME["rms_norm"], "fp8_rms_norm", "fp8_rms_norm", lambda x, w: fp8_rms_norm(x, w, 1e-6).value, "H"),
    _quantizing(_BY_NAME["rms_norm residual"], "fp8_rms_norm", "fp8_rms_norm residual", _rms_residual, "H"),
    _quantizing(
        _BY_NAME["layer_norm"], "fp8_layer_norm", "fp8_layer_norm", lambda x, w, b: fp8_layer_norm(x, w, b, 1e-5).value,
        "H",
    ),
    _quantizing(_BY_NAME["layer_norm residual"], "fp8_layer_norm", "fp8_layer_norm residual", _layer_residual, "H"),
    _quantizing(
        _BY_NAME["swiglu"], "fp8_activation", "fp8_activation swiglu", lambda x: fp8_activation(x, "swiglu").value, "F"
    ),
    _quantizing(
        _BY_NAME["geglu"], "fp8_activation", "fp8_activation geglu", lambda x: fp8_activation(x, "geglu").value, "F"
    ),
    _quantizing(
        _BY_NAME["gelu"], "fp8_activation", "fp8_activation gelu", lambda x: fp8_activation(x, "gelu").value, "F"
    ),
    _quantizing(
        _BY_NAME["relu_squared"], "fp8_activation", "fp8_activation relu_squared",
        lambda x: fp8_activation(x, "relu_squared").value, "F",
    ),
)  # fmt: skip
