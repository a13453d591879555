"""Output projection and cross-entropy in one: the loss of hidden states without ever holding the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megalite_kernels._library import define
from megalite_kernels.backend import register, register_lazy
from megalite_kernels.ops import checks
from megalite_kernels.ops.cross_entropy import (
    OPTIONS_SCHEMA,
    check_target,
    loss_options,
    mean_scale,
    reference_forward,
    reference_grad_,
)
from megalite_kernels.ops.native_support import NATIVE, native_supports
from megalite_kernels.reference import linear_cross_entropy as plan
from megalite_kernels.reference.common import wide_dtype


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
    main_grad: Tensor | None = None,
) -> Tensor:
    """`cross_entropy(x @ weight.T + bias, target)`, chunked over tokens.

    With a scalar reduction the gradients are made during the forward (6 T H V operations in all) and the
    backward only scales them; with "none" the backward makes the logits again (8 T H V).

    Args:
        x: [..., H], bf16, fp16, fp32 or fp64.
        weight: [V, H] like x.
        target: [...], int64; `ignore_index` marks tokens without loss.
        bias: [V] like weight, or None.
        ignore_index, label_smoothing, z_loss, softcap, reduction: as in `cross_entropy`.
        main_grad: [V, H] fp32; if given, the weight's gradient is added into it in the backward and `weight`
            itself gets none.

    Returns:
        fp32 (fp64 for fp64 inputs): a scalar, or [...] for "none".

    Raises:
        ValueError: shapes, dtypes, devices or an option is out of its range.

    Saved: scalar reductions: dx like x, dweight [V, H] fp32; "none": x, weight, target.
    """
    checks.require_float(x=x, weight=weight)
    checks.require_shape(weight, (weight.shape[0], x.shape[-1]), "weight", f"x with {x.shape[-1]} features")
    checks.require_same_kind(weight, x, "weight", "x")
    check_target(target, tuple(x.shape[:-1]), x, "x")
    checks.require_option(reduction, ("none", "sum", "mean"), "reduction")
    options = loss_options(ignore_index, label_smoothing, z_loss, softcap)
    if bias is not None:
        checks.require_shape(bias, (weight.shape[0],), "bias", f"weight with {weight.shape[0]} rows")
        checks.require_same_kind(bias, weight, "bias", "weight")
    if main_grad is not None:
        check_main_grad(main_grad, weight)
    flat, flat_target = x.reshape(-1, x.shape[-1]), target.reshape(-1)
    wide = wide_dtype(x)
    one = torch.ones((), dtype=wide, device=x.device)
    scale = mean_scale(flat_target, ignore_index, wide) if reduction == "mean" else one
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if needs_grad and reduction != "none":
        return _ReducedLoss.apply(flat, weight, bias, flat_target, scale, main_grad, *options)
    loss = _TokenLosses.apply(flat, weight, bias, flat_target, main_grad, *options)
    return loss.view(target.shape) if reduction == "none" else loss.sum() * scale


def check_main_grad(main_grad: Tensor, weight: Tensor) -> None:
    """`main_grad` is an fp32 accumulator of weight's shape."""
    checks.require_shape(main_grad, tuple(weight.shape), "main_grad", "weight")
    checks.require_same_device(main_grad, weight, "main_grad", "weight")
    if main_grad.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"main_grad has dtype {main_grad.dtype}: pass an fp32 accumulator")


def reference_losses(x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *options: Any) -> Tensor:
    """Reference of `linear_cross_entropy_fwd`."""
    return plan.losses(x, weight, bias, target, *options, row_kernel=reference_forward)


def reference_grads(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, scale: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Reference of `linear_cross_entropy_grad`."""
    return plan.grads(x, weight, bias, target, scale, *options, row_kernel=reference_grad_)


def _fake_losses(x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *options: Any) -> Tensor:
    return x.new_empty(x.shape[0], dtype=wide_dtype(x))


def _fake_grads(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, scale: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = wide_dtype(x)
    return (
        x.new_empty(x.shape[0], dtype=wide),
        x.new_empty(x.shape),
        weight.new_empty(weight.shape, dtype=wide),
        x.new_empty(0 if bias is None else weight.shape[0], dtype=wide),
    )


_losses = define(
    f"linear_cross_entropy_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor target, {OPTIONS_SCHEMA}) -> Tensor",
    fake=_fake_losses,
)
_grads = define(
    "linear_cross_entropy_grad(Tensor x, Tensor weight, Tensor? bias, Tensor target, Tensor scale, "
    f"{OPTIONS_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_grads,
)
for _op, _function, _name in (
    ("linear_cross_entropy_fwd", reference_losses, "linear_losses"),
    ("linear_cross_entropy_grad", reference_grads, "linear_grads"),
):
    register(_op, "reference", _function)
    register_lazy(
        _op,
        "cpu",
        f"megalite_kernels.native.cross_entropy:{_name}",
        requires=NATIVE,
        supports=native_supports,
    )


def _deliver(dweight: Tensor, main_grad: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The weight's gradient, or None after adding it into the accumulator."""
    if main_grad is None:
        return dweight.to(dtype)
    main_grad.add_(dweight)
    return None


class _ReducedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        scale: Tensor,
        main_grad: Tensor | None,
        *options: Any,
    ) -> Tensor:
        x, weight, target = x.contiguous(), weight.contiguous(), target.contiguous()
        loss, dx, dweight, dbias = _grads(x, weight, bias, target, scale, *options)
        ctx.save_for_backward(dx, dweight, dbias)
        ctx.main_grad, ctx.has_bias, ctx.dtype = main_grad, bias is not None, weight.dtype
        ctx.num_options = len(options)
        return loss.sum() * scale

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        dx, dweight, dbias = ctx.saved_tensors
        dx = (dx * dloss).to(dx.dtype)
        dbias = (dbias * dloss).to(ctx.dtype) if ctx.has_bias else None
        weight_grad = _deliver(dweight * dloss, ctx.main_grad, ctx.dtype)
        return dx, weight_grad, dbias, None, None, None, *(None for _ in range(ctx.num_options))


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        main_grad: Tensor | None,
        *options: Any,
    ) -> Tensor:
        x, weight, target = x.contiguous(), weight.contiguous(), target.contiguous()
        ctx.save_for_backward(x, weight, bias, target)
        ctx.main_grad, ctx.options = main_grad, options
        return _losses(x, weight, bias, target, *options)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, target = ctx.saved_tensors
        _, dx, dweight, dbias = _grads(x, weight, bias, target, dloss.contiguous(), *ctx.options)
        dbias = dbias.to(weight.dtype) if bias is not None else None
        weight_grad = _deliver(dweight, ctx.main_grad, weight.dtype)
        return dx, weight_grad, dbias, None, None, *(None for _ in ctx.options)
