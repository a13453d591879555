"""Runs a case against float64 and says how near it came."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from megalite_kernels.backend import use_backend
from megalite_kernels.cases.base import Case, Inputs
from megalite_kernels.testing import Accuracy, accuracy, fixed_weights

Results = list[tuple[str, Tensor]]


def check_case(
    case: Case, dtype: torch.dtype, device: str = "cpu", *, backend: str | None = None, factor: float = 2.0
) -> dict[str, Accuracy]:
    """Accuracy of every output, gradient and written buffer at the case's small shape, by name.

    Names start with "out", "grad" or "written". Ours and plain torch compute in `dtype` from the same rounded
    inputs; the truth is plain torch in float64 from those.

    Raises:
        ValueError: the op refuses the case, on this device or on the forced backend.
    """
    generator = torch.Generator(device).manual_seed(0)
    rounded = case.make(case.check, generator).to(dtype)
    with nullcontext() if backend is None else use_backend(backend):
        ours = results(case, case.ours, rounded.to(dtype))
    theirs = results(case, case.plain, rounded.to(dtype))
    truth = results(case, case.plain, rounded.to(torch.float64))
    found = {}
    for (name, a), (_, b), (_, c) in zip(ours, theirs, truth, strict=True):
        found[name] = accuracy(a, b.to(a.dtype), c, factor=factor, floor=case.floor, magnitude=case.magnitude)
    return found


def results(case: Case, function: Callable[..., Any], inputs: Inputs) -> Results:
    """(name, tensor) of outputs, gradients of the leaves that get one, and buffers that were written."""
    leaves = [x.requires_grad_(case.grads) for x in inputs.leaves]
    returned = function(*leaves, *inputs.fixed)
    outputs = [] if returned is None else list(returned) if isinstance(returned, tuple) else [returned]
    found = [(f"out {index}", out.detach()) for index, out in enumerate(outputs)]
    if case.grads:
        grads = torch.autograd.grad(outputs, leaves, fixed_weights(outputs), allow_unused=True)
        found += [(f"grad {index}", grad) for index, grad in enumerate(grads) if grad is not None]
    return found + [(f"written {place}", inputs.all[place].detach()) for place in case.written]
