"""Embedding whose gradient has the same bits on every run, and can go straight into an fp32 buffer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megalite_kernels._library import define
from megalite_kernels.backend import register, register_lazy
from megalite_kernels.ops import checks
from megalite_kernels.ops.linear_cross_entropy_local import check_main_grad
from megalite_kernels.ops.native_support import NATIVE, native_accumulator_supports, native_supports
from megalite_kernels.ops.triton_support import TRITON, triton_supports
from megalite_kernels.reference import embedding as reference


def embedding(ids: Tensor, weight: Tensor, *, main_grad: Tensor | None = None) -> Tensor:
    """`weight[ids]`, one row for each id.

    The gradient of row i is the sum of dy over the tokens with id i, in the order of the tokens, in float32
    (float64 for float64), rounded once: the same bits on every run and for every number of threads.

    Args:
        ids: any shape [...], int64, each at least 0 and less than V.
        weight: [V, H], bf16, fp16, fp32 or fp64.
        main_grad: [V, H] fp32; if given, the backward adds the gradient into it and `weight` itself gets none.

    Returns:
        [..., H] like weight.

    Raises:
        ValueError: shapes, dtypes or devices don't fit together.
        IndexError: an id is out of range (on the CPU; a GPU's own check stops the process).

    Saved: ids.
    """
    checks.require_float(weight=weight)
    if weight.dim() != 2:
        raise ValueError(f"weight has shape {list(weight.shape)}: pass [V, H]")
    if ids.dtype != torch.int64:
        raise ValueError(f"ids has dtype {ids.dtype}: pass int64")
    checks.require_same_device(ids, weight, "ids", "weight")
    if main_grad is not None:
        check_main_grad(main_grad, weight)
    return _Embedding.apply(ids, weight, main_grad)


_backward = define(
    "embedding_bwd(Tensor dy, Tensor ids, int num_embeddings) -> Tensor",
    fake=lambda dy, ids, num_embeddings: dy.new_empty((num_embeddings, dy.shape[-1])),
)
_backward_ = define(
    "embedding_bwd_(Tensor dy, Tensor ids, Tensor(a!) main_grad) -> ()", fake=lambda dy, ids, main_grad: None
)
for _op, _name, _supports in (
    ("embedding_bwd", "backward", native_supports),
    ("embedding_bwd_", "backward_", native_accumulator_supports),
):
    register(_op, "reference", getattr(reference, _name))
    register_lazy(
        _op, "cpu", f"megalite_kernels.native.embedding:{_name}", requires=NATIVE, supports=_supports
    )
    register_lazy(
        _op, "triton", f"megalite_kernels.triton.embedding:{_name}", requires=TRITON, supports=triton_supports
    )


def accumulate_embedding_gradient(dy: Tensor, ids: Tensor, main_grad: Tensor) -> None:
    """Add the gradient of `weight[ids]` into `main_grad`: what the backward of `embedding(main_grad=...)` does.

    Args:
        dy: [..., H].
        ids: [...] int64.
        main_grad: [V, H] fp32, or like dy.
    """
    _backward_(dy.reshape(-1, dy.shape[-1]).contiguous(), ids.reshape(-1), main_grad)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, main_grad: Tensor | None) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.num_embeddings, ctx.main_grad = weight.shape[0], main_grad
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor | None, None]:
        (ids,) = ctx.saved_tensors
        if ctx.main_grad is None:
            flat = dy.reshape(-1, dy.shape[-1]).contiguous()
            return None, _backward(flat, ids.reshape(-1), ctx.num_embeddings), None
        accumulate_embedding_gradient(dy, ids, ctx.main_grad)
        return None, None, None
