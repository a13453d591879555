"""Products that do not keep their input: it is brought by the backward pass of what made it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import megalite_kernels as kernels
from megalite.layers.linear import ColumnParallelLinear, RowParallelLinear, use_fp8
from megalite.parallel.gradients import GradientSink, WeightQueue, set_sink
from megalite.parallel.handover import Handover
from megalite.parallel.mesh import Axis
from megalite.parallel.tensor import UNSPLIT, Shard, TensorSplit
from tests.helpers.kept import Watch

TOKENS, HIDDEN, OUT = 6, 8, 5


def product(
    kind: str, bias: bool = False, split: TensorSplit = UNSPLIT
) -> ColumnParallelLinear | RowParallelLinear:
    torch.manual_seed(0)
    if kind == "column":
        made = ColumnParallelLinear(HIDDEN, {"y": Shard.whole(OUT)}, split, bias=bias, std=1.0)
    else:
        made = RowParallelLinear(Shard.whole(HIDDEN), OUT, split, name="y", bias=bias, std=1.0)
    for parameter in made.parameters():
        nn.init.normal_(parameter)
    set_sink(made.weight, GradientSink(torch.zeros(OUT, HIDDEN), added=lambda: None))
    return made


def pass_through(
    layer: ColumnParallelLinear | RowParallelLinear, given: Handover | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of the norm's input, the product's weight and its bias; all [..., 2 x 3 tokens]."""
    x = torch.linspace(-2, 3, TOKENS * HIDDEN).view(2, 3, HIDDEN).requires_grad_()
    normed = kernels.rms_norm(x, torch.ones(HIDDEN), again=given and given.bring)
    layer(normed, None, given).square().sum().backward()
    assert x.grad is not None
    return x.grad, layer.weight.grad_sink.main_grad, None if layer.bias is None else layer.bias.grad


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["column", "row"])
def test_same_bits(kind: str, bias: bool) -> None:
    layer, other = product(kind, bias), product(kind, bias)
    given = layer.handover()
    assert given is not None
    brought, kept = pass_through(layer, given), pass_through(other, None)
    assert kept[1].abs().max() > 0
    for one, two in zip(brought, kept, strict=True):
        assert one is two or torch.equal(one, two)


@pytest.mark.parametrize("kind", ["column", "row"])
def test_input_is_not_kept(kind: str) -> None:
    layer, x = product(kind), torch.randn(TOKENS, HIDDEN, requires_grad=True)
    kept = []
    for given in (None, layer.handover()):
        watch = Watch()
        with watch:
            out = layer(kernels.rms_norm(x, torch.ones(HIDDEN), again=given and given.bring), None, given)
        kept.append(watch.alive(out))
    assert kept[0] - kept[1] == TOKENS * HIDDEN * 4


def test_a_queue_still_decides_when() -> None:
    """Between a zero-bubble schedule's I and W passes the brought input waits with the gradient."""
    layer, other = product("column"), product("column")
    sink = layer.weight.grad_sink
    sink.queue = WeightQueue()
    pass_through(layer, layer.handover())
    assert not sink.main_grad.any()
    sink.queue.take()()
    pass_through(other, None)
    assert torch.equal(sink.main_grad, other.weight.grad_sink.main_grad)


def twice(layer: ColumnParallelLinear | RowParallelLinear, given: Handover | None) -> tuple[Tensor, Tensor]:
    """The weight's gradient sum after one and after two backward passes through one graph."""
    x = torch.linspace(-2, 3, TOKENS * HIDDEN).view(TOKENS, HIDDEN).requires_grad_()
    out = (
        layer(kernels.rms_norm(x, torch.ones(HIDDEN), again=given and given.bring), None, given)
        .square()
        .sum()
    )
    out.backward(retain_graph=True)
    once = layer.weight.grad_sink.main_grad.clone()
    out.backward()
    return once, layer.weight.grad_sink.main_grad


def test_two_backward_passes_through_one_graph() -> None:
    """Bit for bit what the kept input gives; not twice the first sum: a product may round onto it."""
    layer, other = product("row"), product("row")
    given = layer.handover()
    assert given is not None
    brought, kept = twice(layer, given), twice(other, None)
    assert torch.equal(brought[0], kept[0])
    assert torch.equal(brought[1], kept[1])
    torch.testing.assert_close(brought[1], 2 * brought[0])


def test_who_cannot_wait() -> None:
    """No sink, no gradients, FP8; and the column-parallel product of a cut layer, which hides its own sum."""
    layer = product("column")
    assert layer.handover() is not None
    with torch.no_grad():
        assert layer.handover() is None
    set_sink(layer.weight, None)
    assert layer.handover() is None
    quantised = nn.ModuleList([product("row")])
    use_fp8(quantised, "rowwise")
    assert quantised[0].handover() is None
    group = object()
    cut = TensorSplit(Axis(2, 0, group))  # type: ignore[arg-type]
    assert product("column").handover(cut) is None
    assert product("row").handover(cut) is not None
