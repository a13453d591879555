"""Cross-entropy on the native library, alone and behind the output projection."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megalite_kernels import _C
from megalite_kernels.native import head
from megalite_kernels.native.common import DTYPES, address, threads
from megalite_kernels.native.linear import multiply_, product_, wins
from megalite_kernels.reference import linear_cross_entropy as plan


def forward(logits: Tensor, target: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """Backend "cpu" of `cross_entropy_fwd`."""
    logits, target = _rows(logits), target.contiguous()
    loss, lse = _per_row(logits), _per_row(logits)
    bad = _C.cross_entropy_forward(
        _described(logits, target), address(loss), address(lse), options, threads()
    )
    _refuse(bad, target, logits.shape[1])
    return loss, lse


def backward(dloss: Tensor, logits: Tensor, target: Tensor, lse: Tensor, *options: Any) -> Tensor:
    """Backend "cpu" of `cross_entropy_bwd`; the targets are those that the forward has checked."""
    return local_backward(logits, target, lse, dloss, 0, logits.shape[1], logits.shape[1], *options)


def grad_(logits: Tensor, target: Tensor, scale: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """Backend "cpu" of `cross_entropy_grad_`; the row kernel `loss_and_grad` of the chunk plan."""
    _require_rows(logits)
    target, scale = target.contiguous(), _float(scale)
    loss, lse = _per_row(logits), _per_row(logits)
    bad = _C.cross_entropy_grad(
        _described(logits, target),
        address(scale),
        scale.dim(),
        address(loss),
        address(lse),
        options,
        threads(),
    )
    _refuse(bad, target, logits.shape[1])
    return loss, lse


def local(logits: Tensor, target: Tensor, vocab_start: int, valid_rows: int, *options: Any) -> Tensor:
    """Backend "cpu" of `cross_entropy_local_fwd`."""
    return _stats(_rows(logits)[:, :valid_rows], target, vocab_start, *options)


def local_backward(
    logits: Tensor,
    target: Tensor,
    lse: Tensor,
    scale: Tensor,
    vocab_start: int,
    valid_rows: int,
    vocab_size: int,
    *options: Any,
) -> Tensor:
    """Backend "cpu" of `cross_entropy_local_bwd`."""
    dlogits = torch.empty(logits.shape, dtype=logits.dtype)
    _backward(_rows(logits), dlogits, target, lse, scale, vocab_start, valid_rows, vocab_size, options)
    return dlogits


def local_backward_(
    logits: Tensor,
    target: Tensor,
    lse: Tensor,
    scale: Tensor,
    vocab_start: int,
    valid_rows: int,
    vocab_size: int,
    *options: Any,
) -> None:
    """Backend "cpu" of `cross_entropy_local_bwd_`."""
    _require_rows(logits)
    _backward(logits, logits, target, lse, scale, vocab_start, valid_rows, vocab_size, options)


def linear_losses(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, valid_rows: int, *options: Any
) -> tuple[Tensor, Tensor]:
    """Backend "cpu" of `linear_cross_entropy_fwd`."""
    inputs = (x, weight, bias, target)
    if not head.runs(x, valid_rows):
        return plan.losses(*inputs, valid_rows, *options, row_kernel=forward, product=product_)
    loss, lse, bad = head.losses(*inputs, valid_rows, *options)
    _refuse(bad, target, valid_rows)
    return loss, lse


def linear_grads(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    scale: Tensor,
    valid_rows: int,
    *options: Any,
    main_grad: Tensor | None = None,
    add: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Backend "cpu" of `linear_cross_entropy_grad`."""
    inputs = (x, weight, bias, target)
    to: dict[str, Any] = {"main_grad": main_grad, "add": add}
    if not head.runs(x, valid_rows):
        return plan.grads(
            *inputs, scale, valid_rows, *options, row_kernel=grad_, add_product=_add_product_, product=product_, **to
        )  # fmt: skip
    loss, lse = linear_losses(*inputs, valid_rows, *options)
    return loss, *head.grads(*inputs, lse, scale, 0, valid_rows, valid_rows, *options, **to)


def linear_grads_(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    scale: Tensor,
    main_grad: Tensor,
    add: bool,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Backend "cpu" of `linear_cross_entropy_grad_`."""
    grads = linear_grads(x, weight, bias, target, scale, *rest, main_grad=main_grad, add=add)
    return grads[0], grads[1], grads[3]


def linear_stats(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, start: int, valid_rows: int, *options: Any
) -> Tensor:
    """Backend "cpu" of `linear_cross_entropy_local_fwd`."""
    args = (x, weight, bias, target, start, valid_rows, *options)
    if head.runs(x, valid_rows):
        return head.stats(*args)
    return plan.shard_stats(*args, row_kernel=_stats, product=product_)


def linear_shard_grads(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    lse: Tensor,
    scale: Tensor,
    start: int,
    valid_rows: int,
    *rest: Any,
    main_grad: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Backend "cpu" of `linear_cross_entropy_bwd`."""
    args = (x, weight, bias, target, lse, scale, start, valid_rows, *rest)
    if head.runs(x, valid_rows):
        return head.grads(*args, main_grad=main_grad)
    return plan.shard_grads(
        *args, row_kernel=_grad, add_product=_add_product_, product=product_, main_grad=main_grad
    )


def linear_shard_grads_(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    lse: Tensor,
    scale: Tensor,
    main_grad: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    """Backend "cpu" of `linear_cross_entropy_bwd_`."""
    dx, _, dbias = linear_shard_grads(x, weight, bias, target, lse, scale, *rest, main_grad=main_grad)
    return dx, dbias


def scaled_copy(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Backend "cpu" of `scaled_copy`."""
    x, out = x.contiguous(), torch.empty(x.shape, dtype=dtype)
    _C.scaled_copy(
        DTYPES[x.dtype], address(x), float(scale), DTYPES[dtype], address(out), x.numel(), threads()
    )
    return out


def _add_product_(total: Tensor, dlogits: Tensor, x: Tensor, *, first: bool) -> None:
    """`add_product_` of the chunk plan; own kernel for half precision, without a temporary and unrounded.

    In float32 the faster of torch's and ours.
    """
    by_torch = x.dtype == torch.float32 and not wins(x.dtype, total.shape[0], total.shape[1], x.shape[0])
    if by_torch or not total.is_contiguous():
        plan.add_product_(total, dlogits, x, first=first)
        return
    multiply_(total, dlogits.t(), x, add=not first)


def _stats(logits: Tensor, target: Tensor, start: int, *options: Any) -> Tensor:
    target = target.contiguous()
    stats = torch.empty(4, logits.shape[0], dtype=torch.float32)
    _C.cross_entropy_stats(_described(logits, target), start, address(stats), options, threads())
    return stats


def _grad(
    logits: Tensor, target: Tensor, lse: Tensor, scale: Tensor, start: int, vocabulary: int, *options: Any
) -> None:
    _backward(logits, logits, target, lse, scale, start, logits.shape[1], vocabulary, options)


def _backward(
    logits: Tensor,
    out: Tensor,
    target: Tensor,
    lse: Tensor,
    scale: Tensor,
    start: int,
    valid: int,
    vocabulary: int,
    options: tuple[Any, ...],
) -> None:
    target, lse, scale = target.contiguous(), _float(lse), _float(scale)
    out[:, valid:] = 0
    _C.cross_entropy_backward(
        _described(logits[:, :valid], target), start, vocabulary, address(lse), address(scale), scale.dim(),
        address(out), out.stride(0), options, threads(),
    )  # fmt: skip


def _described(logits: Tensor, target: Tensor) -> tuple[int, ...]:
    """`LossRows` of csrc/api.h."""
    return DTYPES[logits.dtype], address(logits), logits.stride(0), address(target), *logits.shape


def _rows(logits: Tensor) -> Tensor:
    """Logits whose columns are side by side; the rows may be further apart."""
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _require_rows(logits: Tensor) -> None:
    if logits.shape[1] > 1 and logits.stride(1) != 1:
        raise ValueError(f"logits have stride {logits.stride()}: pass contiguous rows, they are overwritten")


def _float(values: Tensor) -> Tensor:
    return values.to(torch.float32).contiguous()


def _per_row(logits: Tensor) -> Tensor:
    return torch.empty(logits.shape[0], dtype=torch.float32)


def _refuse(bad: int, target: Tensor, cols: int) -> None:
    if bad >= 0:
        raise ValueError(
            f"target[{bad}]={int(target[bad])} must be at least 0 and less than the {cols} classes"
        )
