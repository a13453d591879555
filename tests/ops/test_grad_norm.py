"""grad_norm: accurate, deterministic, and it shows non-finite gradients."""

from __future__ import annotations

import pytest
import torch

import megalite_kernels as mk
from megalite_kernels.ops.grad_norm import grad_norms
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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norms_of_each_accuracy(dtype: torch.dtype, backend: str) -> None:
    """One tensor of several blocks between small ones, empty ones, and one that is no run of memory."""
    shapes = [(7,), (0,), (400, 501), (1,), (0, 3), (65_536,), (3, 5)]
    grads = [random(*shape, seed=i).to(dtype) for i, shape in enumerate(shapes)]
    grads.append(random(30, 50).to(dtype).t())
    with mk.use_backend(backend, "reference"):
        norms = grad_norms(grads)
    assert norms.dtype == torch.float32
    truth = torch.stack([g.double().norm() for g in grads]).float()
    # The reference adds 4,096 squares in fp32.
    torch.testing.assert_close(norms, truth, rtol=2e-7 if backend == "cpu" else 1e-6, atol=0)


@needs_native
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e25])
def test_norms_of_each_show_whose_gradient_is_bad(value: float) -> None:
    grads = [random(70_000), random(70_000), random(9)]
    grads[1][65_536] = value
    norms = grad_norms(grads)
    assert torch.isfinite(norms).tolist() == [True, value == 1e25, True]
    if value == 1e25:
        torch.testing.assert_close(norms[1], torch.tensor(1e25))


@needs_native
def test_norms_of_each_have_the_same_bits_for_any_threads_and_neighbours() -> None:
    grads = [random(size, seed=size) for size in (500_001, 12, 131_072, 70_000)]
    one = grad_norms(grads)
    alone = torch.cat([grad_norms([grad]) for grad in grads])
    torch.set_num_threads(3)
    try:
        assert torch.equal(grad_norms(grads), one)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(alone, one)


def test_norms_of_each_in_float64_stay_float64() -> None:
    grads = [random(5000).double(), random(3).double()]
    expected = torch.stack([g.norm() for g in grads])
    torch.testing.assert_close(grad_norms(grads), expected, rtol=1e-14, atol=0)


def test_errors_of_norms_of_each() -> None:
    with pytest.raises(ValueError, match=r"grads is empty: pass at least one"):
        grad_norms([])
    with pytest.raises(ValueError, match=r"grads has torch.bfloat16 on cpu beside torch.float32 on cpu"):
        grad_norms([torch.ones(3), torch.ones(3).bfloat16()])
    with pytest.raises(ValueError, match=r"grads has dtype torch.int64"):
        grad_norms([torch.ones(3, dtype=torch.int64)])


def test_norms_of_each_have_no_gradient() -> None:
    assert not grad_norms([random(3).requires_grad_(), random(3)]).requires_grad
