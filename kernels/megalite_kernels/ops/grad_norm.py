"""Norm of all gradients at once, or of each, the same bits on every run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megalite_kernels._library import define
from megalite_kernels.backend import register, register_lazy
from megalite_kernels.ops import checks
from megalite_kernels.ops.cuda_support import cuda_supports
from megalite_kernels.ops.native_support import NATIVE, native_supports
from megalite_kernels.ops.triton_support import TRITON, triton_supports
from megalite_kernels.reference import grad_norm as reference


def grad_norm(grads: Tensor | Sequence[Tensor]) -> Tensor:
    """Euclidean norm over every element of one or several tensors.

    Squares are summed in float64 in an order that depends on the sizes only, so the result has the same bits
    on every run and for every number of threads. Non-finite gradients give a non-finite norm.

    Args:
        grads: flat gradient buffers, or any tensors, of float dtype on one device; at least one.

    Returns:
        0-dim fp32 on the same device.

    Raises:
        ValueError: no tensor, or dtypes or devices that don't fit.
    """
    tensors = [grads] if isinstance(grads, Tensor) else list(grads)
    if not tensors:
        raise ValueError("grads is empty: pass at least one gradient tensor")
    for tensor in tensors:
        checks.require_float(grads=tensor)
        checks.require_same_device(tensor, tensors[0], "grads", "the first of them")
    return _norm([tensor.detach().reshape(-1) for tensor in tensors])


def grad_norms(grads: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of each of several tensors, in one launch on CPUs.

    Squares are summed in float64 on CPUs, in an order that depends on each tensor's size only.

    Args:
        grads: any shapes, of one float dtype, on one device; at least one.

    Returns:
        [len(grads)] on the same device: fp32, or fp64 for fp64.

    Raises:
        ValueError: no tensor, or dtypes or devices that don't fit.
    """
    if not grads:
        raise ValueError("grads is empty: pass at least one gradient tensor")
    first = grads[0]
    checks.require_float(grads=first)
    for tensor in grads:
        if tensor.dtype != first.dtype or tensor.device != first.device:
            raise ValueError(
                f"grads has {tensor.dtype} on {tensor.device} beside {first.dtype} on {first.device}: "
                "pass tensors of one dtype on one device"
            )
    return _norms([tensor.detach() if tensor.requires_grad else tensor for tensor in grads])


def _supports(grads: list[Tensor]) -> str | None:
    return native_supports(*grads)


def _fake_norms(grads: list[Tensor]) -> Tensor:
    return grads[0].new_empty(len(grads), dtype=torch.promote_types(grads[0].dtype, torch.float32))


_norm = define(
    "grad_norm(Tensor[] grads) -> Tensor", fake=lambda grads: grads[0].new_empty((), dtype=torch.float32)
)
register("grad_norm", "reference", reference.norm)
register_lazy(
    "grad_norm", "cpu", "megalite_kernels.native.grad_norm:norm", requires=NATIVE, supports=_supports
)
register_lazy(
    "grad_norm",
    "triton",
    "megalite_kernels.triton.grad_norm:norm",
    requires=TRITON,
    supports=triton_supports,
)
register_lazy("grad_norm", "cuda", "megalite_kernels.native.cuda.grad_norm:norm", supports=cuda_supports)

_norms = define("grad_norms(Tensor[] grads) -> Tensor", fake=_fake_norms)
# On GPUs torch's own norm of a list is three launches for any number of tensors.
register("grad_norms", "reference", reference.norms)
register_lazy(
    "grad_norms", "cpu", "megalite_kernels.native.grad_norm:norms", requires=NATIVE, supports=_supports
)
