"""The kernels of the gradient norm, emulated, over several chunks of several turns."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import megalite_kernels as mk
from megalite_kernels.native.cuda import emulated, grad_norm
from megalite_kernels.native.cuda.kernels import grad_norm as kernels
from tests.ops import test_grad_norm as ops
from tests.ops.catalogue import random


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in {"THREADS": 64, "CHUNK": 2048, "UNROLL": 2}.items():
        monkeypatch.setattr(kernels, name, value)
    kernels.partial.cache_clear(), kernels.total.cache_clear()
    yield
    kernels.partial.cache_clear(), kernels.total.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [0, 1, 7, 2048, 9999])
def test_accuracy(size: int, dtype: torch.dtype) -> None:
    ops.test_accuracy(size, dtype, "cuda")


def test_half() -> None:
    grads = random(5000).half()
    with mk.use_backend("cuda"):
        torch.testing.assert_close(mk.grad_norm(grads), grads.double().norm().float(), rtol=1e-7, atol=0)


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_squares_neither_overflow_nor_vanish(scale: float) -> None:
    ops.test_squares_neither_overflow_nor_vanish(scale, "cuda")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_non_finite_gradients_show(value: float) -> None:
    grads = random(3130)
    grads[3129] = value
    with mk.use_backend("cuda"):
        assert not torch.isfinite(mk.grad_norm([random(5), grads]))


def test_many_chunks() -> None:
    """More partial sums than the last block has threads."""
    grads = random(70 * 2048 + 3)
    with mk.use_backend("cuda"):
        torch.testing.assert_close(mk.grad_norm(grads), grads.double().norm().float(), rtol=1e-7, atol=0)


def test_small_tensors_share_a_launch_and_views_are_read_whole() -> None:
    grads = [random(5), random(6000, seed=1)[::2], random(3, seed=2).bfloat16(), random(7, seed=3), random(0)]
    assert [[x.numel() for x in tensors] for tensors in grad_norm._launches(grads)] == [[3000, 12], [3]]
    truth = torch.cat([g.double() for g in grads]).norm().float()
    with mk.use_backend("cuda"), emulated.reporting() as reports:
        torch.testing.assert_close(mk.grad_norm(grads), truth, rtol=1e-7, atol=0)
    assert [report.kernel for report in reports] == ["grad_norm_partial"] * 2 + ["grad_norm_total"]


def test_nine_flat_buffers_are_two_launches_and_a_total() -> None:
    """Every slot of a launch, each with a chunk that isn't whole; all differ, so none stands for another."""
    grads = [random(2048 + i, seed=i) * (i + 1) for i in range(9)]
    truth = torch.cat([g.double() for g in grads]).norm().float()
    with mk.use_backend("cuda"), emulated.reporting() as reports:
        torch.testing.assert_close(mk.grad_norm(grads), truth, rtol=1e-7, atol=0)
        torch.testing.assert_close(
            mk.grad_norm(grads[:8]) ** 2, (truth**2 - grads[8].double().square().sum()).float()
        )
    assert len(reports) == 3 + 2
    assert all(report.bank_conflicts == 0 for report in reports)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_depend_on_the_sizes_alone(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on where a tensor begins, nor on the order in which warps run."""
    storage = random(5001).to(dtype)
    found = []
    for seed in ("0", "3"):
        monkeypatch.setenv(emulated.SEED, seed)
        with mk.use_backend("cuda"):
            found += [mk.grad_norm(storage[1:]), mk.grad_norm(storage[1:].clone())]
    assert all(torch.equal(found[0], other) for other in found[1:])
