"""adamw_ over flat buffers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import megalite_kernels as mk
from megalite_kernels.testing import assert_as_accurate
from tests.ops.catalogue import BACKENDS, DTYPES, random

SETTINGS: dict[str, Any] = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}


def scalars(step: int, *, lr: float = 1e-2, clip: float = 1.0, skip: bool = False) -> dict[str, Tensor]:
    return {
        "lr": torch.tensor(lr),
        "step": torch.tensor(step),
        "clip_coefficient": torch.tensor(clip),
        "skip": torch.tensor(skip),
    }


def buffers(size: int, dtype: torch.dtype) -> list[Tensor]:
    master = random(size)
    return [master.to(dtype), master, torch.zeros(size), torch.zeros(size)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 7, 64, 40_001])
def test_agrees_with_torch(size: int, dtype: torch.dtype, backend: str) -> None:
    """Five clipped steps against torch.optim.AdamW in float32 and float64."""
    params, master, exp_avg, exp_avg_sq = buffers(size, dtype)
    theirs, truth = (torch.nn.Parameter(master.to(d)) for d in (torch.float32, torch.float64))
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    optimizers = [torch.optim.AdamW([p], **options) for p in (theirs, truth)]  # type: ignore[arg-type]
    for step in range(1, 6):
        grads = random(size, seed=step, scale=0.1)
        theirs.grad, truth.grad = grads * 0.25, grads.double() * 0.25
        for optimizer in optimizers:
            optimizer.step()
        with mk.use_backend(backend):
            mk.adamw_(params, master, exp_avg, exp_avg_sq, grads, **SETTINGS, **scalars(step, clip=0.25))
    assert_as_accurate(master, theirs.detach(), truth.detach(), floor=4)
    assert torch.equal(params, master.to(dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1.0])
def test_a_skipped_step_changes_no_bit(value: float, dtype: torch.dtype, backend: str) -> None:
    state = buffers(100, dtype)
    state[0][3] = torch.nan  # not even what is there already
    before = [t.clone() for t in state]
    grads = torch.full((100,), value)
    with mk.use_backend(backend):
        mk.adamw_(*state, grads, **SETTINGS, **scalars(1, skip=True))
    for old, new in zip(before, state, strict=True):
        assert torch.equal(old.view(torch.uint8), new.view(torch.uint8))


@pytest.mark.parametrize("backend", BACKENDS)
def test_master_may_be_the_parameters(backend: str) -> None:
    params, master, exp_avg, exp_avg_sq = buffers(50, torch.float32)
    shared = master.clone()
    moments = exp_avg.clone(), exp_avg_sq.clone()
    with mk.use_backend(backend):
        mk.adamw_(params, master, exp_avg, exp_avg_sq, random(50, seed=1), **SETTINGS, **scalars(1))
        mk.adamw_(shared, shared, *moments, random(50, seed=1), **SETTINGS, **scalars(1))
    assert torch.equal(shared, master)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty(backend: str) -> None:
    with mk.use_backend(backend):
        mk.adamw_(*buffers(0, torch.float32), torch.zeros(0), **SETTINGS, **scalars(1))


def test_gradients_are_not_written() -> None:
    grads = random(10)
    mk.adamw_(*buffers(10, torch.float32), grads, **SETTINGS, **scalars(1))
    assert grads._version == 0
    assert torch.equal(grads, random(10))


def test_errors_name_value_and_limit() -> None:
    state, grads = buffers(10, torch.bfloat16), random(10)
    with pytest.raises(
        ValueError, match=r"grads has shape \[9\], but a flat buffer like params needs \[10\]"
    ):
        mk.adamw_(*state, grads[:9], **SETTINGS, **scalars(1))
    with pytest.raises(
        ValueError, match=r"grads has dtype torch.bfloat16: optimizer state and gradients are fp32"
    ):
        mk.adamw_(*state, grads.bfloat16(), **SETTINGS, **scalars(1))
    with pytest.raises(ValueError, match=r"grads has stride \(2,\): pass a contiguous flat buffer"):
        mk.adamw_(*state, random(20)[::2], **SETTINGS, **scalars(1))
    with pytest.raises(ValueError, match=r"beta2=1.0 must be at least 0 and less than 1"):
        mk.adamw_(*state, grads, **{**SETTINGS, "beta2": 1.0}, **scalars(1))
    with pytest.raises(ValueError, match=r"weight_decay=-0.1 must be at least 0"):
        mk.adamw_(*state, grads, **{**SETTINGS, "weight_decay": -0.1}, **scalars(1))
    with pytest.raises(ValueError, match=r"lr has shape \[1\], but a 0-dim tensor on the device needs \[\]"):
        mk.adamw_(*state, grads, **SETTINGS, **{**scalars(1), "lr": torch.ones(1)})
