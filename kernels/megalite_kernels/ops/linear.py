"""Linear layer on the faster of two products, whose weight gradient can go straight into an fp32 buffer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megalite_kernels._library import define
from megalite_kernels.backend import register, register_lazy
from megalite_kernels.ops import checks
from megalite_kernels.ops.linear_cross_entropy_local import check_main_grad
from megalite_kernels.ops.native_support import NATIVE, native_accumulator_supports, native_supports
from megalite_kernels.ops.triton_support import TRITON, triton_supports


def linear(
    x: Tensor, weight: Tensor, *, bias: Tensor | None = None, main_grad: Tensor | None = None
) -> Tensor:
    """`x @ weight.T + bias`; on a CPU by the native library where its products are the faster ones.

    Without `main_grad` it is torch's own linear on other devices, for tensors that are no plain ones (sharded, nested),
    and under autocast, which keeps what it has converted. Elsewhere there are first derivatives only.

    Args:
        x: [..., I].
        weight: [O, I] like x.
        bias: [O] like weight, or None.
        main_grad: [O, I] fp32; if given, the backward adds `dy.T @ x` into it and `weight` itself gets no
            gradient. Autocast is not looked at then.

    Returns:
        [..., O] like x.

    Raises:
        ValueError: shapes, dtypes or devices don't fit together.

    Saved: x if the weight needs a gradient, weight if x does; both with `main_grad`.
    """
    if main_grad is None and not may_be_ours(x, weight, bias):
        return F.linear(x, weight, bias)
    checks.require_float(x=x, weight=weight)
    checks.require_shape(weight, (weight.shape[0], x.shape[-1]), "weight", f"x with {x.shape[-1]} features")
    checks.require_same_kind(weight, x, "weight", "x")
    if bias is not None:
        checks.require_shape(bias, (weight.shape[0],), "bias", f"weight with {weight.shape[0]} rows")
        checks.require_same_kind(bias, weight, "bias", "weight")
    if main_grad is None:
        wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
        return _Linear.apply(x, weight, bias) if wanted else project(x, weight, bias)
    check_main_grad(main_grad, weight)
    return _MainGradLinear.apply(x, weight, bias, main_grad)


def may_be_ours(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `linear` without `main_grad` is more than torch's own for these."""
    return (
        x.device.type == "cpu" and checks.is_plain(x, weight, bias) and not torch.is_autocast_enabled("cpu")
    )


def dgrad(dy: Tensor, weight: Tensor) -> Tensor:
    """dy @ weight for dy [..., O] and weight [O, I]; reference of `linear_dgrad`."""
    return dy @ weight


def wgrad(dy: Tensor, x: Tensor) -> Tensor:
    """dy.T @ x for dy [T, O] and x [T, I]; reference of `linear_weight_grad`."""
    return dy.t() @ x


_fwd = define(
    "linear_fwd(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    fake=lambda x, weight, bias: x.new_empty((*x.shape[:-1], weight.shape[0])),
)
_dgrad = define(
    "linear_dgrad(Tensor dy, Tensor weight) -> Tensor",
    fake=lambda dy, weight: dy.new_empty((*dy.shape[:-1], weight.shape[1])),
)
_wgrad = define(
    "linear_weight_grad(Tensor dy, Tensor x) -> Tensor",
    fake=lambda dy, x: dy.new_empty((dy.shape[1], x.shape[1])),
)
register("linear_fwd", "reference", F.linear)
register("linear_dgrad", "reference", dgrad)
register("linear_weight_grad", "reference", wgrad)
register_lazy(
    "linear_fwd",
    "cpu",
    "megalite_kernels.native.linear:forward",
    requires=NATIVE,
    supports=native_supports,
)
register_lazy(
    "linear_dgrad",
    "cpu",
    "megalite_kernels.native.linear:dgrad",
    requires=NATIVE,
    supports=native_supports,
)
register_lazy(
    "linear_weight_grad",
    "cpu",
    "megalite_kernels.native.linear:wgrad",
    requires=NATIVE,
    supports=native_supports,
)


def project(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias` inside an autograd function: no gradient of its own.

    On a GPU it is torch's product, which a compiler then sees for what it is.

    Args:
        x: [..., I].
        weight: [O, I] like x, any strides.
        bias: [O] like x, or None.

    Returns:
        [..., O] like x.
    """
    return _as_given(_fwd, x, weight, bias) if x.device.type == "cpu" else F.linear(x, weight, bias)


def project_back(dy: Tensor, weight: Tensor) -> Tensor:
    """`dy @ weight`, the gradient of the input of `project`, on the same terms.

    Args:
        dy: [..., O].
        weight: [O, I] like dy, any strides.

    Returns:
        [..., I] like dy.
    """
    return _as_given(_dgrad, dy, weight) if dy.device.type == "cpu" else dy @ weight


def weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """`dy.T @ x`, the gradient of the weight of `project`, on the same terms.

    Args:
        dy: [T, O], any strides.
        x: [T, I] like dy, any strides.

    Returns:
        [O, I] like dy.
    """
    return _as_given(_wgrad, dy, x) if dy.device.type == "cpu" else dy.t() @ x


def _as_given(product: Any, *factors: Tensor | None) -> Tensor:
    """The product in the dtype of its factors; where it is torch's after all, autocast would change that."""
    if not torch.is_autocast_enabled("cpu"):
        return product(*factors)
    with torch.autocast("cpu", enabled=False):
        return product(*factors)


def accumulate_(dy: Tensor, x: Tensor, main_grad: Tensor, add: bool = True) -> None:
    """`main_grad (+)= dy.T @ x` for dy [T, O] and x [T, I]; reference of `linear_weight_grad_`."""
    if not add:
        main_grad.copy_(torch.mm(dy.t(), x))
    elif main_grad.dtype == dy.dtype:
        main_grad.addmm_(dy.t(), x)
    else:
        main_grad.add_(torch.mm(dy.t(), x))


_accumulate_ = define(
    "linear_weight_grad_(Tensor dy, Tensor x, Tensor(a!) main_grad, bool add=True) -> ()",
    fake=lambda dy, x, main_grad, add=True: None,
)
register("linear_weight_grad_", "reference", accumulate_)
register_lazy(
    "linear_weight_grad_",
    "triton",
    "megalite_kernels.triton.linear:accumulate_",
    requires=TRITON,
    supports=triton_supports,
)
register_lazy(
    "linear_weight_grad_",
    "cpu",
    "megalite_kernels.native.linear:accumulate_",
    requires=NATIVE,
    supports=native_accumulator_supports,
)


def accumulate_weight_gradient(dy: Tensor, x: Tensor, main_grad: Tensor, *, add: bool = True) -> None:
    """`main_grad += dy.T @ x`, in place: what the backward pass of `linear(main_grad=...)` does.

    Args:
        dy: [T, O].
        x: [T, I] like dy.
        main_grad: [O, I] fp32, or like dy.
        add: if not, what main_grad holds is overwritten, which saves clearing and reading it.
    """
    _accumulate_(dy, x, main_grad, add)


def matrix(x: Tensor) -> Tensor:
    """x [..., I] as [T, I]; not a view of what is one (20 us of code, out of the caches after a kernel).

    `reshape(-1, I)` would not do: of no features it can't tell the number of rows.
    """
    return x if x.dim() == 2 else x.unsqueeze(0) if x.dim() == 1 else x.flatten(0, -2)


class _Linear(torch.autograd.Function):
    """On CPUs; elsewhere torch's is left to compilers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        # As GPT-2's Conv1D gives it. Its gradient comes in the same order, which saves who keeps it a copy.
        ctx.transposed = weight.stride(0) == 1 and weight.stride(1) > 1
        return project(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        flat, dx, dweight = matrix(dy), None, None
        if weight is not None:
            dx = project_back(dy, weight)
        if x is not None:
            x = matrix(x)
            dweight = weight_gradient(x, flat).t() if ctx.transposed else weight_gradient(flat, x)
        return dx, dweight, flat.sum(0) if ctx.needs_input_grad[2] else None


class _MainGradLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, main_grad: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.main_grad, ctx.has_bias = main_grad, bias is not None
        return project(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        flat = matrix(dy)
        dx = project_back(dy, weight) if ctx.needs_input_grad[0] else None
        if ctx.needs_input_grad[1]:
            _accumulate_(flat, matrix(x), ctx.main_grad, True)
        return dx, None, flat.sum(0) if ctx.has_bias else None, None
