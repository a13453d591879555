"""adamw_ over flat buffers."""

from __future__ import annotations

import struct
from typing import Any

import pytest
import torch
from torch import Tensor

import megalite_kernels as mk
from megalite_kernels.reference import adamw as reference
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


def extreme_masters() -> Tensor:
    """Every low half under high halves of all exponents and of edges: 0, subnormal, largest, infinite, NaN."""
    edges = [0x0000, 0x0001, 0x007F, 0x0080, 0x3F7F, 0x3F80, 0x7F7E, 0x7F7F, 0x7F80, 0x7F81, 0x7FFF]
    highs = torch.tensor(edges + [(e << 7) | (37 * e & 0x7F) for e in range(0, 255, 5)])
    highs = torch.cat([highs, highs + 0x8000])  # negative
    patterns = (highs.unsqueeze(1) << 16) + torch.arange(1 << 16)
    return patterns.flatten().to(torch.int32).view(torch.float32)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal patterns; any NaN is like any other."""
    nan = torch.isnan(a) & torch.isnan(b)
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.element_size()]
    return a.dtype == b.dtype and bool(((a.view(whole) == b.view(whole)) | nan).all())


def test_remainders_hold_every_master() -> None:
    master = extreme_masters()
    params, remainder = reference.split(master)
    assert same_bits(reference.join(params, remainder), master)
    assert torch.equal(params.isnan(), master.isnan())
    usual = master.bfloat16()
    low = master.view(torch.int32) & 0xFFFF
    tie = (low == 0x8000) & ((master.view(torch.int32) >> 16) & 1 == 0) & master.isfinite()
    assert same_bits(params[~tie], usual[~tie])
    assert torch.equal(params.view(torch.int16)[tie], usual.view(torch.int16)[tie] + 1)
    assert (params.isfinite() == usual.isfinite()).all()


def test_remainders_of_any_shape() -> None:
    master = random(6, 10).t()[1:, :3]
    params, remainder = reference.split(master)
    assert params.shape == remainder.shape == master.shape
    assert torch.equal(reference.join(params, remainder), master)


def keeps_masters(master: Tensor, backend: str) -> None:
    """A step that changes nothing keeps every bit, but for those that a back-end may flush or whose sign is lost."""
    master = master[master.isnan() | (master.abs() >= 2**-126)]
    params, remainder = reference.split(master)
    zeros = torch.zeros_like(master)
    options = {**SETTINGS, "weight_decay": 0.0, **scalars(1)}
    with mk.use_backend(backend):
        mk.adamw_(params, None, zeros.clone(), zeros.clone(), zeros, remainder=remainder, **options)
    assert same_bits(reference.join(params, remainder), master)
    assert same_bits(params, reference.split(master)[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_that_changes_nothing_keeps_every_master(backend: str) -> None:
    keeps_masters(extreme_masters(), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [1, 7, 64, 100_003])
def test_remainders_are_updated_as_masters_are(size: int, backend: str) -> None:
    """Three steps of each, from masters of which many are ties: the same bits."""
    master = random(size).view(torch.int32)
    master[::3] = master[::3] & ~0xFFFF | 0x8000
    master = master.view(torch.float32)
    params, remainder = reference.split(master)
    usual, (m, v) = master.bfloat16(), (torch.zeros(size), torch.zeros(size))
    moments = m.clone(), v.clone()
    with mk.use_backend(backend):
        for step in range(1, 4):
            grads, options = random(size, seed=step, scale=0.1), {**SETTINGS, **scalars(step, clip=0.25)}
            mk.adamw_(usual, master, m, v, grads, **options)
            mk.adamw_(params, None, *moments, grads, remainder=remainder, **options)
    assert torch.equal(reference.join(params, remainder), master)
    assert torch.equal(moments[0], m)
    assert torch.equal(moments[1], v)
    assert torch.equal(params, reference.split(master)[0])


def skips(master: Tensor, value: float, backend: str) -> None:
    """A skipped step changes no bit of masters in two parts."""
    params, remainder = reference.split(master)
    state = [params, remainder, torch.zeros(len(params)), torch.zeros(len(params))]
    before = [t.clone() for t in state]
    grads = torch.full((len(params),), value)
    with mk.use_backend(backend):
        mk.adamw_(params, None, *state[2:], grads, remainder=remainder, **SETTINGS, **scalars(1, skip=True))
    for old, new in zip(before, state, strict=True):
        assert torch.equal(old.view(torch.uint8), new.view(torch.uint8))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [torch.nan, 1.0])
def test_a_skipped_step_changes_no_bit_of_a_remainder(value: float, backend: str) -> None:
    skips(extreme_masters()[::4097], value, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_master_that_becomes_nan_stays_nan(backend: str) -> None:
    """Whatever its payload: the last one's is all ones, which rounded as a number would be -0."""
    params, remainder = reference.split(torch.tensor([1.0, 1.0, 1.0, -0.0]))
    remainder[3] = -1
    moments = torch.zeros(4), torch.zeros(4)
    grads = torch.tensor([torch.nan, torch.inf, 0.0, 0.0])
    with mk.use_backend(backend):
        mk.adamw_(params, None, *moments, grads, remainder=remainder, **SETTINGS, **scalars(1))
    found = reference.join(params, remainder)
    for tensor in (params, found):
        assert tensor.isnan().tolist() == [True, True, False, True]


def stochastic_buffers(size: int) -> list[Any]:
    return [random(size).bfloat16(), None, torch.zeros(size), torch.zeros(size)]


def round_like_the_docstring(x: float, index: int, seed: int, step: int) -> int:
    """The bf16 pattern that stochastic rounding of a finite x gives, in Python integers."""
    word = 2**32

    def mix(h: int) -> int:
        h = (h ^ (h >> 16)) * 0x7FEB352D % word
        h = (h ^ (h >> 15)) * 0x846CA68B % word
        return h ^ (h >> 16)

    key = mix((seed + 0x9E3779B9) % word)
    for part in (seed // word, step, step // word):
        key = mix((key + part) % word)
    inner = mix((key + index // word) % word)
    bits = mix((mix((index % word) ^ inner) + inner) % word) >> 16
    return (int.from_bytes(struct.pack("<f", x), "little") + bits) >> 16


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [1, 7, 64, 1001])
@pytest.mark.parametrize(("seed", "step"), [(0, 1), (2**40 + 17, 3), (-5, 2**33 + 1)])
def test_stochastic_rounding_takes_the_bits_of_the_hash(
    size: int, seed: int, step: int, backend: str
) -> None:
    """With a learning rate of 0 the parameters stay; with a tiny one the expected pattern is computed here."""
    params, _, *moments = stochastic_buffers(size)
    before, grads = params.float(), random(size, seed=1)
    values = {**scalars(step, lr=1e-4), "step": torch.tensor(step, dtype=torch.int64)}
    wide = [before.clone(), before.clone(), *(m.clone() for m in moments)]
    with mk.use_backend(backend):
        mk.adamw_(*wide, grads, **SETTINGS, **values)
        mk.adamw_(params, None, *moments, grads, **SETTINGS, **values, seed=torch.tensor(seed))
    expected = [round_like_the_docstring(x, i, seed, step) for i, x in enumerate(wide[1].tolist())]
    assert (params.view(torch.int16).long() & 0xFFFF).tolist() == expected
    assert torch.equal(moments[0], wide[2])
    assert torch.equal(moments[1], wide[3])


@pytest.mark.parametrize("backend", BACKENDS)
def test_stochastic_rounding_keeps_small_updates_on_average(backend: str) -> None:
    """1 - 1e-3, a quarter of the spacing below 1, 64 times: plain rounding would stay at 1."""
    size = 20_000
    params = torch.ones(size, dtype=torch.bfloat16)
    moments, grads = (torch.zeros(size), torch.zeros(size)), torch.ones(size)
    with mk.use_backend(backend):
        for step in range(1, 65):
            mk.adamw_(
                params, None, *moments, grads, beta1=0.0, beta2=0.0, eps=0.0, weight_decay=0.0,
                **scalars(step, lr=1e-3), seed=torch.tensor(7),
            )  # fmt: skip
    # Each step adds a variance below 1e-3 * 2^-8 (spacing 2^-8 in [0.5, 1)); the mean of 20,000 has 4e-6 of deviation.
    assert abs(float(params.double().mean()) - (1 - 64e-3)) < 5 * 64**0.5 * (1e-3 * 2**-8 / size) ** 0.5
    assert 0.001 < float(params.double().std()) < 0.03


@pytest.mark.parametrize("backend", BACKENDS)
def test_stochastic_rounding_of_the_extremes(backend: str) -> None:
    """NaN stays NaN, infinities stay, and what bf16 holds exactly is not moved."""
    params = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1.5, 2**-133, 3.3895e38]).bfloat16()
    before, zeros = params.clone(), torch.zeros(8)
    options = {**SETTINGS, "weight_decay": 0.0}
    with mk.use_backend(backend):
        mk.adamw_(
            params, None, zeros.clone(), zeros.clone(), zeros, **options, **scalars(1), seed=torch.tensor(1)
        )
    assert torch.isnan(params[0])
    assert torch.equal(params[1:], before[1:])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [torch.nan, 1.0])
def test_a_skipped_stochastic_step_changes_no_bit(value: float, backend: str) -> None:
    params, _, *moments = stochastic_buffers(100)
    before = [t.clone() for t in (params, *moments)]
    grads = torch.full((100,), value)
    with mk.use_backend(backend):
        mk.adamw_(params, None, *moments, grads, **SETTINGS, **scalars(1, skip=True), seed=torch.tensor(1))
    assert all(torch.equal(a, b) for a, b in zip(before, (params, *moments), strict=True))


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
    with pytest.raises(ValueError, match=r"master and seed given: pass a master, its remainder, or a seed"):
        mk.adamw_(*state, grads, **SETTINGS, **scalars(1), seed=torch.tensor(1))
    with pytest.raises(ValueError, match=r"nothing given: pass a master, its remainder, or a seed"):
        mk.adamw_(state[0], None, *state[2:], grads, **SETTINGS, **scalars(1))
    with pytest.raises(
        ValueError, match=r"params has dtype torch.float32: a seed instead of a master is for bfloat16"
    ):
        mk.adamw_(state[1], None, *state[2:], grads, **SETTINGS, **scalars(1), seed=torch.tensor(1))
    low = torch.zeros(10, dtype=torch.int16)
    with pytest.raises(
        ValueError, match=r"master and remainder given: pass a master, its remainder, or a seed"
    ):
        mk.adamw_(*state, grads, **SETTINGS, **scalars(1), remainder=low)
    with pytest.raises(
        ValueError, match=r"params has dtype torch.float32: a remainder instead of a master is for bfloat16"
    ):
        mk.adamw_(state[1], None, *state[2:], grads, **SETTINGS, **scalars(1), remainder=low)
    with pytest.raises(ValueError, match=r"remainder has dtype torch.int32: remainders are int16"):
        mk.adamw_(state[0], None, *state[2:], grads, **SETTINGS, **scalars(1), remainder=low.int())
    with pytest.raises(ValueError, match=r"seed has dtype torch.int32: pass a 0-dim int64 tensor"):
        mk.adamw_(state[0], None, *state[2:], grads, **SETTINGS, **scalars(1), seed=torch.tensor(1).int())
