"""The blocks of a transformer, and which of them one process holds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from megalite.config import ModelConfig
from megalite.layers.attention import Attention
from megalite.layers.block import Block
from megalite.layers.mlp import MLP, GatedMLP
from megalite.layers.norm import NORMS
from megalite.parallel.tensor import TensorSplit


@dataclass(frozen=True, slots=True)
class ModelPart:
    """What one process holds of a model that pipeline parallelism divides."""

    layers: tuple[int, ...]
    """Numbers of its blocks in the whole model, ascending."""
    embedding: bool = True
    """It holds the token (and position) embedding."""
    head: bool = True
    """It holds the final norm and the output head."""


class Blocks(nn.ModuleDict):
    """Blocks by their number in the whole model, which their canonical names contain."""

    def __init__(self, blocks: Mapping[int, Block]) -> None:
        super().__init__({str(number): block for number, block in blocks.items()})

    def __getitem__(self, number: int | str) -> Block:
        block = super().__getitem__(str(number))
        assert isinstance(block, Block)
        return block


def build_block(config: ModelConfig, layer: int, split: TensorSplit, **factory: Any) -> Block:
    """Block number `layer` of the model that `config` describes."""
    hidden, std = config.hidden_size, config.init_std
    # Each block adds two branches to the residual stream; scaled down, the stream's variance at the top
    # does not grow with depth (GPT-2).
    output_std = std / math.sqrt(2 * config.num_layers)
    norm = NORMS[config.norm]
    attention = Attention(
        hidden,
        split,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.size_per_head,
        window=config.window_of_layer(layer),
        qkv_bias=config.qkv_bias,
        output_bias=config.output_bias,
        qk_norm_eps=config.norm_eps if config.qk_norm else None,
        std=std,
        output_std=output_std,
        **factory,
    )
    mlp = (GatedMLP if config.gated else MLP)(
        hidden,
        config.ffn_hidden_size,
        split,
        activation=config.activation,
        bias=config.mlp_bias,
        std=std,
        down_std=output_std,
        **factory,
    )
    eps = config.norm_eps
    return Block(norm(hidden, eps, split, **factory), attention, norm(hidden, eps, split, **factory), mlp)
