"""Logits that are made only when somebody looks at them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megalite_kernels.patching.lazy import LazyLogits


def make(dtype: torch.dtype = torch.float32, bias: bool = False) -> tuple[LazyLogits, Tensor, list[Tensor]]:
    """(lazy, the same as a tensor, leaves)."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(2, 6, 8, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(11, 8, generator=generator).to(dtype).requires_grad_()
    b = torch.randn(11, generator=generator).to(dtype).requires_grad_() if bias else None
    leaves = [hidden, weight] + ([b] if b is not None else [])
    return LazyLogits(hidden, weight, b, dtype), F.linear(hidden, weight, b), leaves


TARGET = torch.tensor([[1, 2, 3, 4, 5, 6], [7, 8, -100, 10, 0, 1]])


def shifted(x: Tensor) -> Tensor:
    return x[..., :-1, :].contiguous().view(-1, 11)


LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "view": lambda x: F.cross_entropy(x.view(-1, 11), TARGET.view(-1)),
    "size": lambda x: F.cross_entropy(x.view(-1, x.size(-1)), TARGET.view(-1)),
    "infer": lambda x: F.cross_entropy(x.view(12, -1), TARGET.view(-1)),
    "flatten": lambda x: F.cross_entropy(x.flatten(0, 1).float(), TARGET.flatten()),
    "shift": lambda x: F.cross_entropy(shifted(x), TARGET[..., 1:].reshape(-1)),
    "slices": lambda x: F.cross_entropy(x[:, 1:].reshape(-1, x.shape[-1]), TARGET[:, 1:].reshape(-1)),
    "sum": lambda x: F.cross_entropy(x.view(-1, 11), TARGET.view(-1), reduction="sum") / 7,
    "none": lambda x: F.cross_entropy(x.view(-1, 11), TARGET.view(-1), reduction="none").sum(),
    "smoothing": lambda x: F.cross_entropy(x.view(-1, 11), TARGET.view(-1), label_smoothing=0.1),
    "ignore": lambda x: F.cross_entropy(x.view(-1, 11), TARGET.view(-1).abs() % 11, ignore_index=1),
    "module": lambda x: torch.nn.CrossEntropyLoss()(x.view(-1, 11), TARGET.view(-1)),
    "softcap": lambda x: F.cross_entropy((torch.tanh(x / 3.0) * 3.0).float().view(-1, 11), TARGET.view(-1)),
    "scaled": lambda x: F.cross_entropy((0.5 * x / 2).view(-1, 11), TARGET.view(-1)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_fused(name):
    lazy, logits, leaves = make()
    expected = LOSSES[name](logits)
    gradients = torch.autograd.grad(expected, leaves)
    seen: list[LazyLogits] = []
    original = LazyLogits.materialize
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LazyLogits, "materialize", lambda self: (seen.append(self), original(self))[1])
        loss = LOSSES[name](lazy)
    assert not seen, "logits were made"
    assert loss.dtype == expected.dtype
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for got, want in zip(torch.autograd.grad(loss, leaves), gradients, strict=True):
        assert torch.allclose(got, want, atol=1e-6)


OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "weights": lambda x: F.cross_entropy(x.view(-1, 11), TARGET.view(-1), weight=torch.arange(11.0)),
    "probabilities": lambda x: F.cross_entropy(x.view(-1, 11), torch.full((12, 11), 1 / 11)),
    "classes second": lambda x: F.cross_entropy(x.transpose(1, 2), TARGET),
    "tanh alone": lambda x: F.cross_entropy(torch.tanh(x).view(-1, 11), TARGET.view(-1)),
    "capped twice": lambda x: F.cross_entropy((torch.tanh(x / 2.0) * 3.0).view(-1, 11), TARGET.view(-1)),
    "log_softmax": lambda x: F.nll_loss(F.log_softmax(x.view(-1, 11), -1), TARGET.view(-1)),
    "index": lambda x: x[0, 1],
    "last": lambda x: x[:, -1, :].argmax(-1).float(),
    "some classes": lambda x: x[..., :3],
    "mask": lambda x: x[TARGET > 3],
    "sum": lambda x: x + 1 - x * torch.ones(11) / torch.tensor(2.0) + (-x) + (2 - x),
    "reshape": lambda x: x.view(2, 66) @ torch.ones(66),
    "cat": lambda x: torch.cat([x, x], -1).sum(-1),
    "method": lambda x: x.softmax(-1),
    "to": lambda x: x.to(torch.float64).mean(),
    "to device": lambda x: x.to("cpu").flatten(),
    "len": lambda x: torch.tensor(float(len(x) + x.dim() + x.ndim)),
    "einsum": lambda x: torch.einsum("bsv->b", x),
}


@pytest.mark.parametrize("name", OTHERS)
def test_any_other_use_is_that_of_the_tensor(name):
    lazy, logits, leaves = make()
    expected, got = OTHERS[name](logits), OTHERS[name](lazy)
    assert got.dtype == expected.dtype
    assert torch.allclose(got, expected, atol=1e-6)
    if expected.requires_grad:
        gradients = torch.autograd.grad(expected.sum(), leaves)
        for mine, theirs in zip(torch.autograd.grad(got.sum(), leaves), gradients, strict=True):
            assert torch.allclose(mine, theirs, atol=1e-6)


def test_a_bias_and_the_dtype_of_the_loss():
    lazy, logits, leaves = make(torch.bfloat16, bias=True)
    expected = F.cross_entropy(logits.view(-1, 11), TARGET.view(-1))
    loss = F.cross_entropy(lazy.view(-1, 11), TARGET.view(-1))
    assert loss.dtype == expected.dtype == torch.bfloat16
    assert loss.item() == pytest.approx(expected.item(), rel=1e-2)
    assert all(g.dtype == torch.bfloat16 for g in torch.autograd.grad(loss, leaves))


def test_it_computes_once_and_says_what_it_is():
    lazy, logits, _ = make()
    assert repr(lazy) == "LazyLogits(shape=[2, 6, 11], dtype=torch.float32, made=False)"
    assert lazy.materialize() is lazy.materialize()
    assert "made=True" in repr(lazy)
    assert (lazy.shape, lazy.dtype, lazy.device) == (logits.shape, logits.dtype, logits.device)
    with pytest.raises(AttributeError):
        _ = lazy._unknown
