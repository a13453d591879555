"""Projections: replaced on CPUs, where the native library multiplies faster, and left alone elsewhere."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import megalite_kernels as mk
from megalite_kernels.patching import linear as rule
from tests.ops.catalogue import needs_native
from tests.patch.models import hugging_face, randomize

pytestmark = needs_native
WIDE = 160
"""Squared, more than LEAST_WEIGHT."""


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Every product is the native library's, on whatever CPU; its sizes, in order."""
    from megalite_kernels.native import linear

    sizes: list[tuple[int, ...]] = []

    def wins(dtype: torch.dtype, *size: int) -> bool:
        sizes.append(size)
        return True

    monkeypatch.setattr(linear, "wins", wins)
    return sizes


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU whose float32 products torch makes faster."""
    from megalite_kernels.native import linear

    monkeypatch.setattr(linear, "wins", lambda *sizes: False)


def module(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float32) -> nn.Module:
    return randomize(nn.Sequential(make())).to(dtype)


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 19, WIDE, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()


def results(model: nn.Module, x: Tensor) -> list[Tensor]:
    y = model(x)
    return [y.detach(), *torch.autograd.grad(y.float().square().sum(), (x, *model.parameters()))]


MAKERS = {
    "bias": lambda: nn.Linear(WIDE, 224),
    "no bias": lambda: nn.Linear(WIDE, 224, bias=False),
    "conv1d": lambda: Conv1D(224, WIDE),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_projections_are_replaced(make, dtype, ours):
    model, x = module(make, dtype), inputs(dtype)
    expected = results(model, x)
    report = mk.patch(model)
    assert report.counts() == {"linear": 1}, report
    ours.clear()
    for mine, their in zip(results(model, x), expected, strict=True):
        rough = 2e-2 if dtype == torch.bfloat16 else 1e-5
        assert mine.dtype == their.dtype
        assert (mine - their).abs().max() <= rough * their.abs().max()
    rows = 2 * 19
    weight = (WIDE, 224) if isinstance(model[0], Conv1D) else (224, WIDE)
    assert ours[:2] == [(rows, 224, WIDE), (rows, WIDE, 224)]  # forward, dgrad
    assert ours[2:] in ([(*weight, rows)], [])  # the weight's, which is not asked for in bf16 with AMX
    assert not mk.patch(model).rows
    assert mk.unpatch(model) == 1
    for mine, their in zip(results(model, x), expected, strict=True):
        assert torch.equal(mine, their)


def test_only_where_the_native_library_is_faster(theirs):
    assert not mk.patch(module(MAKERS["bias"])).rows


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_only_where_the_native_library_is_used(backend, ours):
    """One of them has no product at all."""
    with mk.use_backend(backend):
        assert not mk.patch(module(MAKERS["bias"]), ops="linear").rows


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_what_is_left_alone(ours):
    side = int(rule.LEAST_WEIGHT**0.5)
    assert mk.patch(module(lambda: nn.Linear(side, side))).replaced
    for make in (
        lambda: nn.Linear(side, side - 1),
        lambda: nn.Linear(side, side, device="meta"),
        lambda: nn.Linear(side, side, dtype=torch.float64),
        lambda: Scaled(WIDE, WIDE),
        lambda: nn.MultiheadAttention(WIDE, 4).out_proj,
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(WIDE, WIDE)),
    ):
        report = mk.patch(nn.Sequential(make()))
        assert not report.rows, report


@pytest.mark.parametrize("order", [("auto",), ("linear", "auto"), ("linear_cross_entropy", "linear")])
def test_a_head_that_gives_lazy_logits_stays_one(order, ours):
    model = hugging_face("llama", hidden_size=WIDE, vocab_size=211, tie_word_embeddings=False).train()
    ids = torch.arange(12)[None] % 97
    plain = model(input_ids=ids, labels=ids)
    counts = sum((Counter(mk.patch(model, ops=ops).counts()) for ops in order), Counter())
    # Per layer q and o are wide enough, k and v with half the heads are not, nor is the MLP of 48. A head that gives
    # lazy logits already is not covered up.
    assert counts["linear"] == (4 if order[0] == "linear_cross_entropy" else 5)
    output = model(input_ids=ids, labels=ids)
    assert type(output.logits).__name__ == "LazyLogits"
    assert output.loss.item() == pytest.approx(plain.loss.item(), rel=1e-5)
    torch.testing.assert_close(output.logits.materialize(), plain.logits, rtol=1e-4, atol=1e-5)
    ours.clear()
    torch.testing.assert_close(model.eval()(input_ids=ids).logits, plain.logits, rtol=1e-4, atol=1e-5)
    assert (len(ours) == 5) == (counts["linear"] == 5)  # the head's too
    assert mk.unpatch(model) > 0


def test_under_autocast_it_is_the_original(ours):
    model, x = module(MAKERS["bias"]), inputs()
    expected_weights = mk.patch(model).counts()
    assert expected_weights == {"linear": 1}
    ours.clear()
    with torch.autocast("cpu", torch.bfloat16):
        got = results(model, x)
        mk.unpatch(model)
        expected = results(model, x)
    assert not ours
    for mine, their in zip(got, expected, strict=True):
        assert torch.equal(mine, their)


def test_nested_tensors_go_to_the_original(ours):
    model = module(MAKERS["bias"])
    nested = torch.nested.nested_tensor([torch.ones(3, WIDE), torch.ones(5, WIDE)])
    expected = model(nested)
    assert mk.patch(model).replaced
    for mine, their in zip(model(nested).unbind(), expected.unbind(), strict=True):
        assert torch.equal(mine, their)


def test_the_gradient_of_a_transposed_weight_is_not_copied(ours):
    model, x = module(MAKERS["conv1d"]), inputs()
    mk.patch(model)
    (gradient,) = torch.autograd.grad(model(x).sum(), model[0].weight)
    assert gradient.stride() == model[0].weight.stride()


def test_compiled_in_one_graph(ours):
    model, x = module(MAKERS["bias"]), inputs()
    mk.patch(model)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    for mine, eager in zip(results(compiled, x), results(model, x), strict=True):
        assert torch.equal(mine, eager)


def test_wrong_input_gets_torchs_own_error(ours):
    model = module(MAKERS["bias"])
    mk.patch(model)
    with pytest.raises(RuntimeError, match="dtype"):
        model(inputs(torch.bfloat16))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(inputs()[..., 1:])
