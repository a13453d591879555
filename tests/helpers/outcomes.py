"""What a layout of two tensor-parallel ranks would compute for a model of three tensors, made by hand."""

from __future__ import annotations

import torch
from torch import Tensor

from megalite.train.verify_run import Answer, Block, Place, Truth

HEAD, NORM, EMBEDDING = "head.weight", "layers.0.mlp_norm.weight", "embedding.weight"
Blocks = list[Block]


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def the_truth() -> Truth:
    gradients = {EMBEDDING: random(7, 4, seed=1), NORM: random(4, seed=2), HEAD: random(7, 4, seed=3)}
    initial = {name: random(*g.shape, seed=4) for name, g in gradients.items()}
    return Truth(
        losses=[5.0, 4.0, 3.0],
        norms=[2.0, 1.5, 1.0],
        token_losses={0: random(6, seed=5).abs(), 1: random(6, seed=6).abs()},
        gradients=gradients,
        initial=initial,
        weights={name: value - 0.1 * gradients[name] for name, value in initial.items()},
    )


def two_ranks(truth: Truth) -> list[Answer]:
    """What tp = 2 gives: matrices in two shards of rows 0-3 and 4-6, the norm on both ranks."""

    def blocks(tensors: dict[str, Tensor], rank: int) -> Blocks:
        rows = slice(0, 4) if rank == 0 else slice(4, 7)
        found = []
        for name, tensor in tensors.items():
            whole = name == NORM
            own = tensor if whole else tensor[rows]
            offset = (0,) * tensor.dim() if whole else (rows.start, 0)
            found.append(Block(name, tuple(tensor.shape), offset, own.clone()))
        return found

    return [
        Answer(
            place=Place(rank, {"tp": (rank, 2)}),
            losses=list(truth.losses),
            norms=list(truth.norms),
            token_losses={n: x.clone() for n, x in truth.token_losses.items()},
            gradients=blocks(truth.gradients, rank),
            weights=blocks(truth.weights, rank),
            outputs=[],
            output_gradients=[],
        )
        for rank in range(2)
    ]
