"""Outputs that a backward pass makes again: the forward's bits, and gradients as without."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

import megalite_kernels as mk
from megalite_kernels import backend as backends
from tests.ops.catalogue import BACKENDS, DTYPES, random

SHAPES = [(1, 2), (3, 34), (70, 1408)]
ROWS = {
    "rms_norm": lambda x, r, w, b, again: mk.rms_norm(x, w, again=again),
    "rms_norm_zero_centered": lambda x, r, w, b, again: mk.rms_norm(x, w, zero_centered=True, again=again),
    "rms_norm_residual": lambda x, r, w, b, again: mk.rms_norm(x, w, residual=r, again=again),
    "layer_norm": lambda x, r, w, b, again: mk.layer_norm(x, w, b, again=again),
    "layer_norm_no_bias": lambda x, r, w, b, again: mk.layer_norm(x, w, again=again),
    "layer_norm_residual": lambda x, r, w, b, again: mk.layer_norm(x, w, b, residual=r, again=again),
    "swiglu": lambda x, r, w, b, again: mk.swiglu(x, again=again),
    "geglu": lambda x, r, w, b, again: mk.geglu(x, bias=b, again=again),
    "geglu_exact": lambda x, r, w, b, again: mk.geglu(x, approximate="none", again=again),
    "gelu": lambda x, r, w, b, again: mk.gelu(x, bias=b, again=again),
    "gelu_exact": lambda x, r, w, b, again: mk.gelu(x, approximate="none", again=again),
    "relu_squared": lambda x, r, w, b, again: mk.relu_squared(x, again=again),
}
Function = Callable[..., Any]


def run(
    function: Function, inputs: list[Tensor], again: Callable[[Tensor], None] | None
) -> tuple[Tensor, list[Tensor | None]]:
    """The output, and the gradients of a sum that weighs it, and what it was added to, unevenly."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    outputs = function(*leaves, again)
    y, *rest = outputs if isinstance(outputs, tuple) else (outputs,)
    weights = random(*y.shape, seed=9).to(y.dtype)
    ((y * weights).float().sum() + sum(total.float().square().sum() for total in rest)).backward()
    return y.detach(), [leaf.grad for leaf in leaves]


def same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other if one is None or other is None else torch.equal(one, other)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ROWS)
def test_same_bits(name: str, shape: tuple[int, int], dtype: torch.dtype, backend: str) -> None:
    size = shape[-1]
    inputs = [random(*shape, scale=3), random(*shape, seed=1), random(size, seed=2), random(size, seed=3)]
    inputs = [x.to(dtype) for x in inputs]
    made: list[Tensor] = []
    with backends.use_backend(backend):
        y, gradients = run(ROWS[name], inputs, made.append)
        _, plain = run(ROWS[name], inputs, None)
    assert len(made) == 1, "brought once"
    assert made[0].dtype == dtype
    assert made[0].is_contiguous()
    assert torch.equal(made[0], y)
    assert all(same(one, other) for one, other in zip(gradients, plain, strict=True))


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["swiglu", "geglu", "gelu", "relu_squared"])
def test_written_over_gradient_and_input_only_if_told(name: str, backend: str, in_place: bool) -> None:
    """Whose gradient another operand of an addition may have too, or who called backward; whose input, anybody."""
    leaf, made = random(70, 38, scale=3).requires_grad_(), []
    with backends.use_backend(backend):
        x = leaf.clone()
        y = getattr(mk, name)(x, again=made.append, in_place=in_place)
        given = random(*y.shape, seed=4)
        y.backward(dy := given.clone(), retain_graph=True)
        (expected,) = torch.autograd.grad(getattr(mk, name)(leaf), leaf, given)
    assert torch.equal(made[0], y)
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, expected)
    assert (made[0] is dy or made[0].data_ptr() == dy.data_ptr()) == in_place
    assert torch.equal(dy, y if in_place else given)
    assert torch.equal(x, expected if in_place else leaf)
    again = pytest.raises(RuntimeError, match="a second backward pass") if in_place else nullcontext()
    with backends.use_backend(backend), again:
        y.backward(given)
    assert in_place or torch.equal(leaf.grad, 2 * expected)


@pytest.mark.parametrize("name", ["swiglu", "gelu"])
def test_what_is_overwritten_is_refused_to_all(name: str) -> None:
    """A second pass where hooks hide it from autograd's check; who saved the input too; the gradient has no graph."""
    leaf = random(5, 6).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.detach(), lambda x: x):
        x = leaf * 2
        y = getattr(mk, name)(x, again=lambda made: None, in_place=True)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)
    assert not dx.requires_grad
    with pytest.raises(RuntimeError, match="a second backward pass through an activation with in_place=True"):
        torch.autograd.grad(y, x, torch.ones_like(y))
    x = leaf * 2
    square, y = x.square(), getattr(mk, name)(x, again=lambda made: None, in_place=True)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert not dx.requires_grad
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.sum().backward()


@pytest.mark.parametrize("name", ["swiglu", "geglu", "gelu", "relu_squared"])
def test_in_place_needs_somebody_to_take_the_output(name: str) -> None:
    with pytest.raises(ValueError, match=r"in_place=True goes with again="):
        getattr(mk, name)(random(2, 4), in_place=True)


def test_only_packed() -> None:
    with pytest.raises(ValueError, match=r"again goes with gate and up in one tensor \[..., 2F\]"):
        mk.swiglu(random(2, 4), random(2, 4), again=lambda made: None)
