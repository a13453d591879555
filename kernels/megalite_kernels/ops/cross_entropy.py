"""Cross-entropy from logits: per-token or reduced, with label smoothing, z-loss and soft-cap."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megalite_kernels._library import define
from megalite_kernels.backend import register, register_lazy
from megalite_kernels.ops import checks
from megalite_kernels.ops.cuda_support import cuda_supports
from megalite_kernels.ops.native_support import NATIVE, native_supports
from megalite_kernels.ops.triton_support import TRITON, triton_supports
from megalite_kernels.reference import cross_entropy as reference
from megalite_kernels.reference.common import wide_dtype
from megalite_kernels.reference.cross_entropy import LossOptions


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Negative log-likelihood of `target` under softmax(logits).

    With s the logits (after `c * tanh(logits / c)` for a soft-cap c) and L = logsumexp(s):
    `loss = (1 - a) (L - s_target) + a (L - mean(s)) + z L^2` for smoothing a and z-loss z.

    Args:
        logits: [..., V], bf16, fp16, fp32 or fp64.
        target: [...], int64; `ignore_index` marks tokens without loss.
        reduction: "none", "sum", or "mean" over the tokens that carry a loss (0 if there are none).

    Returns:
        fp32 (fp64 for fp64 logits): a scalar, or [...] for "none".

    Raises:
        ValueError: shapes, dtypes, devices or an option is out of its range; on the CPU also a target that is
            no class. A GPU cannot raise without waiting: there such a token's loss is NaN.

    Saved: logits, target, one float32 per token.
    """
    checks.require_float(logits=logits)
    options = loss_options(ignore_index, label_smoothing, z_loss, softcap)
    check_target(target, tuple(logits.shape[:-1]), logits, "logits")
    checks.require_option(reduction, ("none", "sum", "mean"), "reduction")
    flat, flat_target = logits.reshape(-1, logits.shape[-1]), target.reshape(-1)
    loss = _CrossEntropy.apply(flat, flat_target, *options)
    if reduction == "none":
        return loss.view(target.shape)
    total = loss.sum()
    return total if reduction == "sum" else total * mean_scale(flat_target, ignore_index, total.dtype)


def loss_options(
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float | None
) -> LossOptions:
    """Checked options of the loss."""
    checks.require_range(label_smoothing, "label_smoothing", high=1.0)
    checks.require_range(z_loss, "z_loss")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap={softcap} must be greater than 0, or None for no cap")
    return LossOptions(ignore_index, label_smoothing, z_loss, softcap or 0.0)


def check_target(target: Tensor, shape: tuple[int, ...], like: Tensor, name: str) -> None:
    """`target` is int64 with one entry per token."""
    if target.dtype != torch.int64:
        raise ValueError(f"target has dtype {target.dtype}: pass int64 token ids")
    checks.require_shape(target, shape, "target", f"{name} of shape {list(like.shape)}")
    checks.require_same_device(target, like, "target", name)


def mean_scale(target: Tensor, ignore_index: int, dtype: torch.dtype) -> Tensor:
    """1 / number of tokens that carry a loss (1 if there are none), on the device."""
    return (target != ignore_index).sum().clamp(min=1).to(dtype).reciprocal()


def _row(logits: Tensor) -> Tensor:
    return logits.new_empty((logits.shape[0],), dtype=wide_dtype(logits))


OPTIONS_SCHEMA = "int ignore_index, float label_smoothing, float z_loss, float softcap"


def reference_forward(logits: Tensor, target: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """Reference of `cross_entropy_fwd`."""
    return reference.forward(logits, target, LossOptions(*options))


def reference_backward(dloss: Tensor, logits: Tensor, target: Tensor, lse: Tensor, *options: Any) -> Tensor:
    """Reference of `cross_entropy_bwd`."""
    return reference.backward(dloss, logits, target, lse, LossOptions(*options))


def reference_grad_(logits: Tensor, target: Tensor, scale: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """Reference of `cross_entropy_grad_`."""
    return reference.grad_(logits, target, scale, LossOptions(*options))


def register_backends(op: str, function: Any, native_name: str, gpu_name: str) -> None:
    """The reference, the CPU's and the GPU's implementations of one of the losses' ops; the latter have one name."""
    register(op, "reference", function)
    native = f"megalite_kernels.native.cross_entropy:{native_name}"
    register_lazy(op, "cpu", native, requires=NATIVE, supports=native_supports)
    target = f"megalite_kernels.triton.{gpu_name}"
    register_lazy(op, "triton", target, requires=TRITON, supports=triton_supports)
    register_lazy(op, "cuda", f"megalite_kernels.native.cuda.{gpu_name}", supports=cuda_supports)


_forward = define(
    f"cross_entropy_fwd(Tensor logits, Tensor target, {OPTIONS_SCHEMA}) -> (Tensor, Tensor)",
    fake=lambda logits, target, *options: (_row(logits), _row(logits)),
)
_backward = define(
    f"cross_entropy_bwd(Tensor dloss, Tensor logits, Tensor target, Tensor lse, {OPTIONS_SCHEMA}) -> Tensor",
    fake=lambda dloss, logits, target, lse, *options: logits.new_empty(logits.shape),
)
# The loss and, in place of the logits, their gradient: one pass over a workspace nobody else sees.
_loss_and_grad_ = define(
    f"cross_entropy_grad_(Tensor(a!) logits, Tensor target, Tensor scale, {OPTIONS_SCHEMA}) -> (Tensor, Tensor)",
    fake=lambda logits, target, scale, *options: (_row(logits), _row(logits)),
)
register_backends("cross_entropy_fwd", reference_forward, "forward", "cross_entropy:forward")
register_backends("cross_entropy_bwd", reference_backward, "backward", "cross_entropy:backward")
register_backends("cross_entropy_grad_", reference_grad_, "grad_", "cross_entropy:grad_")


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, *options: Any) -> Tensor:
        # Rows may lie further apart than they are long: real columns of a padded vocabulary need no copy.
        logits = logits if logits.stride(-1) == 1 else logits.contiguous()
        target = target.contiguous()
        loss, lse = _forward(logits, target, *options)
        ctx.save_for_backward(logits, target, lse)
        ctx.options = options
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        logits, target, lse = ctx.saved_tensors
        return (
            _backward(dloss.contiguous(), logits, target, lse, *ctx.options),
            None,
            *(None for _ in ctx.options),
        )
