"""The AdamW kernel, emulated, over several blocks with a ragged last one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import megalite_kernels as mk
from megalite_kernels.native.cuda import adamw, emulated, emulated_build, runtime
from megalite_kernels.native.cuda.kernel import instance
from megalite_kernels.native.cuda.kernels import adamw as kernels
from megalite_kernels.reference import adamw as reference
from tests.ops import test_adamw as ops
from tests.ops.catalogue import random


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(kernels, "THREADS", 32)
    kernels.step.cache_clear()
    yield
    kernels.step.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 7, 64, 256, 701])
def test_agrees_with_torch(size: int, dtype: torch.dtype) -> None:
    """Within a group of 4, within a block of 256, several blocks."""
    ops.test_agrees_with_torch(size, dtype, "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [torch.nan, 1.0])
def test_a_skipped_step_changes_no_bit(value: float, dtype: torch.dtype) -> None:
    ops.test_a_skipped_step_changes_no_bit(value, dtype, "cuda")
    ops.test_a_skipped_stochastic_step_changes_no_bit(value, "cuda")


def test_shared_master_and_empty() -> None:
    ops.test_master_may_be_the_parameters("cuda")
    ops.test_empty("cuda")


def state(size: int, dtype: torch.dtype) -> list[Tensor]:
    """Parameters, master, moments and gradient."""
    master = random(size)
    moments = [random(size, seed=1) * 0.1, random(size, seed=2).square()]
    return [master.to(dtype), master, *moments, random(size, seed=3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("start", [1, 2])
def test_buffers_may_begin_anywhere(start: int, dtype: torch.dtype) -> None:
    """A shard of a flat buffer does; the values don't depend on it, whichever of the five it is."""
    found = []
    for shifted in (None, *range(5)):
        buffers = state(300, dtype)
        if shifted is not None:
            x = buffers[shifted]
            buffers[shifted] = torch.cat([x.new_full((start,), torch.nan), x])[start:]
        with mk.use_backend("cuda"):
            mk.adamw_(*buffers, **ops.SETTINGS, **ops.scalars(3, clip=0.25))
        found.append(buffers)
    for buffers in found[1:]:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(buffers, found[0], strict=True))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32, torch.bfloat16])
def test_scalars_of_any_type(dtype: torch.dtype) -> None:
    scalars = {
        **ops.scalars(3),
        "step": torch.tensor(3, dtype=dtype),
        "lr": torch.tensor(0.5, dtype=torch.bfloat16),
    }
    found = []
    for backend in ("cuda", "reference"):
        buffers = state(40, torch.bfloat16)
        with mk.use_backend(backend):
            mk.adamw_(*buffers, **ops.SETTINGS, **scalars)
        found.append(buffers)
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.999, 0.9999])
def test_bias_correction_against_float64(beta: float) -> None:
    """Steps 1 to 1e6: where 1 - exp2(step * log2(beta)) in float32 is wrong by 1.3e-5 at 0.999, step 1.

    With a gradient of 0 and both moments 1 the parameter moves by lr * beta1 / c1 / sqrt(beta2 / c2).
    """
    for step in (1, 2, 10, 1000, 100_000, 1_000_000):
        params, ones = torch.zeros(1), torch.ones(1)
        moments = [ones.clone(), ones.clone()]
        options = {"beta1": 0.5, "beta2": beta, "eps": 0.0, "weight_decay": 0.0}
        if beta == 0.0:  # v would be 0: the first moment's turn
            options = {"beta1": beta, "beta2": 0.5, "eps": 0.0, "weight_decay": 0.0}
        with mk.use_backend("cuda"):
            mk.adamw_(params, params, *moments, 0 * ones, **options, **ops.scalars(step, lr=1.0))
        first, second = (1 - options[name] ** step for name in ("beta1", "beta2"))
        expected = -options["beta1"] / first / (options["beta2"] / second) ** 0.5
        assert float(params) == pytest.approx(expected, rel=6e-7, abs=0)


BITS = """
#if defined(KERNEL_bits)
extern "C" __global__ void bits(const int64_t* seed, const int64_t* step, int64_t* out, int64_t first) {
  out[threadIdx.x] = rounding_bits(rounding_key(*seed, *step), first + threadIdx.x);
}
#endif
"""


@pytest.fixture(scope="module")
def with_bits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources in which adamw.cuh has one more kernel: the hash alone."""
    folder = tmp_path_factory.mktemp("sources") / "csrc"
    shutil.copytree(emulated_build.csrc(), folder)
    with open(folder / "cuda" / "adamw.cuh", "a", encoding="utf-8") as file:
        file.write(BITS)
    return folder


@pytest.mark.parametrize("seed", [0, -5, 2**40 + 3])
@pytest.mark.parametrize("step", [1, 2**31 + 7, 2**33 + 1])
def test_rounding_bits_are_the_references(seed: int, step: int, with_bits: Path) -> None:
    """At the first indices, and where they pass 2^32, which buffers of 32 GiB would reach."""
    kernel = instance("adamw.cuh", "bits", threads=64, PARAM="bf16")
    seeds, steps = torch.tensor(seed), torch.tensor(step)
    key = reference.key(seeds, steps)
    for first in (0, 2**32 - 20):
        got = torch.empty(64, dtype=torch.int64)
        with emulated_build.using_sources(with_bits):
            runtime.launch(kernel, (1, 1, 1), (seeds, steps, got, first), got.device)
        index = first + torch.arange(64)
        word = reference.mix((key + (index >> 32)) & reference.WORD)
        inner = reference.mix((index & reference.WORD) ^ word)
        assert torch.equal(got, reference.mix((inner + word) & reference.WORD) >> 16)


@pytest.mark.parametrize(("size", "seed", "step"), [(1, 0, 1), (311, 2**33 + 5, 2**33 + 1)])
def test_stochastic_rounding(size: int, seed: int, step: int) -> None:
    ops.test_stochastic_rounding_takes_the_bits_of_the_hash(size, seed, step, "cuda")


def test_stochastic_rounding_of_the_extremes() -> None:
    ops.test_stochastic_rounding_of_the_extremes("cuda")


def test_a_long_run_is_as_the_reference() -> None:
    found = []
    for backend in ("cuda", "reference"):
        params, master, m, v, _ = state(48, torch.bfloat16)
        with mk.use_backend(backend):
            for step in (1, 1000, 100_000):
                mk.adamw_(params, master, m, v, random(48, seed=step), **ops.SETTINGS, **ops.scalars(step))
        found.append((master, m, v))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_one_launch_moves_what_the_header_says() -> None:
    size = 512
    buffers = state(size, torch.bfloat16)
    with mk.use_backend("cuda"), emulated.reporting() as reports:
        mk.adamw_(*buffers, **ops.SETTINGS, **ops.scalars(3))
    (report,) = reports
    threads = 2 * kernels.THREADS
    assert report.global_written_bytes == size * (12 + 2)
    assert report.global_read_bytes == size * 16 + threads * (4 + 8 + 4 + 1)  # lr, step, clip and skip


def test_a_beta_of_zero_has_a_logarithm() -> None:
    assert adamw._log(0.0) == -1e3


def test_remainders_hold_every_master() -> None:
    """A few of those of the ops' tests: a kernel takes long to emulate."""
    masters = ops.extreme_masters()
    ops.keeps_masters(torch.cat([masters[::4_099], masters[32_768::65_536], masters[-1:]]), "cuda")


@pytest.mark.parametrize("size", [1, 7, 256, 701])
def test_remainders_are_updated_as_masters_are(size: int) -> None:
    ops.test_remainders_are_updated_as_masters_are(size, "cuda")


@pytest.mark.parametrize("value", [torch.nan, 1.0])
def test_a_skipped_step_changes_no_bit_of_a_remainder(value: float) -> None:
    ops.test_a_skipped_step_changes_no_bit_of_a_remainder(value, "cuda")
    ops.test_a_master_that_becomes_nan_stays_nan("cuda")


def test_remainders_may_begin_anywhere() -> None:
    found = []
    for start in (0, 1, 2):
        params, master, *moments, grads = state(300, torch.bfloat16)
        params, low = reference.split(master)
        low = torch.cat([low.new_full((start,), -1), low])[start:]
        with mk.use_backend("cuda"):
            mk.adamw_(params, None, *moments, grads, remainder=low, **ops.SETTINGS, **ops.scalars(3))
        found.append(reference.join(params, low))
    assert all(torch.equal(other, found[0]) for other in found[1:])


def test_a_remainder_halves_what_is_moved_of_the_master() -> None:
    size = 512
    params, master, *moments, grads = state(size, torch.bfloat16)
    params, low = reference.split(master)
    with mk.use_backend("cuda"), emulated.reporting() as reports:
        mk.adamw_(params, None, *moments, grads, remainder=low, **ops.SETTINGS, **ops.scalars(3))
    (report,) = reports
    assert report.global_written_bytes == size * 12
    assert report.global_read_bytes == size * 16 + 2 * kernels.THREADS * (4 + 8 + 4 + 1)
