"""Drop-in modules against torch's."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from megalite_kernels import backend
from megalite_kernels import nn as fused


def x(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu(approximate):
    module = fused.GELU(approximate)
    assert repr(module) == repr(nn.GELU(approximate))
    assert torch.allclose(module(x(3, 8)), nn.GELU(approximate)(x(3, 8)), atol=1e-6)


@pytest.mark.parametrize(
    ("module", "activation"),
    [(fused.SwiGLU(8, 12, bias=True), F.silu), (fused.GEGLU(8, 12), lambda g: F.gelu(g, approximate="tanh"))],
    ids=["swiglu", "geglu"],
)
def test_gated_mlps(module, activation):
    gate, up = module.gate_up(x(3, 8)).chunk(2, -1)
    assert torch.allclose(module(x(3, 8)), module.down(activation(gate) * up), atol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
def test_linear(bias):
    module, plain = fused.Linear(8, 5, bias=bias), nn.Linear(8, 5, bias=bias)
    plain.load_state_dict(module.state_dict())
    assert repr(module) == repr(plain)
    with backend.recording() as ran:
        assert torch.equal(module(x(3, 8)), plain(x(3, 8)))
    assert [choice.op for choice in ran] == ["linear_fwd"]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (fused.LayerNorm(8), nn.LayerNorm(8)),
        (fused.LayerNorm(8, bias=False), nn.LayerNorm(8, bias=False)),
        (fused.RMSNorm(8), nn.RMSNorm(8, eps=1e-6)),
    ],
    ids=["layer_norm", "layer_norm without bias", "rms_norm"],
)
def test_norms_take_torchs_weights(ours, theirs):
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(x(8))
    ours.load_state_dict(theirs.state_dict())
    assert torch.allclose(ours(x(3, 8)), theirs(x(3, 8)), atol=1e-6)
    y, residual = ours(x(3, 8), x(3, 8))
    assert torch.allclose(y, theirs(2 * x(3, 8)), atol=1e-6)
    assert torch.equal(residual, 2 * x(3, 8))


def test_linear_cross_entropy():
    head = fused.LinearCrossEntropy(8, 11, softcap=5.0, reduction="sum")
    target = torch.arange(3)
    expected = F.cross_entropy(5 * torch.tanh(x(3, 8) @ head.weight.T / 5), target, reduction="sum")
    assert head(x(3, 8), target).item() == pytest.approx(expected.item(), rel=1e-5)
    assert list(head.state_dict()) == list(nn.Linear(8, 11, bias=False).state_dict())
