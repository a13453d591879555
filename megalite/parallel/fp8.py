"""The column- and row-parallel products of `tensor.py` in FP8: the same collectives around quantised products.

Each rank quantises what it has, with scales of its own shard, and no maximum travels: scales are powers of two, so a
shard's values differ from the unsharded ones by those elements alone that lie below the formats' normal range (less
than 1 / 14,000 of the largest element of a row or tensor; `megalite_kernels.reference.fp8`). Only key and value heads
that ranks share differ by more: each rank rounds its own part of their gradients, not their sum.

Tokens that are gathered before a product travel quantised where each has its own scale (rowwise): half the bytes.
Gradients of activations are summed over ranks in the compute type.

A product's input may come quantised (`QuantizedTensor`), by rows; its weight may have copies (`fp8_weights.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import megalite_kernels as kernels
from megalite.parallel.collectives import (
    Work,
    start_all_gather,
    start_all_reduce,
    start_reduce_scatter,
    wait,
)
from megalite.parallel.fp8_weights import WeightCopies, get_copies
from megalite.parallel.gradients import GradientSink, get_sink
from megalite.parallel.mesh import Axis
from megalite.parallel.tensor import TensorSplit
from megalite_kernels.ops import fp8_linear as steps
from megalite_kernels.ops.fp8_linear import Quantized, Scaling
from megalite_kernels.ops.quantized import Operand, value_of


def fp8_column_linear(
    x: Operand, weight: Tensor, bias: Tensor | None, split: TensorSplit, scaling: Scaling
) -> Tensor:
    """As `column_linear`, in FP8."""
    sink, copies = get_sink(weight), get_copies(weight)
    compiling = torch.compiler.is_compiling()
    if split.axis.group is None and (compiling or (sink is None and copies is None)):
        # In a graph, which calls nobody, `announce` tells the sink; and copies are made before it runs.
        main_grad, made = None if sink is None else sink.main_grad, None if copies is None else copies.made
        return kernels.fp8_linear(
            x, weight, bias=bias, main_grad=main_grad, scaling=scaling, quantized_weight=made
        )
    data = steps.quantized_rows(x, scaling) or (None, None)
    return _Column.apply(value_of(x), weight, bias, split, sink, copies or WeightCopies(scaling), *data)


def fp8_row_linear(
    x: Operand, weight: Tensor, bias: Tensor | None, split: TensorSplit, scaling: Scaling
) -> Tensor:
    """As `row_linear`, in FP8."""
    if split.axis.group is None:
        return fp8_column_linear(x, weight, bias, split, scaling)
    copies = get_copies(weight) or WeightCopies(scaling)
    data = steps.quantized_rows(x, scaling) or (None, None)
    out = _Row.apply(value_of(x), weight, split, get_sink(weight), copies, *data)
    return out if bias is None else out + bias


class _Column(torch.autograd.Function):
    """Collectives start before the product that hides them, as in the plain layer: dgrad, its sum, wgrad."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        split: TensorSplit,
        sink: GradientSink | None,
        copies: WeightCopies,
        data: Tensor | None,
        scale: Tensor | None,
    ) -> Tensor:
        quantized = _gathered(x.flatten(0, -2), steps.pair(data, scale), split, copies.scaling)
        rows = copies.forward(weight)
        out = steps.forward_product(quantized, rows, bias, weight.dtype)
        _save(ctx, x, weight, quantized, rows, copies)
        ctx.split, ctx.sink, ctx.has_bias = split, sink, bias is not None
        return _shaped(out, x, split)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, x_scale, weight_scale = ctx.saved_tensors
        split, scaling = ctx.split, ctx.copies.scaling
        whole, gathering = start_all_gather(x, split.axis) if split.sequence else (x, None)
        flat = dy.flatten(0, -2).contiguous()
        quantized = steps.quantize_gradient(flat, scaling)
        columns = ctx.copies.backward(weight, weight_scale)
        dx, summing = _start_sum(steps.input_gradient(quantized, columns, weight.dtype), split)
        wait(gathering)
        add = steps.weight_gradient(flat, quantized[1], whole.flatten(0, -2), x_scale, scaling)
        dweight = _add_weight_gradient(ctx.sink, add, weight)
        dbias = flat.sum(0) if ctx.has_bias else None
        wait(summing)
        return dx.view(x.shape), dweight, dbias, *(None,) * 5


class _Row(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        split: TensorSplit,
        sink: GradientSink | None,
        copies: WeightCopies,
        data: Tensor | None,
        scale: Tensor | None,
    ) -> Tensor:
        quantized = steps.pair(data, scale) or steps.quantize(x.flatten(0, -2), copies.scaling)
        rows = copies.forward(weight)
        out = steps.forward_product(quantized, rows, None, weight.dtype)
        _save(ctx, x, weight, quantized, rows, copies)
        ctx.split, ctx.sink = split, sink
        out, summing = _start_sum(out, split)
        wait(summing)
        return _shaped(out, x, split)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, x_scale, weight_scale = ctx.saved_tensors
        split, scaling = ctx.split, ctx.copies.scaling
        flat = dy.flatten(0, -2).contiguous()
        # wgrad reads dy in bf16 (or all of its tokens' one scale): gathered once for both products.
        whole, gathering = start_all_gather(flat, split.axis) if split.sequence else (flat, None)
        wait(gathering)
        quantized = steps.quantize_gradient(whole, scaling)
        dx = steps.input_gradient(quantized, ctx.copies.backward(weight, weight_scale), weight.dtype)
        add = steps.weight_gradient(whole, quantized[1], x.flatten(0, -2), x_scale, scaling)
        return dx.view(x.shape), _add_weight_gradient(ctx.sink, add, weight), *(None,) * 5


def _save(
    ctx: Any, x: Tensor, weight: Tensor, quantized: Quantized, rows: Quantized, copies: WeightCopies
) -> None:
    """For the backward pass; the scales only where there is one for all, which it uses again."""
    scales = (quantized[1], rows[1]) if copies.scaling == "tensorwise" else (None, None)
    ctx.save_for_backward(x, weight, *scales)
    ctx.copies = copies


def _gathered(x: Tensor, own: Quantized | None, split: TensorSplit, scaling: Scaling) -> Quantized:
    """Quantised tokens of all ranks, from this rank's [T / tp, I] with `split.sequence`, else from all of them.

    `own` is what x is quantised, if it came so.
    """
    if not split.sequence:
        return own or steps.quantize(x, scaling)
    if scaling == "tensorwise":  # one scale for all of them
        whole, gathering = start_all_gather(x, split.axis)
        wait(gathering)
        return steps.quantize(whole, scaling)
    data, scale = own or steps.quantize(x, scaling)
    bits, gathering = start_all_gather(data.view(torch.uint8), split.axis)  # gloo knows no FP8
    scales, arriving = start_all_gather(scale, split.axis)
    wait(gathering)
    wait(arriving)
    return bits.view(data.dtype), scales


def _start_sum(part: Tensor, split: TensorSplit) -> tuple[Tensor, Work]:
    """The sum over ranks, of this rank's tokens with `split.sequence`, not waited for."""
    axis: Axis = split.axis
    return start_reduce_scatter(part, axis) if split.sequence else (part, start_all_reduce(part, axis))


def _shaped(out: Tensor, x: Tensor, split: TensorSplit) -> Tensor:
    """out [T, O] with the leading dims of x; no view where there is nothing to reshape (FSDP's hooks mind views)."""
    return out if split.sequence or x.dim() == 2 else out.view(*x.shape[:-1], -1)


def _add_weight_gradient(
    sink: GradientSink | None, add: Callable[[Tensor], None], weight: Tensor
) -> Tensor | None:
    """Into the sink (returns None), or returned where there is none."""
    if sink is not None:
        sink.add_product(add)
        return None
    total = torch.zeros_like(weight, dtype=torch.float32)
    add(total)
    return total.to(weight.dtype)
