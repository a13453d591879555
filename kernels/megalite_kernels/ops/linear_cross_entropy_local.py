"""Output projection and cross-entropy over a vocabulary that is divided among several devices.

As `cross_entropy_local`, for a device that holds some rows of the output weight: the logits are made chunk by
chunk and never exist whole, once for the statistics and again for the gradients (8 T H V operations in all).

    stats = linear_cross_entropy_local(x, weight, target, vocab_start=start)
    loss, lse = cross_entropy_combine(all_gather(stats), target, vocab_size=V)
    dx, dweight, dbias = linear_cross_entropy_local_grad(x, weight, target, lse, scale, vocab_start=start, vocab_size=V)
    all_reduce(dx)                                                             # each shard has its part of it
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megalite_kernels._library import define
from megalite_kernels.ops import checks
from megalite_kernels.ops.cross_entropy import (
    OPTIONS_SCHEMA,
    check_target,
    loss_options,
    register_backends,
)
from megalite_kernels.ops.cross_entropy_local import SHARD_SCHEMA, check_scale, shard_of
from megalite_kernels.reference import cross_entropy as reference
from megalite_kernels.reference import linear_cross_entropy as plan
from megalite_kernels.reference.common import wide_dtype
from megalite_kernels.reference.cross_entropy import LossOptions


def linear_cross_entropy_local(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    vocab_start: int = 0,
    valid_rows: int | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """`cross_entropy_local(x @ weight.T + bias, target)`, chunked over tokens.

    Args:
        x: [T, H], bf16, fp16, fp32 or fp64.
        weight: [R, H] like x; row r is class vocab_start + r.
        target: [T], int64 classes of the whole vocabulary.
        bias: [R] like weight, or None.
        vocab_start: class of the first row.
        valid_rows: rows that are classes, the others being padding; None: all, 0: none.
        ignore_index, label_smoothing, z_loss, softcap: as in `cross_entropy`.

    Returns:
        [4, T] fp32 (fp64 for fp64 inputs), as `cross_entropy_local`.

    Raises:
        ValueError: shapes, dtypes, devices or an option is out of its range.

    Saved: nothing; there is no autograd formula.
    """
    check_head(x, weight, bias, target)
    options = loss_options(ignore_index, label_smoothing, z_loss, softcap)
    shard = shard_of(vocab_start, valid_rows, None, weight.shape[0], "rows of weight")
    return _stats(
        x.contiguous(), weight.contiguous(), bias, target, shard.vocab_start, shard.valid_rows, *options
    )


def linear_cross_entropy_local_grad(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    lse: Tensor,
    scale: Tensor,
    *,
    bias: Tensor | None = None,
    vocab_start: int = 0,
    valid_rows: int | None = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    main_grad: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of `sum(scale * loss)` with respect to x (this shard's part of it), weight and bias.

    Args:
        x, weight, target, bias, vocab_start, valid_rows: as in `linear_cross_entropy_local`.
        lse: [T] fp32 over the whole vocabulary, from `cross_entropy_combine`.
        scale: fp32 on the same device, a scalar or [T]: the incoming gradient, with 1/N and the like in it.
        vocab_size: classes of all shards together; None: this is the only shard.
        ignore_index, label_smoothing, z_loss, softcap: as in `cross_entropy`.
        main_grad: [R, H] fp32; if given, the weight's gradient is added into it and None is returned for it.

    Returns:
        (dx [T, H] like x, to be summed over the shards; dweight [R, H] like weight, accumulated in fp32 and
        rounded once; dbias [R] like weight). Padding rows get 0.

    Raises:
        ValueError: shapes, dtypes, devices or an option is out of its range.

    Saved: nothing; there is no autograd formula.
    """
    check_head(x, weight, bias, target)
    check_scale(lse, scale, target)
    options = loss_options(ignore_index, label_smoothing, z_loss, softcap)
    shard = shard_of(vocab_start, valid_rows, vocab_size, weight.shape[0], "rows of weight")
    inputs = (x.contiguous(), weight.contiguous(), bias, target, lse, scale)
    if main_grad is not None:
        check_main_grad(main_grad, weight)
        dx, dbias = shard_grads_(*inputs, main_grad, *shard, *options)
        return dx, None, dbias.to(weight.dtype) if bias is not None else None
    dx, dweight, dbias = shard_grads(*inputs, *shard, *options)
    return dx, dweight.to(weight.dtype), dbias.to(weight.dtype) if bias is not None else None


def check_head(x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> None:
    """Hidden states, output weight, bias and targets fit together."""
    checks.require_float(x=x, weight=weight)
    checks.require_shape(weight, (weight.shape[0], x.shape[-1]), "weight", f"x with {x.shape[-1]} features")
    checks.require_same_kind(weight, x, "weight", "x")
    check_target(target, tuple(x.shape[:-1]), x, "x")
    if bias is not None:
        checks.require_shape(bias, (weight.shape[0],), "bias", f"weight with {weight.shape[0]} rows")
        checks.require_same_kind(bias, weight, "bias", "weight")


def check_main_grad(main_grad: Tensor, weight: Tensor) -> None:
    """`main_grad` is an fp32 accumulator of weight's shape."""
    checks.require_shape(main_grad, tuple(weight.shape), "main_grad", "weight")
    checks.require_same_device(main_grad, weight, "main_grad", "weight")
    if main_grad.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"main_grad has dtype {main_grad.dtype}: pass an fp32 accumulator")


def _stats_row_kernel(logits: Tensor, target: Tensor, start: int, *options: Any) -> Tensor:
    return reference.local(logits, target, LossOptions(*options), start=start)


def _grad_row_kernel(
    logits: Tensor, target: Tensor, lse: Tensor, scale: Tensor, start: int, vocabulary: int, *options: Any
) -> None:
    grad = reference.backward(
        scale, logits, target, lse, LossOptions(*options), start=start, vocabulary=vocabulary
    )
    logits.copy_(grad)


def reference_stats(*args: Any) -> Tensor:
    """Reference of `linear_cross_entropy_local_fwd`."""
    return plan.shard_stats(*args, row_kernel=_stats_row_kernel)


def reference_shard_grads(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Reference of `linear_cross_entropy_bwd`."""
    return plan.shard_grads(*args, row_kernel=_grad_row_kernel)


def reference_shard_grads_(*args: Any) -> tuple[Tensor, Tensor]:
    """Reference of `linear_cross_entropy_bwd_`."""
    return plan.shard_grads_into(*args, row_kernel=_grad_row_kernel)


HEAD_SCHEMA = "Tensor x, Tensor weight, Tensor? bias, Tensor target"


def fake_grads(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight and dbias without data."""
    wide = wide_dtype(x)
    return (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape, dtype=wide),
        x.new_empty(0 if bias is None else weight.shape[0], dtype=wide),
    )


_stats = define(
    f"linear_cross_entropy_local_fwd({HEAD_SCHEMA}, int vocab_start, int valid_rows, {OPTIONS_SCHEMA}) -> Tensor",
    fake=lambda x, *rest: x.new_empty(4, x.shape[0], dtype=wide_dtype(x)),
)
shard_grads = define(
    f"linear_cross_entropy_bwd({HEAD_SCHEMA}, Tensor lse, Tensor scale, {SHARD_SCHEMA}, {OPTIONS_SCHEMA})"
    " -> (Tensor, Tensor, Tensor)",
    fake=lambda x, weight, bias, *rest: fake_grads(x, weight, bias),
)
shard_grads_ = define(
    f"linear_cross_entropy_bwd_({HEAD_SCHEMA}, Tensor lse, Tensor scale, Tensor(a!) main_grad, "
    f"{SHARD_SCHEMA}, {OPTIONS_SCHEMA}) -> (Tensor, Tensor)",
    fake=lambda x, weight, bias, *rest: fake_grads(x, weight, bias)[::2],
)
register_backends(
    "linear_cross_entropy_local_fwd", reference_stats, "linear_stats", "linear_cross_entropy:shard_stats"
)
register_backends(
    "linear_cross_entropy_bwd",
    reference_shard_grads,
    "linear_shard_grads",
    "linear_cross_entropy:shard_grads",
)
register_backends(
    "linear_cross_entropy_bwd_",
    reference_shard_grads_,
    "linear_shard_grads_",
    "linear_cross_entropy:shard_grads_",
)
