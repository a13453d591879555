"""FP8 layers cut over ranks: what one process computes, but for elements below the formats' normal range."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megalite.config import ModelConfig, ParallelConfig
from megalite.layers.linear import ColumnParallelLinear, RowParallelLinear, use_fp8
from megalite.parallel.mesh import Axis, Mesh, mesh_of_group
from megalite.parallel.partial import box_copies, box_norms, sum_partial, total_norm
from megalite.parallel.pieces import Box
from megalite.parallel.tensor import Shard, TensorSplit
from tests.helpers.trace import trace
from tests.parallel.layouts import (
    MODELS,
    Answer,
    assert_equal,
    build,
    gradient_pieces,
    loss_of,
    packed_batch,
    put_together,
)

Scaling = Literal["rowwise", "tensorwise"]
SCALINGS: list[Scaling] = ["rowwise", "tensorwise"]


ALONE = Mesh(device=torch.device("cpu"))


def mesh_of_tp() -> Mesh:
    """All of the pool's ranks along tp."""
    return mesh_of_group(ParallelConfig(tp=dist.get_world_size()), torch.device("cpu"))


def run(mesh: Mesh, config: ModelConfig, scaling: Scaling, sequence: bool = False) -> Answer:
    split = TensorSplit(mesh.tp, sequence)
    model = build(config, split, torch.float32)
    use_fp8(model, scaling)
    loss = loss_of(model, packed_batch(), None)
    loss.backward()
    gradients = gradient_pieces(model)
    boxes = [Box(piece, piece.offset, gradient) for piece, gradient in gradients]
    sum_partial(boxes, mesh.tp)
    norm = total_norm(box_norms(boxes, mesh.device), box_copies(boxes, mesh, 1), mesh.world)
    return float(loss.detach()), float(norm), gradients


def job(config: ModelConfig, scaling: Scaling, sequence: bool) -> Answer:
    return run(mesh_of_tp(), config, scaling, sequence)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize(
    ("name", "tp", "sequence"), [("gpt2", 2, False), ("llama", 2, True), ("qwen3-tied", 2, True)]
)
def test_a_cut_model(rank_pool: Any, name: str, tp: int, sequence: bool, scaling: Scaling) -> None:
    """In fp32 outside the products, so that only FP8 can differ: elements below the normal range, and the few that
    another order of fp32 sums moves across the middle between two FP8 numbers. (An FP8 product's own error is 4 %.)"""
    alone = run(ALONE, MODELS[name], scaling)
    answers = rank_pool(tp).run(job, MODELS[name], scaling, sequence)
    assert_equal(put_together(answers), put_together([alone]), 1e-3)


def layer_job(scaling: Scaling, sequence: bool) -> list[Tensor]:
    return layers(mesh_of_tp().tp, scaling, sequence)


def layers(axis: Axis, scaling: Scaling, sequence: bool) -> list[Tensor]:
    """Outputs and gradients of both layers, on numbers that FP8 holds exactly."""
    split = TensorSplit(axis, sequence)
    inputs, outputs = Shard.even(48, axis), {"o": Shard.even(32, axis)}
    column = ColumnParallelLinear(32, outputs, split, bias=True, std=0.1)
    row = RowParallelLinear(inputs, 24, split, name="o", bias=True, std=0.1)
    use_fp8(column, scaling)
    use_fp8(row, scaling)
    generator = torch.Generator().manual_seed(0)

    def whole(*shape: int) -> Tensor:
        return torch.randint(-1, 2, shape, generator=generator).float()

    tokens = slice(20 * axis.rank // axis.size, 20 * (axis.rank + 1) // axis.size) if sequence else slice(20)
    own_inputs, own_outputs = axis.shard(48), axis.shard(32)
    values = [whole(32, 32)[own_outputs], whole(32)[own_outputs], whole(24, 48)[:, own_inputs], whole(24)]
    parameters = [*column.parameters(), *row.parameters()]
    for parameter, value in zip(parameters, values, strict=True):
        parameter.data.copy_(value)
    x, y = whole(20, 32)[tokens].requires_grad_(), whole(20, 48)[:, own_inputs].requires_grad_()
    dx, dy = whole(20, 32)[:, own_outputs], whole(20, 24)[tokens]
    out = [column(x), row(y)]
    grads = torch.autograd.grad(out, [*parameters, x, y], [dx, dy])
    return [o.detach() for o in out] + list(grads)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("sequence", [False, True])
def test_layers_are_exact_where_fp8_is(rank_pool: Any, sequence: bool, scaling: Scaling) -> None:
    alone = layers(ALONE.tp, scaling, False)
    ranks = rank_pool(2).run(layer_job, scaling, sequence)
    dims: list[int | None] = [1, 0 if sequence else None, 0, 0, 1, None, 0 if sequence else None, 1]
    for place, (expected, dim) in enumerate(zip(alone, dims, strict=True)):
        parts = [answer[place] for answer in ranks]
        if place == 5 and sequence:  # the row layer's bias: a part of a sum
            assert torch.equal(sum(parts[1:], parts[0]), expected)
        else:
            assert torch.equal(parts[0] if dim is None else torch.cat(parts, dim), expected), place


def traced_job(scaling: Scaling) -> tuple[int, int]:
    """Bytes that the forward pass gathers, and how many products hide the sum of the backward pass."""
    axis = mesh_of_tp().tp
    layer = ColumnParallelLinear(
        64, {"o": Shard.even(32, axis)}, TensorSplit(axis, True), bias=False, std=0.1, dtype=torch.bfloat16
    )
    torch.nn.init.ones_(layer.weight)
    use_fp8(layer, scaling)
    x = torch.ones(8, 64, dtype=torch.bfloat16, requires_grad=True)
    with trace() as forward:
        out = layer(x)
    with trace() as backward:
        out.sum().backward()
    (summing,) = backward.of("reduce_scatter")
    return forward.bytes_of("all_gather"), len(backward.behind(summing, by="mm"))


def test_tokens_travel_in_fp8_where_each_has_its_scale(rank_pool: Any) -> None:
    """16 tokens of 64 features: a byte each and 4 for a token's scale, or two bytes each; wgrad hides the sum."""
    rowwise, tensorwise = (rank_pool(2).run(traced_job, scaling) for scaling in SCALINGS)
    assert rowwise == [(16 * (64 + 4), 1)] * 2
    assert tensorwise == [(16 * 64 * 2, 1)] * 2
