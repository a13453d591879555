"""The feed-forward half of a block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor, nn

import megalite_kernels as kernels
from megalite.layers.linear import ColumnParallelLinear, RowParallelLinear
from megalite.layers.recompute import made_again, run_marked
from megalite.parallel.handover import Handover
from megalite.parallel.tensor import UNSPLIT, Shard, TensorSplit
from megalite_kernels.ops import fp8_activation
from megalite_kernels.ops.quantized import Operand, tensors_of

Activation = Literal["swiglu", "geglu", "gelu_tanh", "relu2"]

_GATED: dict[str, Callable[..., Tensor]] = {"swiglu": kernels.swiglu, "geglu": kernels.geglu}
_PLAIN: dict[str, Callable[..., Tensor]] = {"gelu_tanh": kernels.gelu, "relu2": kernels.relu_squared}
_QUANTIZING: dict[str, fp8_activation.Activation] = {
    "swiglu": "swiglu",
    "geglu": "geglu",
    "gelu_tanh": "gelu",
    "relu2": "relu_squared",
}


class ActivationFunction:
    """What `down_proj` reads, of what the projection before it gives."""

    def __init__(self, name: Activation) -> None:
        self.plain = (_GATED | _PLAIN)[name]
        self.quantizing = _QUANTIZING[name]
        self.quantizes = False
        """As of a norm: it comes quantised too."""

    def __call__(self, inner: Tensor, given: Handover | None = None) -> Operand:
        """`given` is brought the result again by the backward pass."""
        if self.quantizes:
            return kernels.fp8_activation(inner, self.quantizing)
        # Between two products nobody else has the gradient, or `inner`, which no product keeps.
        return self.plain(inner, again=None if given is None else given.bring, in_place=given is not None)


def _down(
    activation: ActivationFunction,
    inner: Tensor,
    down_proj: RowParallelLinear,
    split: TensorSplit | None,
    again: bool,
) -> Tensor:
    """down_proj(activation(inner)); with `again` the product does not keep what it reads.

    The activation's own backward pass makes that again where the product takes a handover, else a pass for itself.
    """
    given = down_proj.handover(split) if again else None
    if given is not None:
        return down_proj(activation(inner, given), split, given)
    active = run_marked(again, activation, inner)
    with made_again(again, tensors_of(active), lambda: tensors_of(activation(inner))):
        return down_proj(active, split)


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)), gate and up in one matrix product.

    Source: Shazeer, arXiv 2002.05202.
    """

    feeds_projections = ("activation",)

    def __init__(
        self,
        hidden_size: int,
        ffn_hidden_size: int,
        split: TensorSplit = UNSPLIT,
        *,
        activation: Activation,
        bias: bool,
        std: float,
        down_std: float,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.activation = ActivationFunction(activation)
        shard = Shard.even(ffn_hidden_size, split.axis)
        gate_up = {"gate_proj": shard, "up_proj": shard}
        self.gate_up_proj = ColumnParallelLinear(hidden_size, gate_up, split, bias=bias, std=std, **factory)
        self.down_proj = RowParallelLinear(
            shard, hidden_size, split, name="down_proj", bias=bias, std=down_std, **factory
        )

    @property
    def first(self) -> ColumnParallelLinear:
        """The projection that reads the layer's input."""
        return self.gate_up_proj

    def forward(
        self,
        x: Operand,
        split: TensorSplit | None = None,
        again: bool = False,
        given: Handover | None = None,
    ) -> Tensor:
        """[..., H] → [..., H]; `split` says how the tokens lie, by default as the layer was made.

        With `again` the backward pass makes the activation's output again, on CPUs over what the first product gave:
        who keeps that, by a hook for instance, has to copy it. `given` brings x again.
        """
        inner = self.gate_up_proj(x, split, given)
        return _down(self.activation, inner, self.down_proj, split, again)


class MLP(nn.Module):
    """down(act(up(x)))."""

    feeds_projections = ("activation",)

    def __init__(
        self,
        hidden_size: int,
        ffn_hidden_size: int,
        split: TensorSplit = UNSPLIT,
        *,
        activation: Activation,
        bias: bool,
        std: float,
        down_std: float,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.activation = ActivationFunction(activation)
        shard = Shard.even(ffn_hidden_size, split.axis)
        self.up_proj = ColumnParallelLinear(
            hidden_size, {"up_proj": shard}, split, bias=bias, std=std, **factory
        )
        self.down_proj = RowParallelLinear(
            shard, hidden_size, split, name="down_proj", bias=bias, std=down_std, **factory
        )

    @property
    def first(self) -> ColumnParallelLinear:
        """The projection that reads the layer's input."""
        return self.up_proj

    def forward(
        self,
        x: Operand,
        split: TensorSplit | None = None,
        again: bool = False,
        given: Handover | None = None,
    ) -> Tensor:
        """[..., H] → [..., H]; `split` says how the tokens lie, by default as the layer was made.

        With `again` the backward pass makes the activation's output again, on CPUs over what the first product gave:
        who keeps that, by a hook for instance, has to copy it. `given` brings x again.
        """
        inner = self.up_proj(x, split, given)
        return _down(self.activation, inner, self.down_proj, split, again)
