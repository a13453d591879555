"""What is recognised by what it computes, and what only looks like it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import megalite_kernels as mk
from megalite_kernels.patching.attention import rotary_layout
from megalite_kernels.patching.masks import is_plain_causal
from tests.patch.models import Gated, has_exact_gelu, hugging_face, randomize, tokens


class Norm(nn.Module):
    """RMSNorm in somebody's own words; the variants below change one thing."""

    def __init__(self, width: int = 16, eps: float | None = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        if eps is not None:
            self.norm_epsilon = eps

    def forward(self, hidden: Tensor) -> Tensor:
        return self.weight * self.normed(hidden)

    def normed(self, hidden: Tensor) -> Tensor:
        eps = getattr(self, "norm_epsilon", 1e-5)
        return hidden * torch.rsqrt(hidden.float().square().mean(-1, keepdim=True) + eps).to(hidden.dtype)


class ZeroCentered(Norm):
    def forward(self, hidden: Tensor) -> Tensor:
        return (1 + self.weight) * self.normed(hidden)


class EpsOutside(Norm):
    def normed(self, hidden: Tensor) -> Tensor:
        return hidden / (hidden.square().mean(-1, keepdim=True).sqrt() + self.norm_epsilon * 1e3)


class WrongEps(Norm):
    def normed(self, hidden: Tensor) -> Tensor:
        return hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 1e-5)


class OverHalf(Norm):
    """Mean over half of the features: the same shapes, the same weight, almost the same numbers at the start."""

    def normed(self, hidden: Tensor) -> Tensor:
        half = hidden[..., : hidden.shape[-1] // 2]
        return hidden * torch.rsqrt(half.square().mean(-1, keepdim=True) + self.norm_epsilon)


class StopGradient(Norm):
    """Forward as RMSNorm, backward not."""

    def normed(self, hidden: Tensor) -> Tensor:
        return hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + self.norm_epsilon).detach()


class L2(Norm):
    def normed(self, hidden: Tensor) -> Tensor:
        return F.normalize(hidden, dim=-1)


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        (Norm(), "rms_norm"),
        (Norm(eps=None), "rms_norm"),  # its eps stands in the code
        (ZeroCentered(), "rms_norm"),
        (nn.RMSNorm(16), "rms_norm"),
        (nn.RMSNorm(16, eps=1e-3), "rms_norm"),
        (nn.LayerNorm(16), "layer_norm"),
        (nn.LayerNorm(16, bias=False), "layer_norm"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else value,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_are_recognised(module, kind, dtype):
    model = randomize(nn.Sequential(module)).to(dtype)
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = model(x)
    report = mk.patch(model)
    assert report.counts() == {kind: 1}, report
    torch.testing.assert_close(
        model(x), expected, rtol=1.6e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5
    )
    mk.unpatch(model)


@pytest.mark.parametrize("variant", [EpsOutside, WrongEps, OverHalf, StopGradient, L2])
def test_planted_modules_are_caught(variant):
    """They look like an RMSNorm and are none: skipped, with the error that gave them away."""
    model = nn.ModuleDict({"real": Norm(), "planted": variant()})
    report = mk.patch(model)
    assert [row.module for row in report.replaced] == ["real"]
    (row,) = report.skipped
    assert row.module == "planted"
    assert "differs by" in row.skipped
    assert "in float32, limit 2e-05" in row.skipped
    assert type(model["planted"]) is variant
    assert row.skipped in str(report)


def test_without_verify_a_wrong_gradient_goes_unnoticed_and_a_wrong_output_does_not():
    assert mk.patch(StopGradient(), verify=False).counts() == {"rms_norm": 1}
    report = mk.patch(nn.Sequential(OverHalf()), verify=False)
    assert not report.replaced
    assert "not checked" in str(mk.patch(Norm(), verify=False))


class Exact(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


class Quick(nn.Module):
    """Named like it, but another function."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class QuickGELU(Quick):
    pass


def test_activations():
    model = nn.Sequential(
        nn.GELU(), nn.GELU("tanh"), Exact(), nn.SiLU(), nn.ReLU(), nn.Dropout(0.1), QuickGELU()
    )
    expected = {"gelu": 3 if has_exact_gelu() else 1}
    report = mk.patch(model)
    assert report.counts() == expected
    assert [row.old for row in report.skipped if "differs" in row.skipped] == ["QuickGELU"]
    mk.unpatch(model)
    assert mk.patch(model, ops=["gelu"]).counts() == {"gelu": 3}  # asked for by name


class Packed(nn.Module):
    """gate and up in one projection, in either order."""

    def __init__(self, up_first: bool, activation: nn.Module) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Linear(16, 48, bias=False), nn.Linear(24, 16, bias=False)
        self.activation_fn, self.up_first = activation, up_first

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.gate_up_proj(x).chunk(2, dim=-1)
        gate, up = (second, first) if self.up_first else (first, second)
        return self.down_proj(up * self.activation_fn(gate))


class Functional(nn.Module):
    """A GPT-2 MLP with its activation in the code."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.proj = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.gelu(self.fc(x), approximate="tanh"))


class Twisted(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.act(self.w1(x)) * self.w3(x) * 1.01)


@pytest.mark.parametrize(
    ("module", "counts"),
    [
        (Gated(16, 24), {"swiglu": 1}),
        (Packed(False, nn.SiLU()), {"swiglu": 1}),
        (Packed(True, nn.SiLU()), {"swiglu": 1}),
        (Packed(True, nn.GELU("tanh")), {"geglu": 1}),
        (Functional(), {"gelu": 1}),
        (Twisted(16, 24), {}),
    ],
    ids=["pair", "packed", "packed up first", "packed geglu", "inline gelu", "no swiglu"],
)
def test_mlps(module, counts):
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
    expected = module(x)
    calls = []
    for child in module.children():
        child.register_forward_hook(lambda child, args, out: calls.append(type(child).__name__))
    assert mk.patch(module).counts() == counts
    calls.clear()
    assert torch.allclose(module(x), expected, atol=1e-6)
    assert calls.count("Linear") == sum(
        isinstance(child, nn.Linear) for child in module.children()
    )  # hooks still fire


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)

    def turn(x: Tensor) -> Tensor:
        return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), -1)

    return q * cos + turn(q) * sin, k * cos + turn(k) * sin


def rotate_pairs(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)

    def turn(x: Tensor) -> Tensor:
        return torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2)

    return q * cos + turn(q) * sin, k * cos + turn(k) * sin


def rotate_back(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return rotate(q, k, cos, -sin)


def test_rotary_layouts_are_told_apart():
    assert rotary_layout(rotate) == (False, True)
    assert rotary_layout(rotate_pairs) == (True, True)
    assert rotary_layout(rotate_back) is None
    assert rotary_layout(lambda q, k, cos, sin: 1 / 0) is None


def causal(rows: int, keys: int, window: int | None = None) -> Tensor:
    position = torch.arange(rows)[:, None] + keys - rows
    seen = torch.arange(keys)[None] <= position
    if window is not None:
        seen &= torch.arange(keys)[None] > position - window
    return seen.expand(2, 1, rows, keys).clone()


def additive(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape).masked_fill_(~mask, torch.finfo(torch.float32).min)


@pytest.mark.parametrize(("rows", "keys"), [(5, 5), (1, 7), (3, 7)])
def test_causal_masks_are_told_from_others(rows, keys):
    for window in (None, 2, 100):
        for form in (causal, lambda *sizes: additive(causal(*sizes))):
            mask = form(rows, keys, window)
            assert is_plain_causal(mask, rows, keys, window)
            assert is_plain_causal(mask, rows, keys, window)  # remembered
            assert not is_plain_causal(mask, rows, keys + 1, window)
            mask[1, 0, rows - 1, keys - 1] = 0 if mask.dtype == torch.bool else -1.0  # padded, or a bias
            assert not is_plain_causal(mask, rows, keys, window)  # although it was asked before
    assert not is_plain_causal(causal(rows, keys, 2), rows, keys, None)
    assert not is_plain_causal(causal(rows, keys).to(torch.int64), rows, keys, None)
    assert not is_plain_causal("no tensor", rows, keys, None)


class Handmade(nn.Module):
    """Attention spelled out: there is no call to replace."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(16, 16), nn.Linear(16, 16)
        self.value, self.out = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.query(x) @ self.key(x).mT).softmax(-1)
        return self.out(weights @ self.value(x))


class MyAttention(Handmade):
    pass


class Grouped(nn.Module):
    """Grouped heads and helper methods; `F` imported as another name."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 32), nn.Linear(16, 16)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (8, 4)).transpose(1, 2).split((4, 2, 2), 1)
        return self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))


def test_attention_of_other_codebases():
    model = nn.ModuleDict({"a": Grouped(), "b": MyAttention()})
    x = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(1))
    expected = model["a"](x)
    report = mk.patch(model)
    assert report.counts() == {"attention": 1}
    assert [(row.module, row.skipped) for row in report.skipped] == [
        ("b", "calls no attention function known here")
    ]
    assert torch.allclose(model["a"](x), expected, atol=1e-6)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("how", ["call", "config"])
def test_attention_weights_that_are_asked_for_are_given(implementation, how):
    model = hugging_face("llama").eval()
    model.set_attn_implementation(implementation)
    ids = tokens()
    asked: dict[str, Any] = {"output_attentions": True} if how == "call" else {}
    if how == "config" and implementation == "eager":
        model.config.output_attentions = True
    expected = model(ids, **asked)
    report = mk.patch(model)
    assert report.counts()["attention"] == 2
    got = model(ids, **asked)
    assert torch.allclose(got.logits, expected.logits, atol=1e-4)
    if implementation == "sdpa":
        assert not got.attentions
        assert not expected.attentions
        return
    assert len(got.attentions) == len(expected.attentions) == 2
    for a, b in zip(got.attentions, expected.attentions, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_another_attention_implementation_is_left_alone():
    model = hugging_face("llama", num_hidden_layers=1)
    model.set_attn_implementation("flex_attention")
    report = mk.patch(model, ops=["attention"])
    assert not report.replaced
    assert "flex_attention" in report.skipped[0].skipped or "can't be called" in report.skipped[0].skipped


def test_ops_are_chosen_by_name():
    model = hugging_face("llama", num_hidden_layers=1)
    assert mk.patch(model, ops="rms_norm").counts() == {"rms_norm": 3}
    assert mk.patch(model, ops=("rope", "swiglu")).counts() == {"rope": 1, "swiglu": 1}
    with pytest.raises(
        ValueError, match="ops has 'norm', which is not known: use 'auto' or some of rms_norm"
    ):
        mk.patch(model, ops=["norm"])


def test_what_cannot_be_compared_is_skipped():
    with torch.device("meta"):
        model: Any = nn.Sequential(nn.LayerNorm(16))
    (row,) = mk.patch(model).skipped
    assert "meta device" in row.skipped
    model = nn.Sequential(nn.LayerNorm(16))
    model[0].forward = lambda x: x
    (row,) = mk.patch(model).skipped
    assert "a forward of its own" in row.skipped


def test_a_fused_op_that_fails_is_named_and_the_module_kept():
    model = nn.Sequential(Norm())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megalite_kernels.patching.norms.rms_norm", lambda *args, **options: 1 / 0)
        (row,) = mk.patch(model, ops="rms_norm").skipped
    assert row.skipped == "the fused op fails (ZeroDivisionError: division by zero)"
    assert type(model[0]) is Norm
