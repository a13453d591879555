"""The AdamW kernel, interpreted, over several blocks with a ragged last one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import triton
import triton.language as tl

import megalite_kernels as mk
from megalite_kernels.reference import adamw as reference
from megalite_kernels.triton import adamw as kernels
from megalite_kernels.triton.launch import Launch, override
from tests.ops import test_adamw as ops
from tests.ops.catalogue import random


@pytest.fixture(autouse=True)
def small_blocks() -> Iterator[None]:
    with override("adamw_", Launch({"BLOCK": 32})):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 7, 64, 101])
def test_agrees_with_torch(size: int, dtype: torch.dtype) -> None:
    ops.test_agrees_with_torch(size, dtype, "triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [torch.nan, 1.0])
def test_a_skipped_step_changes_no_bit(value: float, dtype: torch.dtype) -> None:
    ops.test_a_skipped_step_changes_no_bit(value, dtype, "triton")
    ops.test_a_skipped_stochastic_step_changes_no_bit(value, "triton")


def test_shared_master_and_empty() -> None:
    ops.test_master_may_be_the_parameters("triton")
    ops.test_empty("triton")


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.95, 0.999, 0.9999])
def test_bias_correction_against_float64(beta: float) -> None:
    """Steps 1 to 1e6: where 1 - exp2(step * log2(beta)) in float32 is wrong by 1.3e-5 at 0.999, step 1."""

    steps = torch.cat([torch.arange(1, 1000), torch.logspace(3, 6, 1049).long()]).float()
    got = torch.empty_like(steps)
    correction_kernel[(1,)](steps, got, LOG_BETA=kernels._log(beta), SIZE=2048)
    expected = -torch.expm1(steps.double() * torch.tensor(beta, dtype=torch.float64).log())
    assert ((got.double() - expected) / expected).abs().max() < 3e-7


@triton.jit
def correction_kernel(step_ptr, out_ptr, LOG_BETA: tl.constexpr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out_ptr + at, kernels.bias_correction(tl.load(step_ptr + at), LOG_BETA))


@triton.jit
def bits_kernel(seed_ptr, step_ptr, out_ptr, first, SIZE: tl.constexpr):
    index = first + tl.arange(0, SIZE).to(tl.int64)
    bits = kernels.rounding_bits(tl.load(seed_ptr), tl.load(step_ptr).to(tl.int64), index)
    tl.store(out_ptr + tl.arange(0, SIZE), bits.to(tl.int64))


@pytest.mark.parametrize("seed", [0, 1, -5, 2**40 + 3])
@pytest.mark.parametrize("step", [1, 2**31 + 7])
def test_rounding_bits_are_the_references(seed: int, step: int) -> None:
    seeds, steps, got = torch.tensor(seed), torch.tensor(step), torch.empty(64, dtype=torch.int64)
    bits_kernel[(1,)](seeds, steps, got, 0, SIZE=64)
    assert torch.equal(got, reference.rounding_bits(seeds, steps, 64))


def test_rounding_bits_beyond_32_bits_of_index() -> None:
    """The reference's recipe, at indices that its own function would need 32 GiB to reach."""
    got, first = torch.empty(64, dtype=torch.int64), 2**32 - 20
    bits_kernel[(1,)](torch.tensor(3), torch.tensor(9), got, first, SIZE=64)
    index, key = first + torch.arange(64), torch.tensor(3 + reference.GOLDEN)
    for part in (0, 0, 9, 0):
        key = reference.mix((key + part) & reference.WORD)
    word = reference.mix((key + (index >> 32)) & reference.WORD)
    inner = reference.mix((index & reference.WORD) ^ word)
    assert torch.equal(got, reference.mix((inner + word) & reference.WORD) >> 16)


@pytest.mark.parametrize(("size", "seed", "step"), [(1, 0, 1), (111, 2**33 + 5, 2**33 + 1)])
def test_stochastic_rounding(size: int, seed: int, step: int) -> None:
    ops.test_stochastic_rounding_takes_the_bits_of_the_hash(size, seed, step, "triton")


def test_stochastic_rounding_of_the_extremes() -> None:
    ops.test_stochastic_rounding_of_the_extremes("triton")


def test_a_long_run_is_as_the_reference() -> None:
    state = [random(48), random(48, seed=1) * 0.1, random(48, seed=2).square()]
    found = []
    for backend in ("triton", "reference"):
        master, m, v = (x.clone() for x in state)
        params = master.bfloat16()
        with mk.use_backend(backend):
            for step in (1, 1000, 100_000):
                mk.adamw_(params, master, m, v, random(48, seed=step), **ops.SETTINGS, **ops.scalars(step))
        found.append((master, m, v))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_remainders_hold_every_master() -> None:
    """Those of the ops' tests, of which each kernel takes a few: a program takes long to interpret."""
    masters = ops.extreme_masters()
    masters = torch.cat([masters[::65_521], masters[32_768::65_536], masters[-1:]])
    ops.keeps_masters(masters, "triton")


@pytest.mark.parametrize("size", [1, 7, 101])
def test_remainders_are_updated_as_masters_are(size: int) -> None:
    ops.test_remainders_are_updated_as_masters_are(size, "triton")


@pytest.mark.parametrize("value", [torch.nan, 1.0])
def test_a_skipped_step_changes_no_bit_of_a_remainder(value: float) -> None:
    params = ops.extreme_masters()[::65_521]
    ops.skips(params, value, "triton")
    ops.test_a_master_that_becomes_nan_stays_nan("triton")
