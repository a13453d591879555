"""How each family's tensors are called and laid out in Hugging Face files.

`hf_tensors(config)` lists every tensor of a model's file, and which canonical pieces it is made of. The same
list serves weights, optimizer moments, writing and reading, so a name or a transpose is decided here once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megalite.config import ModelConfig
from megalite.errors import UserError


@dataclass(frozen=True, slots=True)
class Part:
    """One canonical piece inside a Hugging Face tensor."""

    piece: str
    """Canonical name of the whole piece."""
    offset: tuple[int, ...]
    """Where it starts in the Hugging Face tensor."""
    shape: tuple[int, ...]
    """Its shape as it lies there (that is, after the transpose)."""
    transpose: bool = False
    """It lies there transposed."""

    @property
    def index(self) -> tuple[slice, ...]:
        """The block of the Hugging Face tensor that it fills."""
        return tuple(slice(o, o + n) for o, n in zip(self.offset, self.shape, strict=True))


@dataclass(frozen=True, slots=True)
class HfTensor:
    """One tensor of a Hugging Face file."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    def assemble(self, piece: Callable[[str], Tensor]) -> Tensor:
        """Make the tensor from its whole pieces; shares memory with the piece where the layouts agree."""
        tensors = [piece(p.piece).t() if p.transpose else piece(p.piece) for p in self.parts]
        if len(tensors) == 1:
            return tensors[0].contiguous()
        out = torch.empty(self.shape, dtype=tensors[0].dtype, device=tensors[0].device)
        for part, tensor in zip(self.parts, tensors, strict=True):
            out[part.index] = tensor
        return out

    def take_apart(self, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield (canonical name, whole piece), each a view of `tensor`."""
        for part in self.parts:
            block = tensor[part.index]
            yield part.piece, block.t() if part.transpose else block


def hf_tensors(config: ModelConfig) -> list[HfTensor]:
    """Every tensor of the model's file, in the order of the layers.

    Raises:
        UserError: the family has no way to say what the configuration asks for.
    """
    check_family(config)
    shapes = piece_shapes(config)
    if config.family == "gpt2":
        return _gpt2_tensors(config, shapes)
    return [_whole(_LLAMA_NAMES.translate(name), name, shape) for name, shape in shapes.items()]


def piece_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Canonical name → true shape of every piece of the model."""
    hidden, ffn, head = config.hidden_size, config.ffn_hidden_size, config.size_per_head
    queries, keys = config.num_attention_heads * head, config.kv_heads * head
    norm = ("weight", "bias") if config.norm == "layer" else ("weight",)
    projections = [
        ("attention.q_proj", queries, hidden, config.qkv_bias),
        ("attention.k_proj", keys, hidden, config.qkv_bias),
        ("attention.v_proj", keys, hidden, config.qkv_bias),
        ("attention.o_proj", hidden, queries, config.output_bias),
    ]
    mlp = [("mlp.up_proj", ffn, hidden, config.mlp_bias), ("mlp.down_proj", hidden, ffn, config.mlp_bias)]
    if config.gated:
        mlp.insert(0, ("mlp.gate_proj", ffn, hidden, config.mlp_bias))

    shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (config.vocab_size, hidden)}
    if config.position == "learned":
        shapes["position_embedding.weight"] = (config.max_position_embeddings, hidden)
    for i in range(config.num_layers):
        prefix = f"layers.{i}."
        shapes |= {f"{prefix}attention_norm.{x}": (hidden,) for x in norm}
        shapes |= _projection_shapes(prefix, projections)
        if config.qk_norm:
            shapes |= {f"{prefix}attention.{x}_norm.weight": (head,) for x in "qk"}
        shapes |= {f"{prefix}mlp_norm.{x}": (hidden,) for x in norm}
        shapes |= _projection_shapes(prefix, mlp)
    shapes |= {f"final_norm.{x}": (hidden,) for x in norm}
    if not config.tie_word_embeddings:
        shapes["head.weight"] = (config.vocab_size, hidden)
    return shapes


def _projection_shapes(
    prefix: str, projections: list[tuple[str, int, int, bool]]
) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for name, rows, columns, bias in projections:
        shapes[f"{prefix}{name}.weight"] = (rows, columns)
        if bias:
            shapes[f"{prefix}{name}.bias"] = (rows,)
    return shapes


@dataclass(frozen=True, slots=True)
class _Names:
    """Canonical → Hugging Face names: of whole tensors, and of the parts inside a layer."""

    top: dict[str, str]
    layers: str
    inside: dict[str, str]

    def translate(self, name: str) -> str:
        stem, _, kind = name.rpartition(".")
        if not stem.startswith("layers."):
            return f"{self.top[stem]}.{kind}"
        _, layer, inner = stem.split(".", 2)
        return f"{self.layers}.{layer}.{self.inside[inner]}.{kind}"


_LLAMA_NAMES = _Names(
    top={"embedding": "model.embed_tokens", "final_norm": "model.norm", "head": "lm_head"},
    layers="model.layers",
    inside={
        "attention_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
        **{f"attention.{x}_proj": f"self_attn.{x}_proj" for x in "qkvo"},
        **{f"attention.{x}_norm": f"self_attn.{x}_norm" for x in "qk"},
        **{f"mlp.{x}_proj": f"mlp.{x}_proj" for x in ("gate", "up", "down")},
    },
)
_GPT2_NAMES = _Names(
    top={
        "embedding": "transformer.wte",
        "position_embedding": "transformer.wpe",
        "final_norm": "transformer.ln_f",
        "head": "lm_head",
    },
    layers="transformer.h",
    inside={
        "attention_norm": "ln_1",
        "mlp_norm": "ln_2",
        "attention.q_proj": "attn.c_attn",
        "attention.k_proj": "attn.c_attn",
        "attention.v_proj": "attn.c_attn",
        "attention.o_proj": "attn.c_proj",
        "mlp.up_proj": "mlp.c_fc",
        "mlp.down_proj": "mlp.c_proj",
    },
)


def base_prefix(config: ModelConfig) -> str:
    """What files saved from the model without its head leave out of every name."""
    return "transformer." if config.family == "gpt2" else "model."


def _whole(hf_name: str, piece: str, shape: tuple[int, ...]) -> HfTensor:
    return HfTensor(hf_name, shape, (Part(piece, (0,) * len(shape), shape),))


def _gpt2_tensors(config: ModelConfig, shapes: dict[str, tuple[int, ...]]) -> list[HfTensor]:
    """GPT-2 stores projections as [in, out], and q, k and v side by side in one tensor."""
    grouped: dict[str, list[str]] = {}
    for piece in shapes:
        grouped.setdefault(_GPT2_NAMES.translate(piece), []).append(piece)
    tensors = []
    for name, pieces in grouped.items():
        transpose = "_proj.weight" in pieces[0]
        lying = [shapes[p][::-1] if transpose else shapes[p] for p in pieces]
        parts, start = [], 0
        for piece, shape in zip(pieces, lying, strict=True):
            offset = (0,) * (len(shape) - 1) + (start,)
            parts.append(Part(piece, offset, shape, transpose))
            start += shape[-1]
        tensors.append(HfTensor(name, (*lying[0][:-1], start), tuple(parts)))
    return tensors


def check_family(config: ModelConfig) -> None:
    """Raise UserError naming the first setting that the family's files cannot express."""
    attention_bias = config.qkv_bias
    head_dim = config.hidden_size // config.num_attention_heads
    rope_family = {
        "norm": ("rms",),
        "position": ("rope",),
        "activation": ("swiglu", "geglu"),
        "qk_norm": (config.family == "qwen3",),
    }
    plain_attention = {"sliding_window": (0,)}
    allowed: dict[str, dict[str, tuple[object, ...]]] = {
        "gpt2": {
            "norm": ("layer",),
            "position": ("learned",),
            "activation": ("gelu_tanh", "relu2"),
            "qkv_bias": (True,),
            "output_bias": (True,),
            "mlp_bias": (True,),
            "qk_norm": (False,),
            "num_key_value_heads": (0, config.num_attention_heads),
            "head_dim": (0, head_dim),
            **plain_attention,
        },
        "llama": {**rope_family, "output_bias": (attention_bias,), **plain_attention},
        "qwen2": {
            **rope_family,
            "qkv_bias": (True,),
            "output_bias": (False,),
            "mlp_bias": (False,),
            "head_dim": (0, head_dim),
        },
        "qwen3": {**rope_family, "output_bias": (attention_bias,), "mlp_bias": (False,)},
        "mistral": {
            **rope_family,
            "qkv_bias": (False,),
            "output_bias": (False,),
            "mlp_bias": (False,),
            "sliding_window_start_layer": (0,),
        },
    }
    for name, values in allowed[config.family].items():
        value = getattr(config, name)
        if value not in values:
            wanted = " or ".join(repr(v) for v in values)
            raise UserError(
                f"model.{name}={value!r} cannot be written as a {config.family} model, which has {wanted}: "
                "change it, or model.family"
            )
