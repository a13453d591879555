"""What the op tests share: backends, dtypes, and the comparison with plain torch and float64.

MEGALITE_TEST_DEVICE=cuda runs them on a GPU: every tensor is made there (conftest.py sets torch's default device),
and the Triton kernels take the place of the native library, or those of the back-end that MEGALITE_TEST_KERNELS names.
"interpreter" does so on the CPU, in Triton's interpreter (with TRITON_INTERPRET=1).
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from megalite_kernels.testing import assert_as_accurate, results_and_grads

WHERE = os.environ.get("MEGALITE_TEST_DEVICE", "cpu")
KERNELS = os.environ.get("MEGALITE_TEST_KERNELS", "triton")
"""Back-end of another device than the CPU."""
DEVICE = "cpu" if WHERE == "interpreter" else WHERE
ABOUT_THE_CPU = [f"test_{name}.py" for name in ("backend", "isa", "native_math", "threads", "timing")]
"""Files that say nothing about another device."""
NATIVE = importlib.util.find_spec("megalite_kernels._C") is not None
cpu_only = pytest.mark.skipif(WHERE != "cpu", reason=f"tests the CPU, and this run is about {WHERE}")
needs_native = pytest.mark.skipif(
    not NATIVE or WHERE != "cpu", reason="megalite_kernels._C is not built, or this run is not about the CPU"
)

BACKENDS = [pytest.param("reference"), pytest.param("cpu", marks=needs_native)]
RAW_BACKENDS = ("reference", "cpu", "sdpa")
"""Whose functions the default device's tensors can be given to directly."""
if WHERE != "cpu":
    BACKENDS = [pytest.param("reference"), pytest.param(KERNELS)]
    RAW_BACKENDS = ("reference", KERNELS)
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
    or_reference: bool = False,
) -> None:
    """Outputs and every gradient of `ours` are as accurate as `plain` torch in the same dtype.

    Both get the inputs rounded to the dtype, and so does the float64 truth: only the computing is compared. With
    `or_reference` plain torch is also what `ours` computes on the back-end "reference", where that goes another way
    than autograd: attention's makes the probabilities again from the log-sum-exp, as every tiled kernel must.
    """
    rounded = [x.to(dtype) if x.is_floating_point() else x for x in inputs]
    got = results_and_grads(ours, rounded, dtype=dtype, backend=backend)
    theirs = results_and_grads(plain, rounded, dtype=dtype)
    truth = results_and_grads(plain, rounded, dtype=torch.float64)
    if or_reference:
        other = results_and_grads(ours, rounded, dtype=dtype, backend="reference")
        theirs = [
            max(pair, key=lambda x, c=c: (x - c).abs().max())
            for *pair, c in zip(theirs, other, truth, strict=True)
        ]
    for index, (a, b, c) in enumerate(zip(got, theirs, truth, strict=True)):
        name = f"result {index}"
        assert_as_accurate(a, b.to(a.dtype), c, floor=floor, magnitude=magnitude, name=name)


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Normal random numbers, the same in every run."""
    return torch.randn(*shape, generator=generator(seed), device="cpu").to(DEVICE) * scale


def generator(seed: int = 0) -> torch.Generator:
    """Of the CPU, so that numbers are the same on every device: pass device="cpu" with it."""
    return torch.Generator("cpu").manual_seed(seed)
