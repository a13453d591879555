"""The feed-forward half of a block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor, nn

import megalite_kernels as kernels
from megalite.layers.linear import ColumnParallelLinear, RowParallelLinear
from megalite.layers.recompute import made_again, run_marked
from megalite.parallel.tensor import UNSPLIT, Shard, TensorSplit
from megalite_kernels.ops import fp8_activation
from megalite_kernels.ops.quantized import Operand, tensors_of

Activation = Literal["swiglu", "geglu", "gelu_tanh", "relu2"]

_GATED: dict[str, Callable[[Tensor], Tensor]] = {"swiglu": kernels.swiglu, "geglu": kernels.geglu}
_PLAIN: dict[str, Callable[[Tensor], Tensor]] = {"gelu_tanh": kernels.gelu, "relu2": kernels.relu_squared}
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

    def __call__(self, inner: Tensor) -> Operand:
        if self.quantizes:
            return kernels.fp8_activation(inner, self.quantizing)
        return self.plain(inner)


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

    def up(self, x: Operand, split: TensorSplit | None = None) -> Operand:
        """[..., H] → [..., F / tp], what `down_proj` reads."""
        return self.activation(self.gate_up_proj(x, split))

    def forward(self, x: Operand, split: TensorSplit | None = None, again: bool = False) -> Tensor:
        """[..., H] → [..., H]; `split` says how the tokens lie, by default as the layer was made.

        With `again` the backward pass makes the activation's output again.
        """
        inner = self.gate_up_proj(x, split)
        active = run_marked(again, self.activation, inner)
        with made_again(again, tensors_of(active), lambda: tensors_of(self.activation(inner))):
            return self.down_proj(active, split)


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

    def up(self, x: Operand, split: TensorSplit | None = None) -> Operand:
        """[..., H] → [..., F / tp], what `down_proj` reads."""
        return self.activation(self.up_proj(x, split))

    def forward(self, x: Operand, split: TensorSplit | None = None, again: bool = False) -> Tensor:
        """[..., H] → [..., H]; `split` says how the tokens lie, by default as the layer was made.

        With `again` the backward pass makes the activation's output again.
        """
        inner = self.up_proj(x, split)
        active = run_marked(again, self.activation, inner)
        with made_again(again, tensors_of(active), lambda: tensors_of(self.activation(inner))):
            return self.down_proj(active, split)
