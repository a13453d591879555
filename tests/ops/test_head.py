"""The fused loss head over several blocks of classes and chunks of tokens, which its other tests are too small for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import megalite_kernels as mk
from megalite_kernels.reference import linear_cross_entropy as plan
from tests.ops.catalogue import BACKENDS, check, needs_native, random

PLAIN: dict[str, Any] = {}
ALL = {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 4.0}


def classes_at_the_edges(tokens: int, classes: int) -> Tensor:
    """Targets in each 32 classes, at their first and last; every seventh token has none."""
    target = (torch.arange(tokens) * 31) % classes
    target[3], target[-1] = classes - 1, 0
    target[::7] = -100
    return target


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [PLAIN, ALL])
@pytest.mark.parametrize(
    ("tokens", "classes", "features"),
    [(75, 97, 40), (545, 70, 24), (33, 600, 512)],
    ids=["several chunks", "several groups of tokens", "several blocks of classes"],
)
def test_accuracy_of_a_head(
    tokens: int,
    classes: int,
    features: int,
    options: dict[str, Any],
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if tokens < 512:
        monkeypatch.setattr(plan, "CPU_LIMITS", plan.ChunkLimits(32, 1, 32))
    target = classes_at_the_edges(tokens, classes)
    inputs = [
        random(tokens, features),
        random(classes, features, seed=1, scale=features**-0.5),
        random(classes, seed=2),
    ]

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return mk.linear_cross_entropy(x, weight, target, bias=bias, reduction="sum", **options)

    def torch_loss(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        logits = F.linear(x, weight, bias).to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        if options:
            logits = options["softcap"] * torch.tanh(logits / options["softcap"])
        lse = torch.logsumexp(logits, -1)
        smoothing = options.get("label_smoothing", 0.0)
        loss = F.cross_entropy(logits, target, reduction="sum", label_smoothing=smoothing)
        return loss + options.get("z_loss", 0.0) * ((target >= 0) * lse * lse).sum()

    check(ours, torch_loss, inputs, dtype=torch.bfloat16, backend=backend, floor=4, magnitude=1.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("add", [False, True])
def test_accuracy_where_chunks_add_to_one_gradient(
    add: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "CPU_LIMITS", plan.ChunkLimits(32, 1, 32))
    x, weight = random(100, 48).bfloat16(), random(90, 48, seed=1, scale=0.2).bfloat16()
    weight[80:] = torch.nan  # padding
    target, main_grad = classes_at_the_edges(100, 80), random(90, 48, seed=3)
    before = main_grad.clone() if add else torch.zeros(90, 48)
    valid = weight[:80].double().requires_grad_()
    (F.cross_entropy(x.double() @ valid.t(), target, reduction="sum") * 0.25).backward()
    assert valid.grad is not None
    with mk.use_backend(backend):
        torch.ops.megalite.linear_cross_entropy_grad_(
            x, weight, None, target, torch.tensor(0.25), main_grad, add, 80, -100, 0.0, 0.0, 0.0
        )
    found = (main_grad - before).double()
    assert torch.equal(found[80:], torch.zeros(10, 48))
    # dlogits are rounded to bf16, by 2^-9 at most.
    assert (found[:80] - valid.grad).norm() < 0.003 * valid.grad.norm()


@needs_native
def test_two_threads_repeat_bits_over_several_blocks() -> None:
    """Each thread has several blocks of classes, and the parts of dx are added in their order."""
    x, weight = random(545, 512).bfloat16(), random(1100, 512, seed=1, scale=0.05).bfloat16()
    target = classes_at_the_edges(545, 1100)

    def run() -> list[Tensor]:
        with mk.use_backend("cpu"):
            args = (x, weight, None, target, torch.tensor(1.0), 1100, -100, 0.0, 0.0, 0.0)
            return list(torch.ops.megalite.linear_cross_entropy_grad(*args))

    before = torch.get_num_threads()
    one = run()
    torch.set_num_threads(2)
    try:
        first = run()
        assert all(torch.equal(a, b) for _ in range(3) for a, b in zip(first, run(), strict=True))
    finally:
        torch.set_num_threads(before)
    for found, expected in zip(first, one, strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_accuracy_with_an_ignored_token_of_huge_logits(backend: str) -> None:
    """exp of its logits is infinite: its gradient is 0 because it is ignored, not because it is multiplied by 0."""
    x, weight = random(40, 32).bfloat16(), random(50, 32, seed=1).bfloat16()
    x[5] *= 1e3
    target = classes_at_the_edges(40, 50)
    target[5] = -100
    with mk.use_backend(backend):
        args = (x, weight, None, target, torch.tensor(1.0), 50, -100, 0.0, 0.0, 0.0)
        _, dx, dweight, _ = torch.ops.megalite.linear_cross_entropy_grad(*args)
    assert torch.equal(dx[5], torch.zeros(32, dtype=dx.dtype))
    assert dx.isfinite().all()
    assert dweight.isfinite().all()
