"""grad_norm: accurate, deterministic, and it shows non-finite gradients."""

from __future__ import annotations

import pytest
import torch

import megalite_kernels as mk
from tests.ops.catalogue import BACKENDS, needs_native, random


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [0, 1, 7, 65_536, 200_003])
def test_accuracy(size: int, dtype: torch.dtype, backend: str) -> None:
    grads = [random(size).to(dtype), random(3, 5, seed=1).to(dtype).t()]
    truth = torch.cat([g.double().flatten() for g in grads]).norm().float()
    with mk.use_backend(backend):
        norm = mk.grad_norm(grads)
    assert norm.dtype == torch.float32
    assert norm.shape == ()
    torch.testing.assert_close(norm, truth, rtol=1e-7, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_squares_neither_overflow_nor_vanish(scale: float, backend: str) -> None:
    with mk.use_backend(backend):
        norm = mk.grad_norm(torch.full((100,), scale))
    torch.testing.assert_close(norm, torch.tensor(10 * scale), rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_non_finite_gradients_show(value: float, backend: str) -> None:
    grads = random(70_000)
    grads[69_999] = value
    with mk.use_backend(backend):
        assert not torch.isfinite(mk.grad_norm(grads))


@needs_native
def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    grads = random(500_001)
    one = mk.grad_norm(grads)
    torch.set_num_threads(2)
    try:
        assert torch.equal(mk.grad_norm(grads), one)
    finally:
        torch.set_num_threads(1)


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"grads is empty: pass at least one"):
        mk.grad_norm([])
    with pytest.raises(ValueError, match=r"grads has dtype torch.int64"):
        mk.grad_norm(torch.ones(3, dtype=torch.int64))
