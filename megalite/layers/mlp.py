"""The feed-forward half of a block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor, nn

import megalite_kernels as kernels
from megalite.layers.linear import Linear

Activation = Literal["swiglu", "geglu", "gelu_tanh", "relu2"]

_GATED: dict[str, Callable[[Tensor], Tensor]] = {"swiglu": kernels.swiglu, "geglu": kernels.geglu}
_PLAIN: dict[str, Callable[[Tensor], Tensor]] = {"gelu_tanh": kernels.gelu, "relu2": kernels.relu_squared}


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)), gate and up in one matrix product.

    Source: Shazeer, arXiv 2002.05202.
    """

    def __init__(
        self,
        hidden_size: int,
        ffn_hidden_size: int,
        *,
        activation: Activation,
        bias: bool,
        std: float,
        down_std: float,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.activation = _GATED[activation]
        gate_up = {"gate_proj": ffn_hidden_size, "up_proj": ffn_hidden_size}
        self.gate_up_proj = Linear(hidden_size, gate_up, bias=bias, std=std, split="column", **factory)
        down = {"down_proj": hidden_size}
        self.down_proj = Linear(ffn_hidden_size, down, bias=bias, std=down_std, split="row", **factory)

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] → [..., H]."""
        return self.down_proj(self.activation(self.gate_up_proj(x)))


class MLP(nn.Module):
    """down(act(up(x)))."""

    def __init__(
        self,
        hidden_size: int,
        ffn_hidden_size: int,
        *,
        activation: Activation,
        bias: bool,
        std: float,
        down_std: float,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.activation = _PLAIN[activation]
        up = {"up_proj": ffn_hidden_size}
        self.up_proj = Linear(hidden_size, up, bias=bias, std=std, split="column", **factory)
        down = {"down_proj": hidden_size}
        self.down_proj = Linear(ffn_hidden_size, down, bias=bias, std=down_std, split="row", **factory)

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] → [..., H]."""
        return self.down_proj(self.activation(self.up_proj(x)))
