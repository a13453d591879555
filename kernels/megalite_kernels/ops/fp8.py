"""FP8 quantisation and the product of quantised matrices: raw ops, scales in fp32 on the device, no synchronisation.

All operands of a product have the summed dim last ("K-major"), which is the layout FP8 tensor cores read: a product
that sums over rows needs its operands transposed, so quantising can transpose as well.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megalite_kernels._library import define
from megalite_kernels.backend import register, register_lazy
from megalite_kernels.ops.triton_support import TRITON, triton_fp8_supports
from megalite_kernels.reference import fp8 as reference
from megalite_kernels.scaled_mm import scaled_mm, scaled_mm_supports

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def _scale(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=torch.float32)


quantize_rows = define(
    "fp8_quantize_rows(Tensor x, ScalarType dtype) -> (Tensor, Tensor)",
    fake=lambda x, dtype: (x.new_empty(x.shape, dtype=dtype), _scale(x, x.shape[0])),
)
"""x [R, C] → (data [R, C], scale [R]): each row by its own largest magnitude."""
quantize_columns = define(
    "fp8_quantize_columns(Tensor x, ScalarType dtype) -> (Tensor, Tensor)",
    fake=lambda x, dtype: (x.new_empty(x.shape[::-1], dtype=dtype), _scale(x, x.shape[1])),
)
"""x [R, C] → (data [C, R], scale [C]): each column by its own, transposed."""
tensor_scale = define(
    "fp8_tensor_scale(Tensor x, ScalarType dtype) -> Tensor", fake=lambda x, dtype: _scale(x)
)
"""x [R, C] → scale [] of the whole tensor."""
cast = define(
    "fp8_cast(Tensor x, Tensor scale, ScalarType dtype) -> Tensor",
    fake=lambda x, scale, dtype: x.new_empty(x.shape, dtype=dtype),
)
"""x [R, C], scale [] → data [R, C]."""
cast_transposed = define(
    "fp8_cast_transposed(Tensor x, Tensor scale, ScalarType dtype) -> Tensor",
    fake=lambda x, scale, dtype: x.new_empty(x.shape[::-1], dtype=dtype),
)
"""x [R, C], scale [] → data [C, R]."""
product = define(
    "fp8_product(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, Tensor? bias, ScalarType dtype) -> Tensor",
    fake=lambda a, a_scale, b, b_scale, bias, dtype: a.new_empty((a.shape[0], b.shape[0]), dtype=dtype),
)
"""a [M, K], b [N, K], scales [] both or [M] and [N] → (a * a_scale) @ (b * b_scale).T + bias [M, N] of `dtype`."""

for _name in ("quantize_rows", "quantize_columns", "tensor_scale", "cast", "cast_transposed"):
    register(f"fp8_{_name}", "reference", getattr(reference, _name))
    register_lazy(
        f"fp8_{_name}",
        "triton",
        f"megalite_kernels.triton.fp8:{_name}",
        requires=TRITON,
        supports=triton_fp8_supports,
    )
register("fp8_product", "reference", reference.product)
register("fp8_product", "cuda", scaled_mm, supports=scaled_mm_supports)
