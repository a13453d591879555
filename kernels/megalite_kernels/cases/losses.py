"""Cases at the two ends of a model: losses, the linear layer with an fp32 accumulator, the embedding."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megalite_kernels.cases.base import Case, Inputs, Shape, Work, choices, normal
from megalite_kernels.ops.cross_entropy import cross_entropy
from megalite_kernels.ops.embedding import embedding
from megalite_kernels.ops.linear import linear
from megalite_kernels.ops.linear_cross_entropy import linear_cross_entropy

IGNORED = 5
"""Every so many-th token carries no loss."""


def _targets(shape: Shape, generator: torch.Generator) -> Tensor:
    target = choices(generator, shape["V"], shape["T"])
    target[::IGNORED] = -100
    return target


def _logits(shape: Shape, generator: torch.Generator) -> Inputs:
    return Inputs([3 * normal(generator, shape["T"], shape["V"])], [_targets(shape, generator)])


def _head(shape: Shape, generator: torch.Generator) -> Inputs:
    x = normal(generator, shape["T"], shape["H"])
    weight = normal(generator, shape["V"], shape["H"]) / shape["H"] ** 0.5
    return Inputs([x, weight], [_targets(shape, generator)])


def plain_loss(logits: Tensor, target: Tensor) -> Tensor:
    """torch's cross-entropy in fp32 (fp64 for fp64), as models that care for its accuracy call it."""
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), target)


def _logits_work(shape: Shape, itemsize: int) -> Work:
    elements = shape["T"] * shape["V"]
    # logits in; logits in, dlogits out
    return Work(elements * itemsize, 2 * elements * itemsize, 4 * elements, 4 * elements)


def _head_work(shape: Shape, itemsize: int) -> Work:
    product = 2 * shape["T"] * shape["H"] * shape["V"]
    once = (shape["T"] + shape["V"]) * shape["H"] * itemsize
    return Work(once, 2 * once, product, 2 * product)


def _linear_inputs(shape: Shape, generator: torch.Generator) -> Inputs:
    x = normal(generator, shape["T"], shape["I"])
    weight = normal(generator, shape["O"], shape["I"]) / shape["I"] ** 0.5
    return Inputs([x, weight], [normal(generator, shape["O"], shape["I"])])


def _linear_work(shape: Shape, itemsize: int) -> Work:
    rows, columns, outputs = shape["T"], shape["I"], shape["O"]
    product = 2 * rows * columns * outputs
    forward = (rows * columns + columns * outputs + rows * outputs) * itemsize
    # dx as the forward; for the weight dy and x in, and the accumulator in and out
    accumulate = rows * (columns + outputs) * itemsize + 8 * columns * outputs
    return Work(forward, forward + accumulate, product, 2 * product)


class _AddedToMainGrad(torch.autograd.Function):
    """What plain torch does for an accumulated gradient: make it, then add it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, main_grad: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.main_grad = main_grad
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        ctx.main_grad.add_(dy.t() @ x)
        return dy @ weight, None, None


class _EmbeddingAddedToMainGrad(torch.autograd.Function):
    """As above, for the rows of an embedding."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, main_grad: Tensor) -> Tensor:
        ctx.save_for_backward(weight, ids)
        ctx.main_grad = main_grad
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, None, None]:
        weight, ids = ctx.saved_tensors
        ctx.main_grad.add_(torch.ops.aten.embedding_dense_backward(dy, ids, weight.shape[0], -1, False))
        return None, None, None


def _table(shape: Shape, generator: torch.Generator) -> Inputs:
    weight = normal(generator, shape["V"], shape["H"])
    return Inputs([weight], [choices(generator, shape["V"], shape["T"])])


def _table_and_main_grad(shape: Shape, generator: torch.Generator) -> Inputs:
    inputs = _table(shape, generator)
    return Inputs(inputs.leaves, [*inputs.fixed, normal(generator, shape["V"], shape["H"])])


def _embedding_work(shape: Shape, itemsize: int, *, main_grad: bool) -> Work:
    rows, size = shape["T"], shape["H"]
    # the tokens' rows in, y out; dy in, and dweight out, or the rows that occur in and out of the accumulator
    gradient = 8 * size * min(rows, shape["V"]) if main_grad else shape["V"] * size * itemsize
    forward, backward = (2 * rows * size * itemsize, rows * size * itemsize + gradient)
    return Work(forward + 8 * rows, backward + 8 * rows, rows * size, rows * size)


EMBEDDING_SHAPES: dict[str, Any] = {
    "check": {"T": 61, "V": 29, "H": 40},
    "doctor": {"T": 2048, "V": 16000, "H": 512},
    "cpu": ({"T": 8192, "V": 32000, "H": 512},),
    "cuda": ({"T": 16384, "V": 128256, "H": 4096},),
}


CASES = (
    Case(
        "cross_entropy",
        "cross_entropy",
        cross_entropy,
        plain_loss,
        _logits,
        _logits_work,
        check={"T": 23, "V": 1031},
        doctor={"T": 512, "V": 32000},
        cpu=({"T": 2048, "V": 32000}, {"T": 1024, "V": 50257}),
        cuda=({"T": 8192, "V": 128256},),
        eager=F.cross_entropy,
        floor=2.0,
    ),
    Case(
        "linear_cross_entropy",
        "linear_cross_entropy",
        linear_cross_entropy,
        lambda x, weight, target: plain_loss(F.linear(x, weight), target),
        _head,
        _head_work,
        check={"T": 23, "H": 40, "V": 517},
        doctor={"T": 512, "H": 256, "V": 8192},
        cpu=({"T": 2048, "H": 512, "V": 32000},),
        cuda=({"T": 8192, "H": 4096, "V": 128256},),
        eager=lambda x, weight, target: F.cross_entropy(F.linear(x, weight), target),
        bound="compute",
        floor=2.0,
    ),
    Case(
        "linear",
        "linear main_grad",
        lambda x, weight, main_grad: linear(x, weight, main_grad=main_grad),
        _AddedToMainGrad.apply,
        _linear_inputs,
        _linear_work,
        check={"T": 37, "I": 40, "O": 29},
        doctor={"T": 1024, "I": 512, "O": 1024},
        cpu=({"T": 2048, "I": 1024, "O": 2816},),
        cuda=({"T": 8192, "I": 4096, "O": 14336},),
        bound="compute",
        written=(2,),
    ),
    Case(
        "embedding",
        "embedding",
        lambda weight, ids: embedding(ids, weight),
        lambda weight, ids: F.embedding(ids, weight),
        _table,
        lambda shape, itemsize: _embedding_work(shape, itemsize, main_grad=False),
        **EMBEDDING_SHAPES,
    ),
    Case(
        "embedding",
        "embedding main_grad",
        lambda weight, ids, main_grad: embedding(ids, weight, main_grad=main_grad),
        _EmbeddingAddedToMainGrad.apply,
        _table_and_main_grad,
        lambda shape, itemsize: _embedding_work(shape, itemsize, main_grad=True),
        written=(2,),
        **EMBEDDING_SHAPES,
    ),
)
