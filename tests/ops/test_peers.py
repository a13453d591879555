"""Our attention against flash-attn's own reference, where that package is installed.

Its pure Python part is enough: FLASH_ATTENTION_FORCE_BUILD=TRUE FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE pip install
--no-deps --no-build-isolation flash-attn==2.8.3 einops (a `--target` folder on PYTHONPATH does too).
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import megalite_kernels as mk
from tests.ops.catalogue import BACKENDS, DTYPES, check, random

SPEC = importlib.util.find_spec("flash_attn")
pytestmark = pytest.mark.skipif(
    SPEC is None or importlib.util.find_spec("einops") is None,
    reason="flash-attn (its pure Python part is enough) or einops is not installed",
)


@pytest.fixture
def attention_ref(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """flash-attn's reference, imported past the package's own import of its CUDA library."""
    assert SPEC is not None
    package = ModuleType("flash_attn")
    package.__path__ = list(SPEC.submodule_search_locations or [])
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    found: Callable[..., Any] = importlib.import_module("flash_attn.utils.testing").attention_ref
    return found


CASES = [
    pytest.param({}, {}, id="causal"),
    pytest.param({"causal": False}, {"causal": False}, id="full"),
    pytest.param({"window": 9}, {"window_size": (8, 0)}, id="window"),
    pytest.param({"causal": False, "window": 6}, {"causal": False, "window_size": (5, 5)}, id="both_ways"),
    pytest.param({"softcap": 1.5}, {"softcap": 1.5}, id="softcap"),
    pytest.param(
        {"softcap": 2.0, "window": 12}, {"softcap": 2.0, "window_size": (11, 0)}, id="softcap_window"
    ),
]
LENGTHS = [(37, 37), (5, 41)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "keys"), LENGTHS)
@pytest.mark.parametrize(("ours", "theirs"), CASES)
def test_attention_agrees_with_flash_attns_reference(
    attention_ref: Callable[..., Any],
    ours: dict[str, Any],
    theirs: dict[str, Any],
    rows: int,
    keys: int,
    dtype: torch.dtype,
    backend: str,
) -> None:
    """Output and gradients, with four query heads to two of keys; lengths that differ end together."""

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = attention_ref(q, k, v, **{"causal": True, **theirs}, upcast=False)[0]
        return out

    inputs = [random(2, rows, 4, 16), random(2, keys, 2, 16, seed=1), random(2, keys, 2, 16, seed=2)]
    check(
        lambda q, k, v: mk.attention(q, k, v, **ours),
        plain,
        inputs,
        dtype=dtype,
        backend=backend,
        floor=2,
        magnitude=4.0,  # dq and dk are differences of sums of 16 products
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_sinks_agree_with_flash_attns_reference(attention_ref: Callable[..., Any], backend: str) -> None:
    """Output and gradients; theirs does the softmax in float32 whatever it gets, so there is no better truth."""
    shapes = [(2, 23, 4, 16), (2, 23, 2, 16), (2, 23, 2, 16), (4,)]
    leaves = [random(*shape, seed=seed).requires_grad_() for seed, shape in enumerate(shapes)]
    dout = random(2, 23, 4, 16, seed=9)

    def run(function: Callable[..., Tensor]) -> list[Tensor]:
        out = function(*leaves)
        return [out, *torch.autograd.grad(out, leaves, dout)]

    with mk.use_backend(backend):
        ours = run(lambda q, k, v, sinks: mk.attention(q, k, v, sinks=sinks))  # type: ignore[arg-type,return-value]
    right = run(
        lambda q, k, v, sinks: attention_ref(q, k, v, causal=True, learnable_sink=sinks, upcast=False)[0]
    )
    for a, b in zip(ours, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
