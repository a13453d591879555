"""Cases of the ops that treat each row alone: norms, activations, rope."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megalite_kernels.cases.base import Case, Inputs, Shape, Work, normal
from megalite_kernels.ops.activation import geglu, gelu, relu_squared, swiglu
from megalite_kernels.ops.layer_norm import layer_norm
from megalite_kernels.ops.rms_norm import rms_norm
from megalite_kernels.ops.rope import rope, rope_

NORM_SHAPES: dict[str, Any] = {
    "check": {"T": 37, "H": 259},
    "doctor": {"T": 4096, "H": 1024},
    "cpu": ({"T": 8192, "H": 1024},),
    "cuda": ({"T": 8192, "H": 4096}, {"T": 16384, "H": 8192}),
}
ACTIVATION_SHAPES: dict[str, Any] = {
    "check": {"T": 37, "F": 131},
    "doctor": {"T": 2048, "F": 1408},
    "cpu": ({"T": 4096, "F": 2816},),
    "cuda": ({"T": 8192, "F": 14336},),
}
ROPE_SHAPES: dict[str, Any] = {
    "check": {"S": 33, "N": 4, "K": 2, "D": 24},
    "doctor": {"S": 2048, "N": 16, "K": 4, "D": 64},
    "cpu": ({"S": 8192, "N": 16, "K": 4, "D": 64},),
    "cuda": ({"S": 16384, "N": 32, "K": 8, "D": 128},),
}


def row_work(
    rows: str, size: str, forward: int, backward: int, forward_flops: int, backward_flops: int
) -> Callable[[Shape, int], Work]:
    """Work of an op over [rows, size]: how many such tensors it moves, and FLOPs per element."""

    def work(shape: Shape, itemsize: int) -> Work:
        elements = shape[rows] * shape[size]
        moved = elements * itemsize
        return Work(forward * moved, backward * moved, forward_flops * elements, backward_flops * elements)

    return work


def _norm_inputs(residual: bool, bias: bool) -> Callable[[Shape, torch.Generator], Inputs]:
    def make(shape: Shape, generator: torch.Generator) -> Inputs:
        rows = [normal(generator, shape["T"], shape["H"]) for _ in range(2 if residual else 1)]
        weights = [1 + 0.2 * normal(generator, shape["H"]) for _ in range(2 if bias else 1)]
        return Inputs([*rows, *weights])

    return make


def _plain_rms(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, 1e-6)


def _plain_layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, 1e-5)


NORMS = (
    Case(
        "rms_norm",
        "rms_norm",
        lambda x, weight: rms_norm(x, weight, 1e-6),
        _plain_rms,
        _norm_inputs(residual=False, bias=False),
        row_work("T", "H", 2, 3, 4, 10),  # x in, y out; dy, x in, dx out
        **NORM_SHAPES,
    ),
    Case(
        "rms_norm",
        "rms_norm residual",
        lambda x, residual, weight: rms_norm(x, weight, 1e-6, residual=residual),
        lambda x, residual, weight: (_plain_rms(x + residual, weight), x + residual),
        _norm_inputs(residual=True, bias=False),
        row_work("T", "H", 4, 4, 5, 11),  # x, residual in, y, sum out; dy, dsum, sum in, dx out
        **NORM_SHAPES,
    ),
    Case(
        "layer_norm",
        "layer_norm",
        lambda x, weight, bias: layer_norm(x, weight, bias, 1e-5),
        _plain_layer,
        _norm_inputs(residual=False, bias=True),
        row_work("T", "H", 2, 3, 7, 12),
        **NORM_SHAPES,
    ),
    Case(
        "layer_norm",
        "layer_norm residual",
        lambda x, residual, weight, bias: layer_norm(x, weight, bias, 1e-5, residual=residual),
        lambda x, residual, weight, bias: (_plain_layer(x + residual, weight, bias), x + residual),
        _norm_inputs(residual=True, bias=True),
        row_work("T", "H", 4, 4, 8, 13),
        **NORM_SHAPES,
    ),
)


def _packed(shape: Shape, generator: torch.Generator) -> Inputs:
    return Inputs([2 * normal(generator, shape["T"], 2 * shape["F"])])


def _pair(shape: Shape, generator: torch.Generator) -> Inputs:
    return Inputs([2 * normal(generator, shape["T"], shape["F"]) for _ in range(2)])


def _single(shape: Shape, generator: torch.Generator) -> Inputs:
    return Inputs([2 * normal(generator, shape["T"], shape["F"])])


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = x.chunk(2, dim=-1)
    return gate, up


def _plain_swiglu(x: Tensor) -> Tensor:
    gate, up = _halves(x)
    return F.silu(gate) * up


def _plain_geglu(x: Tensor) -> Tensor:
    gate, up = _halves(x)
    return F.gelu(gate, approximate="tanh") * up


ACTIVATIONS = (
    # gate, up in, y out; dy, gate, up in, dgate, dup out
    Case(
        "swiglu",
        "swiglu",
        swiglu,
        _plain_swiglu,
        _packed,
        row_work("T", "F", 3, 5, 5, 12),
        **ACTIVATION_SHAPES,
    ),
    Case(
        "geglu", "geglu", geglu, _plain_geglu, _packed, row_work("T", "F", 3, 5, 9, 20), **ACTIVATION_SHAPES
    ),
    Case("swiglu", "swiglu pair", swiglu, lambda gate, up: F.silu(gate) * up, _pair, row_work("T", "F", 3, 5, 5, 12),
         **ACTIVATION_SHAPES),
    Case("geglu", "geglu pair", geglu, lambda gate, up: F.gelu(gate, approximate="tanh") * up, _pair,
         row_work("T", "F", 3, 5, 9, 20), **ACTIVATION_SHAPES),
    Case(
        "gelu",
        "gelu",
        gelu,
        lambda x: F.gelu(x, approximate="tanh"),
        _single,
        row_work("T", "F", 2, 3, 8, 18),  # x in, y out; dy, x in, dx out
        **ACTIVATION_SHAPES,
    ),
    Case(
        "relu_squared",
        "relu_squared",
        relu_squared,
        lambda x: F.relu(x).square(),
        _single,
        row_work("T", "F", 2, 3, 2, 3),
        **ACTIVATION_SHAPES,
    ),
)  # fmt: skip


def angle_table(shape: Shape, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of rotary angles [S, D / 2], fp32."""
    half = shape["D"] // 2
    frequencies = 10000.0 ** (-torch.arange(half, device=device) / half)
    angles = torch.arange(shape["S"], device=device).unsqueeze(1) * frequencies
    return angles.cos(), angles.sin()


def _rope_inputs(shape: Shape, generator: torch.Generator) -> Inputs:
    heads = (shape["N"], shape["K"])
    leaves = [normal(generator, 1, shape["S"], count, shape["D"]) for count in heads]
    return Inputs(leaves, list(angle_table(shape, generator.device)))


def rotate_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of [B, S, heads, D] as models write it out, in the dtype of x."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = (torch.cat((table, table), -1).unsqueeze(-2).to(x.dtype) for table in (cos, sin))
    return x * cos + torch.cat((-second, first), -1) * sin


def _plain_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return rotate_half(q, cos, sin), rotate_half(k, cos, sin)


def _rope_norm_inputs(shape: Shape, generator: torch.Generator) -> Inputs:
    inputs = _rope_inputs(shape, generator)
    norms = [1 + 0.2 * normal(generator, shape["D"]) for _ in range(2)]
    return Inputs([*inputs.leaves, *norms], inputs.fixed)


def _rope_in_place(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    rope_(q, k, cos, sin)


def _plain_rope_in_place(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    q.copy_(rotate_half(q, cos, sin))
    k.copy_(rotate_half(k, cos, sin))


def _rope_norm(q: Tensor, k: Tensor, q_norm: Tensor, k_norm: Tensor, cos: Tensor, sin: Tensor) -> Any:
    return rope(q, k, cos, sin, q_norm=q_norm, k_norm=k_norm)


def _plain_rope_norm(q: Tensor, k: Tensor, q_norm: Tensor, k_norm: Tensor, cos: Tensor, sin: Tensor) -> Any:
    return _plain_rope(_plain_rms(q, q_norm), _plain_rms(k, k_norm), cos, sin)


def _rope_work(backward_moves: int, flops: int) -> Callable[[Shape, int], Work]:
    """q and k in and out in the forward, and the tables read; FLOPs per element."""

    def work(shape: Shape, itemsize: int) -> Work:
        elements = shape["S"] * (shape["N"] + shape["K"]) * shape["D"]
        tables = 4 * shape["S"] * shape["D"]
        backward = backward_moves * elements * itemsize + (tables if backward_moves else 0)
        return Work(2 * elements * itemsize + tables, backward, flops * elements, flops * elements)

    return work


ROPES = (
    Case("rope", "rope", rope, _plain_rope, _rope_inputs, _rope_work(2, 3), **ROPE_SHAPES),
    Case("rope", "rope qk-norm", _rope_norm, _plain_rope_norm, _rope_norm_inputs, _rope_work(3, 8), **ROPE_SHAPES),
    Case("rope_", "rope_", _rope_in_place, _plain_rope_in_place, _rope_inputs, _rope_work(0, 3), grads=False,
         written=(0, 1), **ROPE_SHAPES),
)  # fmt: skip

CASES = (*NORMS, *ACTIVATIONS, *ROPES)
