"""Our canonical tensors as Megatron's, and back: names, fused projections, and the parts that ranks return."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from megalite.config import ModelConfig


@dataclass(frozen=True)
class Part:
    """A rank's part of one of Megatron's tensors."""

    name: str
    place: tuple[slice, ...]
    values: Tensor
    """NaN where the rank has nothing to say."""


NAMES = (
    (r"embedding\.", "embedding.word_embeddings."),
    (r"position_embedding\.", "embedding.position_embeddings."),
    (r"final_norm\.", "decoder.final_layernorm."),
    (r"head\.", "output_layer."),
    (r"layers\.(\d+)\.attention_norm\.", r"decoder.layers.\1.input_layernorm."),
    (r"layers\.(\d+)\.mlp_norm\.", r"decoder.layers.\1.pre_mlp_layernorm."),
    (r"layers\.(\d+)\.attention\.([qk])_norm\.", r"decoder.layers.\1.self_attention.\2_layernorm."),
    (r"layers\.(\d+)\.attention\.o_proj\.", r"decoder.layers.\1.self_attention.linear_proj."),
    (r"layers\.(\d+)\.mlp\.down_proj\.", r"decoder.layers.\1.mlp.linear_fc2."),
    (r"layers\.(\d+)\.mlp\.up_proj\.", r"decoder.layers.\1.mlp.linear_fc1."),  # where there is no gate
)
"""Canonical name → Megatron's, of what is not fused."""
FUSED = {
    "self_attention.linear_qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    "mlp.linear_fc1": ("mlp.gate_proj", "mlp.up_proj"),
}
"""Megatron's fused projections → ours."""


def to_megatron(tensors: dict[str, Tensor], config: ModelConfig, tp: int) -> dict[str, Tensor]:
    """Megatron's tensors of the whole model, of which tensor-parallel rank r holds part r of `tp` even ones."""
    rest, found = dict(tensors), {}
    for fused, layer, kind, ours in _fused(config):
        names = [f"layers.{layer}.{name}.{kind}" for name in ours]
        if names[0] in rest:
            parts = _groups([rest.pop(name) for name in names], fused, config, tp)
            found[f"decoder.layers.{layer}.{fused}.{kind}"] = torch.cat(parts, 1).flatten(0, 1)
    for name, tensor in rest.items():
        found[_megatron_name(name)] = tensor
    return found


def from_megatron(tensors: dict[str, Tensor], config: ModelConfig, tp: int) -> dict[str, Tensor]:
    """The inverse of `to_megatron`."""
    rest, found = dict(tensors), {}
    for fused, layer, kind, ours in _fused(config):
        name = f"decoder.layers.{layer}.{fused}.{kind}"
        if name in rest:
            whole, shares = rest.pop(name), _shares(fused, config)
            groups = whole.unflatten(0, (_count(fused, config, tp), -1))
            sizes = [groups.shape[1] * share // sum(shares) for share in shares]
            for own, part in zip(ours, groups.split(sizes, dim=1), strict=True):
                found[f"layers.{layer}.{own}.{kind}"] = part.flatten(0, 1)
    ours_of = {_megatron_name(name): name for name in canonical_names(config) if name not in found}
    return found | {ours_of[name]: tensor for name, tensor in rest.items()}


def canonical_names(config: ModelConfig) -> list[str]:
    """Of every tensor of the model."""
    from megalite.models.families import piece_shapes

    return list(piece_shapes(config))


def put_parts_together(ranks: list[list[Part]]) -> dict[str, Tensor]:
    """Whole tensors from all ranks' parts; where two ranks hold the same, they must agree in every bit."""
    shapes: dict[str, list[int]] = {}
    for part in (part for parts in ranks for part in parts):
        ends = [place.stop for place in part.place]
        shapes[part.name] = [max(a, b) for a, b in zip(shapes.get(part.name, ends), ends, strict=True)]
    whole = {name: torch.full(shape, torch.nan) for name, shape in shapes.items()}
    for part in (part for parts in ranks for part in parts):
        seen = whole[part.name][part.place]
        same = torch.isnan(seen) | torch.isnan(part.values) | (seen == part.values)
        assert same.all(), f"Megatron's ranks differ in {part.name}"
        whole[part.name][part.place] = torch.where(torch.isnan(part.values), seen, part.values)
    for name, tensor in whole.items():
        assert not torch.isnan(tensor).any(), f"no rank of Megatron's has all of {name}"
    return whole


def _fused(config: ModelConfig) -> list[tuple[str, int, str, tuple[str, ...]]]:
    """(Megatron's name in a layer, the layer, weight or bias, our names) of everything that it fuses."""
    fused = {name: ours for name, ours in FUSED.items() if config.gated or name != "mlp.linear_fc1"}
    return [
        (name, layer, kind, ours)
        for name, ours in fused.items()
        for layer in range(config.num_layers)
        for kind in ("weight", "bias")
    ]


def _groups(parts: list[Tensor], fused: str, config: ModelConfig, tp: int) -> list[Tensor]:
    """Each part as [groups, rows of a group, ...]: Megatron interleaves the projections group by group."""
    return [part.unflatten(0, (_count(fused, config, tp), -1)) for part in parts]


def _count(fused: str, config: ModelConfig, tp: int) -> int:
    """Groups: a key head with its query heads; or, of gate and up, one on each tensor-parallel rank."""
    return tp if fused == "mlp.linear_fc1" else config.kv_heads


def _shares(fused: str, config: ModelConfig) -> tuple[int, ...]:
    """Relative sizes of the projections in a group."""
    return (1, 1) if fused == "mlp.linear_fc1" else (config.num_attention_heads // config.kv_heads, 1, 1)


def _megatron_name(name: str) -> str:
    for pattern, theirs in NAMES:
        if re.match(pattern, name):
            return re.sub(pattern, theirs, name, count=1)
    raise KeyError(f"{name} has no counterpart in Megatron")
