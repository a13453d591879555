"""Projections: replaced on CPUs, where the native library multiplies faster, and left alone elsewhere."""

from __future__ import annotations

import copy
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
    expected_sizes = [(rows, 224, WIDE), (rows, WIDE, 224)]  # forward, dgrad; bf16 asks for no more
    assert ours == expected_sizes + ([(224, WIDE, rows)] if dtype == torch.float32 else [])
    assert not mk.patch(model).rows
    assert mk.unpatch(model) == 1
    for mine, their in zip(results(model, x), expected, strict=True):
        assert torch.equal(mine, their)


def test_only_where_the_native_library_is_faster(theirs):
    assert not mk.patch(module(MAKERS["bias"])).rows
    # The gradient of a 16-bit weight is always its own.
    assert mk.patch(module(MAKERS["bias"], torch.bfloat16)).counts() == {"linear": 1}
    with mk.use_backend("reference"):
        assert not mk.patch(module(MAKERS["bias"], torch.bfloat16)).rows


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


def test_a_head_that_gives_lazy_logits_stays_one(ours):
    model = hugging_face("llama", hidden_size=WIDE, vocab_size=211, tie_word_embeddings=False).train()
    ids = torch.arange(12)[None] % 97
    expected = model(input_ids=ids, labels=ids).loss.item()
    counts = mk.patch(model).counts()
    # Per layer q and o are wide enough, k and v with half the heads are not, nor is the MLP of 48.
    assert counts["linear"] == 4
    output = model(input_ids=ids, labels=ids)
    assert type(output.logits).__name__ == "LazyLogits"
    assert output.loss.item() == pytest.approx(expected, rel=1e-5)


def test_autocast_gives_what_it_gave(ours):
    model, x = module(MAKERS["bias"]), inputs()
    with torch.autocast("cpu", torch.bfloat16):
        expected = results(model, x)
        mk.patch(model)
        ours.clear()
        got = results(model, x)
    assert len(ours) == 2  # in bf16, by the native library
    for mine, their in zip(got, expected, strict=True):
        assert mine.dtype == their.dtype
        assert (mine - their).abs().max() <= 2e-2 * their.abs().max()


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
