"""Checks of numbers against a better-precision truth, for our tests and for yours."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megalite_kernels.backend import use_backend


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Distance of a result from the truth, and what is accepted."""

    error: float
    limit: float
    plain: float
    """Plain torch's own error in the same dtype."""
    problem: str = ""
    """Why no error could be measured: wrong shape or dtype, or not finite where the truth is."""

    @property
    def kept(self) -> bool:
        """Whether the result is as accurate as promised."""
        return not self.problem and self.error <= self.limit

    def __str__(self) -> str:
        if self.problem:
            return self.problem
        return f"error {self.error:.3e} is over {self.limit:.3e} (plain torch: {self.plain:.3e})"


def accuracy(
    got: Tensor,
    same_dtype: Tensor,
    truth: Tensor,
    *,
    factor: float = 2.0,
    floor: float = 1.0,
    magnitude: float = 0.0,
) -> Accuracy:
    """How near `got` is to the truth, and the limit by plain torch's error; arguments as below."""
    if got.shape != truth.shape:
        return _no_accuracy(f"shape {list(got.shape)}, expected {list(truth.shape)}")
    if got.dtype != same_dtype.dtype:
        return _no_accuracy(f"dtype {got.dtype}, expected {same_dtype.dtype}")
    wide, truth = got.detach().double(), truth.detach().double()
    finite = torch.isfinite(truth)
    if not torch.equal(torch.isfinite(wide), finite):
        return _no_accuracy("not finite where the truth is, or the reverse")
    if not bool(finite.any()):
        return Accuracy(0.0, 0.0, 0.0)
    error = (wide - truth)[finite].abs().max().item()
    theirs = (same_dtype.detach().double() - truth)[finite].abs().max().item()
    size = max(truth[finite].abs().max().item(), magnitude)
    return Accuracy(error, factor * theirs + floor * torch.finfo(got.dtype).eps * size, theirs)


def _no_accuracy(problem: str) -> Accuracy:
    return Accuracy(math.nan, math.nan, math.nan, problem)


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
    found = accuracy(got, same_dtype, truth, factor=factor, floor=floor, magnitude=magnitude)
    assert found.kept, f"{name}: {found}"


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
    floats = [x for x in leaves if x.is_floating_point()]
    grads = torch.autograd.grad(outputs, floats, fixed_weights(outputs))
    return [o.detach() for o in outputs] + list(grads)


def fixed_weights(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Random numbers to weight outputs by, the same on every device and in every dtype (exact in bf16)."""
    generator = torch.Generator("cpu").manual_seed(1234)
    weights = []
    for out in outputs:
        wide = torch.randn(out.shape, generator=generator, dtype=torch.float64, device="cpu")
        weights.append(wide.bfloat16().to(dtype=out.dtype, device=out.device))
    return weights
