"""The native kernels' exponential and tanh, and rounding to bfloat16, against exact values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import megalite_kernels as mk
from tests.ops.catalogue import needs_native

pytestmark = needs_native


def native(name: str, x: Tensor) -> Tensor:
    from megalite_kernels import _C

    y = torch.empty_like(x)
    getattr(_C, name)(x.data_ptr(), y.data_ptr(), x.numel())
    return y


def isa_name() -> str:
    from megalite_kernels import _C

    return _C.isa_name()


def ulps(got: Tensor, truth: Tensor) -> float:
    """Largest error in units of the spacing of float32 at the truth (at least that of normal numbers)."""
    spacing = torch.exp2(torch.floor(torch.log2(truth.abs().clamp(min=2.0**-126))) - 23)
    return float(((got.double() - truth).abs() / spacing).max())


@pytest.mark.parametrize(
    ("low", "high"),
    [(-87.0, 88.7), (-1.0, 1.0), (-1e-3, 1e-3)],
    ids=["accuracy_wide", "accuracy", "accuracy_small"],
)
def test_exp_is_within_two_ulps(low: float, high: float) -> None:
    x = torch.linspace(low, high, 400_003)
    assert ulps(native("vector_exp", x), x.double().exp()) <= 2.0


def test_exp_at_the_ends() -> None:
    x = torch.tensor([-torch.inf, -1e30, -104.0, -100.0, -88.0, 0.0, 88.72, 89.0, 1e30, torch.inf, torch.nan])
    got, expected = native("vector_exp", x), x.exp()
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=3e-45, equal_nan=True)  # two subnormal steps


def test_tanh_is_within_a_few_ulps() -> None:
    x = torch.cat([torch.linspace(-12, 12, 400_003), torch.logspace(-30, 0, 1000)])
    assert ulps(native("vector_tanh", x), x.double().tanh()) <= 4.0
    ends = torch.tensor([-torch.inf, torch.inf, torch.nan, -0.0])
    torch.testing.assert_close(native("vector_tanh", ends), ends.tanh(), equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_accuracy_is_torchs(dtype: torch.dtype) -> None:
    """An optimizer step of size 0 only rounds. Ties, subnormals, overflow and NaN are among random bits."""
    generator = torch.Generator().manual_seed(0)
    anything = torch.randint(0, 2**32, (100_000,), generator=generator)
    exponents = torch.randint(127 - 27, 127 + 18, (100_000,), generator=generator)  # about the ends of half
    between = torch.arange(2**16) << 16  # bfloat16's numbers; half's lie on every 2^13th pattern
    patterns = [anything, anything & ~(0xFF << 23) | exponents << 23, between + 2**15, between + 2**12]
    bits = torch.cat([*patterns, between - 2**15 + 1, between + 3 * 2**12]) % 2**32
    master = torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32).view(torch.float32)
    params, zeros = torch.zeros(master.numel(), dtype=dtype), torch.zeros(master.numel())
    expected = master.to(dtype)
    mk.adamw_(
        params, master, zeros.clone(), zeros.clone(), zeros, lr=torch.tensor(0.0), beta1=0.9, beta2=0.9, eps=1.0,
        weight_decay=0.0, step=torch.tensor(1), clip_coefficient=torch.tensor(1.0), skip=torch.tensor(False),
    )  # fmt: skip
    known = ~torch.isnan(master)
    assert torch.isnan(params[~known]).all()
    if dtype == torch.bfloat16 and isa_name() in (
        "avx512_bf16",
        "amx",
    ):  # its instruction takes subnormals for zeros
        assert torch.equal(
            params[master.abs() < 2.0**-126], torch.zeros_like(params)[master.abs() < 2.0**-126]
        )
        known &= master.abs() >= 2.0**-126
    assert torch.equal(params[known], expected[known])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_widening_accuracy_is_exact(dtype: torch.dtype) -> None:
    """Every 16-bit pattern comes back from a rotation by nothing, which widens and rounds."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(-1, 1, 64)
    y, _ = mk.rope(x, x, torch.ones(1024, 32), torch.zeros(1024, 32))
    if dtype == torch.bfloat16 and isa_name() in (
        "avx512_bf16",
        "amx",
    ):  # rounding takes subnormals for zeros
        x = torch.where(x.abs() < 2.0**-126, 0, x)
    finite = torch.isfinite(x.view(-1, 2, 32)).all(1, keepdim=True).expand(-1, 2, -1).reshape_as(x)
    assert torch.equal(y[finite], x[finite])
    assert torch.equal(torch.isfinite(y), finite)
