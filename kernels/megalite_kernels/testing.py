"""Checks of numbers against a better-precision truth, for our tests and for yours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megalite_kernels.backend import use_backend


def assert_as_accurate(
    got: Tensor,
    same_dtype: Tensor,
    truth: Tensor,
    *,
    factor: float = 2.0,
    floor: float = 1.0,
    magnitude: float = 0.0,
    name: str = "result",
) -> None:
    """Fail unless `got` is about as near to the truth as plain torch in the same dtype is.

    `max|got - truth| <= factor * max|same_dtype - truth| + floor * eps * max(|truth|, magnitude)`, eps being the
    spacing of got's dtype at 1: two correct ways to round differ by that much. Non-finite values must be where
    the truth's are.

    Args:
        got: what is tested.
        same_dtype: plain torch's result in got's dtype.
        truth: the result in float64.
        factor: how many times torch's own error is accepted (the rule of flash-attention's tests).
        floor: units in the last place of the largest value that are always accepted.
        magnitude: size of the terms, where the result is a difference that may cancel to nothing.
        name: what to call it in the message.

    Raises:
        AssertionError: says both errors and the limit.
    """
    assert got.shape == truth.shape, f"{name}: shape {list(got.shape)}, expected {list(truth.shape)}"
    assert got.dtype == same_dtype.dtype, f"{name}: dtype {got.dtype}, expected {same_dtype.dtype}"
    wide, truth = got.detach().double(), truth.detach().double()
    finite = torch.isfinite(truth)
    assert torch.equal(torch.isfinite(wide), finite), f"{name}: not finite where the truth is, or the reverse"
    if not bool(finite.any()):
        return
    error = (wide - truth)[finite].abs().max().item()
    theirs = (same_dtype.detach().double() - truth)[finite].abs().max().item()
    size = max(truth[finite].abs().max().item(), magnitude)
    limit = factor * theirs + floor * torch.finfo(got.dtype).eps * size
    assert error <= limit, f"{name}: error {error:.3e} is over {limit:.3e} (plain torch: {theirs:.3e})"


def results_and_grads(
    function: Callable[..., Any], inputs: Sequence[Tensor], *, dtype: torch.dtype, backend: str | None = None
) -> list[Tensor]:
    """Outputs of `function`, then the gradient of each floating-point input, with inputs cast to `dtype`.

    The outputs are weighted by fixed random numbers, the same for every dtype and backend, so results of several
    calls can be compared.
    """
    leaves = [x.detach().to(dtype).requires_grad_() if x.is_floating_point() else x for x in inputs]
    if backend is None:
        return _run(function, leaves)
    with use_backend(backend):
        return _run(function, leaves)


def _run(function: Callable[..., Any], leaves: list[Tensor]) -> list[Tensor]:
    outputs = function(*leaves)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    generator = torch.Generator().manual_seed(1234)
    weights = [torch.randn(o.shape, generator=generator, dtype=torch.float64).bfloat16() for o in outputs]
    grad_outputs = [w.to(dtype=o.dtype, device=o.device) for w, o in zip(weights, outputs, strict=False)]
    floats = [x for x in leaves if x.is_floating_point()]
    grads = torch.autograd.grad(outputs, floats, grad_outputs)
    return [o.detach() for o in outputs] + list(grads)
