"""Cases of the linear layer in FP8, held to its definition: quantised operands, widened, in plain products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megalite_kernels.cases.base import Case, Inputs, Shape, Work, normal
from megalite_kernels.ops.fp8_linear import Scaling, fp8_linear
from megalite_kernels.reference import fp8 as reference

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def rounded(x: Tensor, scaling: Scaling, dtype: torch.dtype = E4M3, dim: int = 1) -> Tensor:
    """x [R, C] as its quantised values, in its own dtype (which holds them exactly), scaled along `dim`."""
    rows = x if dim == 1 else x.t()
    if scaling == "rowwise":
        data, scale = reference.quantize_rows(rows, dtype)
    else:
        scale = reference.tensor_scale(rows, dtype)
        data = reference.cast(rows, scale, dtype)
    values = reference.dequantize(data, scale, x.dtype)
    return values if dim == 1 else values.t()


class _Plain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, main_grad: Tensor, scaling: Scaling) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.main_grad, ctx.scaling = main_grad, scaling
        return rounded(x, scaling) @ rounded(weight, scaling).t()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        gradient = E4M3 if ctx.scaling == "rowwise" else E5M2
        rounded_dy = rounded(dy, ctx.scaling, gradient)
        if ctx.scaling == "tensorwise":
            ctx.main_grad.add_(rounded_dy.t() @ rounded(x, ctx.scaling))
        else:
            ctx.main_grad.add_(dy.t() @ x)
        return rounded_dy @ rounded(weight, ctx.scaling, dim=0), None, None, None


def _inputs(shape: Shape, generator: torch.Generator) -> Inputs:
    x, weight = normal(generator, shape["T"], shape["I"]), normal(generator, shape["O"], shape["I"])
    return Inputs([x, weight], [normal(generator, shape["O"], shape["I"])])


def _work(shape: Shape, itemsize: int) -> Work:
    """x, weight in, y out; dy, x, weight in, dx out and fp32 main_grad in and out: all of it in the outer dtype."""
    x, weight, y = (shape[a] * shape[b] for a, b in ("TI", "OI", "TO"))
    forward = (x + weight + y) * itemsize
    return Work(
        forward,
        (y + 2 * x + weight) * itemsize + 8 * weight,
        2 * weight * shape["T"],
        4 * weight * shape["T"],
    )


def _case(scaling: Scaling) -> Case:
    ours: Callable[..., Any] = lambda x, weight, main_grad: fp8_linear(  # noqa: E731
        x, weight, main_grad=main_grad, scaling=scaling
    )
    return Case(
        "fp8_linear",
        "fp8_linear" if scaling == "rowwise" else f"fp8_linear {scaling}",
        ours,
        lambda x, weight, main_grad: _Plain.apply(x, weight, main_grad, scaling),
        _inputs,
        _work,
        check={"T": 48, "I": 64, "O": 32},
        doctor={"T": 512, "I": 512, "O": 512},
        cpu=({"T": 1024, "I": 512, "O": 1408},),
        cuda=({"T": 8192, "I": 4096, "O": 14336},),
        bound="compute",
        written=(2,),
    )


CASES = (_case("rowwise"), _case("tensorwise"))
