"""Our kernels and Liger's, both interpreted, from the same inputs: outputs and gradients, where Liger is installed.

`pip install --no-deps liger-kernel==0.8.5` is enough (a `--target` folder on PYTHONPATH does too).
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import megalite_kernels as mk
from megalite_kernels.testing import assert_as_accurate, results_and_grads
from tests.ops.catalogue import random

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("liger_kernel") is None, reason="liger-kernel is not installed"
)


@pytest.fixture(autouse=True)
def scalars_are_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Liger's kernels convert float arguments with `.to`, as compiled code allows; the interpreter passes floats."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt

    def wide(argument: Any) -> Any:
        if isinstance(argument, float):
            handle = interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32)
            return tl.tensor(handle, tl.float32)
        return convert(argument)

    monkeypatch.setattr(interpreter, "_implicit_cvt", wide)


def liger(module: str, function: str) -> Callable[..., Any]:
    """An autograd function of Liger's."""
    found = getattr(importlib.import_module(f"liger_kernel.ops.{module}"), function)
    return found.apply  # type: ignore[no-any-return]


def compare(
    ours: Callable[..., Any], theirs: Callable[..., Any], plain: Callable[..., Any], inputs: list[Tensor]
) -> None:
    """Each is as near to float64 as plain torch in float32 is, ours within twice torch's error, Liger's within four."""
    truth = results_and_grads(plain, inputs, dtype=torch.float64)
    torchs = results_and_grads(plain, inputs, dtype=torch.float32)
    mine = results_and_grads(ours, inputs, dtype=torch.float32, backend="triton")
    other = results_and_grads(theirs, [x.clone() for x in inputs], dtype=torch.float32)
    for a, b, c, d in zip(mine, other, torchs, truth, strict=True):
        assert_as_accurate(a, c, d, floor=2, name="ours")
        assert_as_accurate(b, c, d, factor=4, floor=8, name="Liger's")


def test_rms_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton.language as tl

    apply = liger("rms_norm", "LigerRMSNormFunction")
    # Theirs is the CUDA library's, which the interpreter lacks; tl's is looked up late, when that has replaced it.
    monkeypatch.setattr("liger_kernel.ops.rms_norm.rsqrt", lambda x: tl.rsqrt(x))  # noqa: PLW0108
    compare(
        lambda x, w: mk.rms_norm(x, w, 1e-6),
        lambda x, w: apply(x, w, 1e-6, 0.0, "llama", False),
        lambda x, w: F.rms_norm(x, w.shape, w, 1e-6),
        [random(13, 72), random(72, seed=1)],
    )


def test_swiglu() -> None:
    apply = liger("swiglu", "LigerSiLUMulFunction")
    compare(
        mk.swiglu,
        lambda gate, up: apply(gate * 1, up * 1),  # it writes its gradients over what it is given
        lambda gate, up: F.silu(gate) * up,
        [random(9, 50, scale=2), random(9, 50, seed=1)],
    )


def targets(rows: int, classes: int) -> Tensor:
    target = torch.arange(rows) * 7 % classes
    target[1] = -100
    return target


def test_cross_entropy() -> None:
    apply, target = liger("cross_entropy", "LigerCrossEntropyFunction"), targets(7, 131)
    compare(
        lambda x: mk.cross_entropy(x, target, label_smoothing=0.1, z_loss=1e-3),
        lambda x: apply(x * 1, target, None, -100, 1e-3, 0.1, "mean", None, False)[0],
        lambda x: (
            F.cross_entropy(x, target, label_smoothing=0.1)
            + 1e-3 * x.logsumexp(-1).square()[target >= 0].sum() / (target >= 0).sum()
        ),
        [random(7, 131, scale=3)],
    )


def test_linear_cross_entropy() -> None:
    apply, target = (
        liger("fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction"),
        targets(9, 67),
    )
    compare(
        lambda x, w: mk.linear_cross_entropy(x, w, target),
        lambda x, w: apply(x, w, target)[0],
        lambda x, w: F.cross_entropy(F.linear(x, w), target),
        [random(9, 24), random(67, 24, seed=1, scale=0.2)],
    )
