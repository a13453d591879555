"""One model in several layouts: what every rank computes, put together and compared with one process."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megalite.config import IGNORE_INDEX, ModelConfig, ParallelConfig
from megalite.data.loader import MicroBatch, pack
from megalite.models.transformer import Transformer
from megalite.parallel.collectives import all_reduce_sum
from megalite.parallel.context import ContextSplit
from megalite.parallel.mesh import mesh_of_group
from megalite.parallel.partial import box_copies, box_norms, sum_partial, total_norm
from megalite.parallel.pieces import Box, Piece, iter_pieces, piece_view
from megalite.parallel.random import initialize
from megalite.parallel.tensor import TensorSplit

SHAPE: dict[str, Any] = {
    "vocab_size": 301,
    "num_layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
MODELS = {
    "llama": ModelConfig(**SHAPE, num_key_value_heads=2),
    "qwen3-tied": ModelConfig(
        **SHAPE, num_key_value_heads=2, qk_norm=True, tie_word_embeddings=True, family="qwen3", init_std=0.1
    ),
    "one-kv-head": ModelConfig(
        **SHAPE, num_key_value_heads=1, qkv_bias=True, family="qwen2", sliding_window=7
    ),
    "gpt2": ModelConfig(
        **SHAPE,
        norm="layer",
        activation="gelu_tanh",
        position="learned",
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
        family="gpt2",
    ),
}
"""Odd vocabulary, tied and untied, fewer key heads than ranks, head norms, biases."""


@dataclass
class Outcome:
    """What a layout computed: the same numbers whatever the layout."""

    loss: float
    norm: float
    gradients: dict[str, Tensor]


def packed_batch(tokens: int = 32, seed: int = 0) -> MicroBatch:
    """Documents of unequal length, one of them without any valid label, and masked labels within others."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 301, (tokens,), generator=generator)
    labels = torch.randint(0, 301, (tokens,), generator=generator)
    bounds = [0, 5, 6, tokens // 2 + 3, tokens]
    labels[bounds[1] : bounds[2]] = IGNORE_INDEX
    labels[torch.rand(tokens, generator=generator) < 0.1 + 0.2 * (seed % 3)] = IGNORE_INDEX
    return pack([ids.numpy()], [labels.numpy()], [np.array(bounds[:-1])])


def one_process(config: ModelConfig, dtype: torch.dtype, batches: list[MicroBatch]) -> Outcome:
    """The truth: no axis, no collective."""
    model = build(config, TensorSplit(), dtype)
    losses = [loss_of(model, batch, None) for batch in batches]
    total = torch.stack(losses).sum()
    total.backward()
    gradients = {piece.name: grad for piece, grad in gradient_pieces(model)}
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
    return Outcome(float(total.detach()), norm, gradients)


def loss_of(
    model: Transformer, batch: MicroBatch, sequence: ContextSplit | None, grad_scale: Tensor | None = None
) -> Tensor:
    """Summed loss of a batch, or of this rank's part of it."""
    return model.loss(
        batch.tokens,
        batch.labels,
        positions=batch.positions,
        cu_seqlens=batch.cu_seqlens,
        max_seqlen=batch.max_seqlen,
        sequence=sequence,
        grad_scale=grad_scale,
    )


def build(config: ModelConfig, split: TensorSplit, dtype: torch.dtype) -> Transformer:
    """The model with its initial weights: drawn in float32, the same bits in every layout."""
    model = Transformer(config, split)
    initialize(model, seed=3)
    return model.to(dtype)


def gradient_pieces(model: Transformer) -> list[tuple[Piece, Tensor]]:
    """Each piece with its gradient."""
    return [(piece, piece_view(p.grad, piece)) for p, _, piece in iter_pieces(model) if p.grad is not None]


Answer = tuple[float, float, list[tuple[Piece, Tensor]]]


def layout_job(
    layout: ParallelConfig, config: ModelConfig, dtype: torch.dtype, batches: list[MicroBatch]
) -> Answer:
    """One rank's part: loss and norm over all ranks, and its pieces of the gradients."""
    mesh = mesh_of_group(layout, torch.device("cpu"))
    sequence = layout.sequence_parallel and mesh.tp.size > 1
    model = build(config, TensorSplit(mesh.tp, sequence, layout.tp_chunks), dtype)
    total = torch.zeros((), dtype=torch.float64)
    for batch in batches[mesh.dp.rank :: mesh.dp.size]:
        split = ContextSplit(mesh.cp, layout.cp_method, batch.bounds) if mesh.cp.size > 1 else None
        loss = loss_of(model, batch if split is None else batch.part(split), split)
        loss.backward()
        total += loss.detach()
    all_reduce_sum(total, mesh.data)
    gradients = gradient_pieces(model)
    boxes = [Box(piece, piece.offset, gradient) for piece, gradient in gradients]
    sum_partial(boxes, mesh.tp)
    for _, gradient in gradients:
        all_reduce_sum(gradient, mesh.data)
    norm = total_norm(box_norms(boxes, mesh.device), box_copies(boxes, mesh, mesh.data.size), mesh.world)
    return float(total), float(norm), gradients


def put_together(answers: list[Answer]) -> Outcome:
    """One outcome from all ranks': parts of tensors laid side by side, everything that is doubled being equal."""
    losses, norms = {loss for loss, _, _ in answers}, {norm for _, norm, _ in answers}
    assert len(losses) == 1, f"ranks differ in the loss: {losses}"
    assert len(norms) == 1, f"ranks differ in the norm: {norms}"
    gradients: dict[str, Tensor] = {}
    for _, _, pieces in answers:
        for piece, part in pieces:
            fresh = piece.name not in gradients
            if fresh:
                gradients[piece.name] = torch.full(piece.global_shape, torch.nan, dtype=part.dtype)
            whole = gradients[piece.name]
            place = tuple(slice(o, o + n) for o, n in zip(piece.offset, part.shape, strict=True))
            seen = whole[place]
            same = torch.isnan(seen) | (seen == part)
            assert same.all(), f"ranks differ in the gradient of {piece.name}"
            whole[place] = part
    return Outcome(losses.pop(), norms.pop(), gradients)


def assert_equal(got: Outcome, truth: Outcome, tolerance: float) -> None:
    """Loss, norm and every gradient within `tolerance` of the model's largest gradient."""
    assert got.gradients.keys() == truth.gradients.keys()
    assert abs(got.loss - truth.loss) <= tolerance * abs(truth.loss), (got.loss, truth.loss)
    largest = max(float(g.abs().max()) for g in truth.gradients.values())
    for name, expected in truth.gradients.items():
        error = float((got.gradients[name] - expected).abs().max()) if expected.numel() else 0.0
        assert error <= tolerance * largest, f"{name}: {error:.3e} of {largest:.3e}"
        assert float(expected.abs().max()) > 0, f"{name} gets no gradient: the test shows nothing"
    assert abs(got.norm - truth.norm) <= tolerance * truth.norm, (got.norm, truth.norm)
