"""Output projection and cross-entropy in one: the loss of hidden states without ever holding the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megalite_kernels._library import define
from megalite_kernels.ops import checks
from megalite_kernels.ops.cross_entropy import (
    OPTIONS_SCHEMA,
    loss_options,
    mean_scale,
    reference_forward,
    reference_grad_,
    register_backends,
)
from megalite_kernels.ops.cross_entropy_local import shard_of
from megalite_kernels.ops.linear_cross_entropy_local import (
    HEAD_SCHEMA,
    check_head,
    check_main_grad,
    fake_grads,
    shard_grads,
    shard_grads_,
)
from megalite_kernels.reference import linear_cross_entropy as plan
from megalite_kernels.reference.common import wide_dtype, widen


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
    valid_rows: int | None = None,
    main_grad: Tensor | None = None,
    main_grad_add: bool = True,
    grad_scale: Tensor | None = None,
) -> Tensor:
    """`cross_entropy(x @ weight.T + bias, target)`, chunked over tokens.

    With a scalar reduction the gradients are made during the forward (6 T H V operations in all). The backward
    multiplies them by its incoming gradient while it writes them out; eager on the CPU, a gradient that needs neither
    is handed on as it is. With "none", and on matrix tiles, the logits are made again (8 T H V; native/head.py).

    Args:
        x: [..., H], bf16, fp16, fp32 or fp64.
        weight: [V, H] like x.
        target: [...], int64; `ignore_index` marks tokens without loss.
        bias: [V] like weight, or None.
        ignore_index, label_smoothing, z_loss, softcap, reduction: as in `cross_entropy`.
        valid_rows: rows of weight that are classes, those after them being padding without part in the loss, and
            with zero gradients; None: all. Cheaper than a slice of the weight, whose gradient autograd copies
            into a padded one.
        main_grad: [V, H] fp32; if given, the backward adds the weight's gradient into it, and `weight` gets none.
        main_grad_add: if not, what main_grad holds is overwritten; only with grad_scale.
        grad_scale: the gradient that a scalar loss is going to get, a scalar, where that is known beforehand (one
            over the labels of all micro-batches). Gradients are made with it, and `main_grad` gets the weight's
            in the *forward*, so that none of V rows lies beside it. A forward with it must be followed by one
            backward of exactly this gradient, and not be run again by that.

    Returns:
        fp32 (fp64 for fp64 inputs): a scalar, or [...] for "none".

    Raises:
        ValueError: shapes, dtypes, devices or an option is out of its range.
        RuntimeError: in the backward, if the gradient is another than `grad_scale` (on a GPU asynchronously).

    Saved: scalar reductions: dx, and dweight [V, H] fp32 unless the forward added it; "none": x, weight, target.
    """
    check_head(x, weight, bias, target)
    checks.require_option(reduction, ("none", "sum", "mean"), "reduction")
    options = loss_options(ignore_index, label_smoothing, z_loss, softcap)
    valid = shard_of(0, valid_rows, None, weight.shape[0], "rows of weight").valid_rows
    _check_gradients(main_grad, main_grad_add, grad_scale, weight, reduction)
    flat, flat_target = x.reshape(-1, x.shape[-1]), target.reshape(-1)
    scale = _reduction_scale(flat_target, ignore_index, reduction, wide_dtype(x))
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if needs_grad and reduction != "none":
        sums = (scale, grad_scale, main_grad, main_grad_add)
        return _ReducedLoss.apply(flat, weight, bias, flat_target, *sums, valid, *options)
    loss = _TokenLosses.apply(flat, weight, bias, flat_target, main_grad, valid, *options)
    return loss.view(target.shape) if reduction == "none" else loss.sum() * scale


def _reduction_scale(target: Tensor, ignore_index: int, reduction: str, wide: torch.dtype) -> Tensor:
    """What the sum of the losses is multiplied by."""
    if reduction == "mean":
        return mean_scale(target, ignore_index, wide)
    return torch.ones((), dtype=wide, device=target.device)


def _check_gradients(
    main_grad: Tensor | None, add: bool, grad_scale: Tensor | None, weight: Tensor, reduction: str
) -> None:
    if main_grad is not None:
        check_main_grad(main_grad, weight)
    if not add and (main_grad is None or grad_scale is None):
        raise ValueError("main_grad_add=False needs main_grad and grad_scale: pass both, or leave it True")
    if grad_scale is None:
        return
    if reduction == "none":
        raise ValueError('grad_scale is of a scalar loss: pass reduction="sum" or "mean", or leave it out')
    if grad_scale.dim() or not grad_scale.is_floating_point():
        raise ValueError(
            f"grad_scale is {grad_scale.dtype} of shape {list(grad_scale.shape)}: pass a floating-point scalar"
        )
    checks.require_same_device(grad_scale, weight, "grad_scale", "weight")


def reference_losses(*args: Any) -> tuple[Tensor, Tensor]:
    """Reference of `linear_cross_entropy_fwd`."""
    return plan.losses(*args, row_kernel=reference_forward)


def reference_grads(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Reference of `linear_cross_entropy_grad`."""
    return plan.grads(*args, row_kernel=reference_grad_)


def reference_grads_(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Reference of `linear_cross_entropy_grad_`."""
    return plan.grads_into(*args, row_kernel=reference_grad_)


def reference_scaled_copy(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Reference of `scaled_copy`; on a GPU the product is rounded in the pass that makes it."""
    wide = widen(x)
    return torch.mul(wide, scale.to(wide.dtype), out=torch.empty(x.shape, dtype=dtype, device=x.device))


_losses = define(
    f"linear_cross_entropy_fwd({HEAD_SCHEMA}, int valid_rows, {OPTIONS_SCHEMA}) -> (Tensor, Tensor)",
    fake=lambda x, *rest: (_per_token(x), _per_token(x)),
)
_grads = define(
    f"linear_cross_entropy_grad({HEAD_SCHEMA}, Tensor scale, int valid_rows, {OPTIONS_SCHEMA})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    fake=lambda x, weight, bias, *rest: (_per_token(x), *fake_grads(x, weight, bias)),
)
_grads_ = define(
    f"linear_cross_entropy_grad_({HEAD_SCHEMA}, Tensor scale, Tensor(a!) main_grad, bool add, int valid_rows, "
    f"{OPTIONS_SCHEMA}) -> (Tensor, Tensor, Tensor)",
    fake=lambda x, weight, bias, *rest: (_per_token(x), *fake_grads(x, weight, bias)[::2]),
)
# x * scale in another dtype: the last step of a gradient that was made before the incoming one was known.
_scaled_copy = define(
    "scaled_copy(Tensor x, Tensor scale, ScalarType dtype) -> Tensor",
    fake=lambda x, scale, dtype: x.new_empty(x.shape, dtype=dtype),
)
register_backends(
    "linear_cross_entropy_fwd", reference_losses, "linear_losses", "linear_cross_entropy:losses"
)
register_backends("linear_cross_entropy_grad", reference_grads, "linear_grads", "linear_cross_entropy:grads")
register_backends(
    "linear_cross_entropy_grad_", reference_grads_, "linear_grads_", "linear_cross_entropy:grads_"
)
register_backends("scaled_copy", reference_scaled_copy, "scaled_copy", "linear_cross_entropy:scaled_copy")


def _per_token(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], dtype=wide_dtype(x))


def _times(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """`grad * factor` in `dtype`, in one pass or, eager on the CPU with a factor of 1, with none to spare."""
    if not torch.compiler.is_compiling() and factor.device.type == "cpu" and float(factor) == 1.0:
        return grad.to(dtype)
    return _scaled_copy(grad, factor, dtype)


class _ReducedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        scale: Tensor,
        grad_scale: Tensor | None,
        main_grad: Tensor | None,
        add: bool,
        valid_rows: int,
        *options: Any,
    ) -> Tensor:
        x, weight, target = x.contiguous(), weight.contiguous(), target.contiguous()
        inputs = (x, weight, bias, target, scale if grad_scale is None else scale * grad_scale)
        dweight = None
        if grad_scale is None or main_grad is None:
            loss, dx, dweight, dbias = _grads(*inputs, valid_rows, *options)
        else:
            loss, dx, dbias = _grads_(*inputs, main_grad, add, valid_rows, *options)
        ctx.save_for_backward(dx, dweight, dbias, grad_scale)
        ctx.main_grad, ctx.has_bias, ctx.dtype = main_grad, bias is not None, weight.dtype
        ctx.num_options = len(options)
        return loss.sum() * scale

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        dx, dweight, dbias, grad_scale = ctx.saved_tensors
        if grad_scale is not None:
            expected = grad_scale.to(dloss.dtype)  # a scale of more digits reaches the loss rounded
            torch._assert_async(dloss == expected, "the loss gets another gradient than its grad_scale")
            dloss = torch.ones_like(dloss)
        dx = _times(dx, dloss, dx.dtype)
        dbias = _times(dbias, dloss, ctx.dtype) if ctx.has_bias else None
        weight_grad = None
        if ctx.main_grad is None:
            weight_grad = _times(dweight, dloss, ctx.dtype)
        elif dweight is not None:
            ctx.main_grad.addcmul_(dweight.to(ctx.main_grad.dtype), dloss.to(ctx.main_grad.dtype))
        return dx, weight_grad, dbias, *(None for _ in range(6 + ctx.num_options))


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        main_grad: Tensor | None,
        valid_rows: int,
        *options: Any,
    ) -> Tensor:
        x, weight, target = x.contiguous(), weight.contiguous(), target.contiguous()
        loss, lse = _losses(x, weight, bias, target, valid_rows, *options)
        ctx.save_for_backward(x, weight, bias, target, lse)
        ctx.main_grad, ctx.valid_rows, ctx.options = main_grad, valid_rows, options
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, target, lse = ctx.saved_tensors
        inputs = (x, weight, bias, target, lse, dloss.contiguous())
        place = (0, ctx.valid_rows, ctx.valid_rows, *ctx.options)
        weight_grad = None
        if ctx.main_grad is None:
            dx, dweight, dbias = shard_grads(*inputs, *place)
            weight_grad = dweight.to(weight.dtype)
        else:
            dx, dbias = shard_grads_(*inputs, ctx.main_grad, *place)
        dbias = dbias.to(weight.dtype) if bias is not None else None
        return dx, weight_grad, dbias, None, None, None, *(None for _ in ctx.options)
