"""Products of a linear layer on the native library, and on torch where that is faster."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from megalite_kernels import _C
from megalite_kernels.native.common import DTYPES, address, threads
from megalite_kernels.reference import linear_cross_entropy as plan

LEAST_ROWS = 256
"""Below, packing the weight costs more than faster tiles save: with 128 rows ours has 0.90-1.06 of oneDNN's rate."""

LEAST_PRODUCT = 1 << 25
"""M N K below which calling us costs as much as it saves (256 x 256 x 512; measured on Zen 4)."""

LEAST_ROWS_WIDENED = 4
"""The same for bf16 with AVX2 alone: with one row forward has half of torch's rate, with four 1.4-2.2 times."""


def wins(dtype: torch.dtype, rows: int, cols: int, inner: int) -> bool:
    """Whether our product of [rows, inner] and [inner, cols] is faster than torch's, as measured.

    That is so on a CPU that multiplies pairs of bf16 without having a matrix unit: on one Zen 4 core, over the
    products of llama-60m and gpt2-124m, 1.05 (forward) and 1.08 (dgrad) times oneDNN in bf16, 1.05-1.2 times torch
    in fp32. With AMX in fp32, which our product takes apart into bf16 without losing a bit: two cores have 1.07-1.54
    times torch's rate over the products of llama-60m, at 0.3-0.7 times its error. In bf16 with AMX only where the
    result is as wide as its left factor: there ours does not read the many lines that it overwrites, elsewhere it has
    0.7-1.05 of oneDNN's rate. In one run steps of llama-60m took 561 ms with this rule, 583 with ours everywhere, 571
    with ours for results four times as wide only; other runs order the last two the other way.

    With AVX2 alone torch has no fast product of bf16: one Zen 3 core ran ours, which widens the numbers while it packs
    them, at 1.1-10 times its rate with 4 rows, 2.9-62 times with 512 (the least for weight gradients, the most for
    dgrad, whose right factor torch reads across its rows). In fp32 ours there has 1.02-1.4
    times torch's rate over the products of both models.
    """
    isa = _C.isa_name()
    if isa == "avx2" and dtype == torch.bfloat16:
        return rows >= LEAST_ROWS_WIDENED and cols * inner > 0
    if dtype == torch.float16 or rows < LEAST_ROWS or rows * cols * inner < LEAST_PRODUCT:
        return False
    if isa == "amx":
        return dtype == torch.float32 or cols >= inner
    return isa in ("avx2", "avx512_bf16")


def wins_weight_gradient(dtype: torch.dtype, rows: int, cols: int, inner: int) -> bool:
    """The same for a product of [rows, inner] and [inner, cols] whose left factor lies with its rows side by side.

    In bf16 with AMX for every shape: ours has 1.3-1.7 times oneDNN's rate, which packs that factor slowly.
    """
    if dtype == torch.bfloat16 and _C.isa_name() == "amx":
        return rows * cols * inner >= LEAST_PRODUCT
    return inner >= LEAST_ROWS_WIDENED and wins(dtype, rows, cols, inner)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Backend "cpu" of `linear_fwd`."""
    (out_features, features), rows = weight.shape, math.prod(x.shape[:-1])
    if not wins(x.dtype, rows, out_features, features):
        return F.linear(x, weight, bias)
    return _project(x, weight, 1, bias, (rows, out_features, features))


def dgrad(dy: Tensor, weight: Tensor) -> Tensor:
    """Backend "cpu" of `linear_dgrad`."""
    (out_features, features), rows = weight.shape, math.prod(dy.shape[:-1])
    if not wins(dy.dtype, rows, features, out_features):
        return F.linear(dy, weight.t())
    return _project(dy, weight, 0, None, (rows, features, out_features))


def wgrad(dy: Tensor, x: Tensor) -> Tensor:
    """Backend "cpu" of `linear_weight_grad`."""
    (inner, rows), cols = dy.shape, x.shape[1]
    if not wins_weight_gradient(dy.dtype, rows, cols, inner):
        return dy.t() @ x
    out = dy.new_empty((rows, cols))
    multiply_(out, dy.t(), x)
    return out


def _project(
    x: Tensor, weight: Tensor, inner_dim: int, bias: Tensor | None, sizes: tuple[int, int, int]
) -> Tensor:
    """x @ weight.T for an `inner_dim` of 1, x @ weight for 0, plus bias; sizes are rows, columns and inner.

    No views of what is in order: each is 20 to 30 us of code that the kernel before has driven out of the caches.
    """
    rows, cols, inner = sizes
    out = x.new_empty((*x.shape[:-1], cols))
    if x.is_contiguous():
        left = (address(x), inner, True)
    else:
        x = _ordered(x.reshape(rows, inner))
        left = _factor(x)
    weight = _ordered(weight)
    bias = None if bias is None else bias.contiguous()
    _C.gemm(
        DTYPES[x.dtype], left, _factor(weight, inner_dim), address(bias), DTYPES[out.dtype], address(out), cols, False,
        *sizes, threads(),
    )  # fmt: skip
    return out


def accumulate_(dy: Tensor, x: Tensor, main_grad: Tensor, add: bool = True) -> None:
    """Backend "cpu" of `linear_weight_grad_`.

    In half precision always ours, which does not round: with AMX 1.3-1.7 times oneDNN's product of the two, whose
    transposed factor is packed slowly, and without its addition.
    """
    (rows, cols), inner = main_grad.shape, dy.shape[0]
    if dy.dtype == torch.float32 and not wins(dy.dtype, rows, cols, inner):
        # In place already, at the rate of torch's forward.
        main_grad.addmm_(dy.t(), x) if add else torch.mm(dy.t(), x, out=main_grad)
    else:
        multiply_(main_grad, dy.t(), x, add=add)


def product_(out: Tensor, left: Tensor, right: Tensor, bias: Tensor | None) -> None:
    """`product_` of the chunk plan of the loss head."""
    (rows, inner), cols = left.shape, right.shape[1]
    if out.stride(1) == 1 and wins(left.dtype, rows, cols, inner):
        multiply_(out, left, right, bias=bias)
    else:
        plan.product_(out, left, right, bias)


def multiply_(
    out: Tensor, left: Tensor, right: Tensor, *, bias: Tensor | None = None, add: bool = False
) -> None:
    """out = left @ right + bias, or with `add` out += left @ right, by the native library.

    Args:
        out: [M, N] with rows side by side: float32, or like the factors if it is not added to.
        left: [M, K], right: [K, N], any strides: what has neither dim side by side is copied.
        bias: [N] like out, or None.
    """
    (rows, inner), cols = left.shape, right.shape[1]
    bias = None if bias is None else bias.contiguous()
    if inner == 0:  # an empty sum
        if not add:
            out.copy_(out.new_zeros(()) if bias is None else bias)
        return
    left, right = _ordered(left), _ordered(right)
    _C.gemm(
        DTYPES[left.dtype], _factor(left), _factor(right, 0), address(bias), DTYPES[out.dtype], address(out),
        out.stride(0), add, rows, cols, inner, threads(),
    )  # fmt: skip


def _ordered(t: Tensor) -> Tensor:
    """A matrix with one dim or the other side by side: itself if it is one."""
    return t if 1 in t.stride() else t.contiguous()


def _factor(t: Tensor, inner_dim: int = 1) -> tuple[int, int, bool]:
    """`Factor` of csrc/api.h for t [rows, inner], or [inner, rows] with an `inner_dim` of 0."""
    inner_last = t.stride(inner_dim) == 1
    return address(t), t.stride(1 - inner_dim if inner_last else inner_dim), inner_last
