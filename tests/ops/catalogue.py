"""What the op tests share: backends, dtypes, and the comparison with plain torch and float64."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from megalite_kernels.testing import assert_as_accurate, results_and_grads

NATIVE = importlib.util.find_spec("megalite_kernels._C") is not None
needs_native = pytest.mark.skipif(not NATIVE, reason="megalite_kernels._C is not built")

BACKENDS = [pytest.param("reference"), pytest.param("cpu", marks=needs_native)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def check(
    ours: Callable[..., Any],
    plain: Callable[..., Any],
    inputs: Sequence[Tensor],
    *,
    dtype: torch.dtype,
    backend: str | None,
    floor: float = 1.0,
    magnitude: float = 0.0,
) -> None:
    """Outputs and every gradient of `ours` are as accurate as `plain` torch in the same dtype.

    Both get the inputs rounded to the dtype, and so does the float64 truth: only the computing is compared.
    """
    rounded = [x.to(dtype) if x.is_floating_point() else x for x in inputs]
    got = results_and_grads(ours, rounded, dtype=dtype, backend=backend)
    theirs = results_and_grads(plain, rounded, dtype=dtype)
    truth = results_and_grads(plain, rounded, dtype=torch.float64)
    for index, (a, b, c) in enumerate(zip(got, theirs, truth, strict=True)):
        name = f"result {index}"
        assert_as_accurate(a, b.to(a.dtype), c, floor=floor, magnitude=magnitude, name=name)


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Normal random numbers, the same in every run."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale
