"""Sums of gradients that tensor-parallel ranks have parts of, and norms that count every element once."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from megalite.config import ParallelConfig
from megalite.parallel.mesh import Mesh, mesh_of_group
from megalite.parallel.partial import box_copies, box_norms, sum_partial, total_norm
from megalite.parallel.pieces import Box, Init, Piece

CPU = torch.device("cpu")
KEYS = Piece("k", (4, 3), (0, 0), (5, 7), "partial", Init.zeros(), decay=True)


def key_heads() -> tuple[list[float], list[int], float]:
    """Four ranks, two heads of 2 rows: ranks 0 and 1 share the first. The rank's rows hold its number + 1."""
    mesh = mesh_of_group(ParallelConfig(tp=4), CPU)
    piece = dataclasses.replace(KEYS, offset=(mesh.rank // 2 * 2, 0))
    norm = Piece("n", (5,), (0,), (0, 5), "partial", Init.ones(), decay=False)
    same = Piece("s", (2,), (0,), (0, 2), "replicated", Init.ones(), decay=False)
    own = Piece("o", (8,), (2 * mesh.rank,), (0, 2), "sharded", Init.ones(), decay=False)
    # A slice of the optimizer's state: the second row of the head, the last three elements of the norm.
    boxes = [
        Box(piece, (piece.offset[0] + 1, 0), torch.full((1, 3), mesh.rank + 1.0)),
        Box(norm, (2,), torch.full((3,), 10.0**mesh.rank)),
        Box(same, (0,), torch.full((2,), 7.0)),
        Box(own, own.offset, torch.full((2,), 100.0 * mesh.rank)),
    ]
    sum_partial(boxes, mesh.tp)
    copies = box_copies(boxes, mesh, 1)
    values = [float(box.tensor.unique()) for box in boxes]
    return values, copies, float(total_norm(box_norms(boxes, CPU), copies, mesh.world))


def test_each_rank_gets_the_sum_of_those_that_share_its_rows(rank_pool):
    answers = rank_pool(4).run(key_heads)
    assert [values for values, _, _ in answers] == [
        [3.0, 1111.0, 7.0, 0.0], [3.0, 1111.0, 7.0, 100.0], [7.0, 1111.0, 7.0, 200.0], [7.0, 1111.0, 7.0, 300.0],
    ]  # fmt: skip
    assert all(copies == [2, 4, 4, 1] for _, copies, _ in answers)
    square = 3 * 3.0**2 + 3 * 7.0**2 + 3 * 1111.0**2 + 2 * 7.0**2 + 2 * (100.0**2 + 200.0**2 + 300.0**2)
    for _, _, norm in answers:
        assert norm == pytest.approx(math.sqrt(square), rel=1e-6)


def test_the_norm_of_boxes_is_that_of_all_elements():
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator) for shape in ((7, 5), (3,), (64, 64))]
    boxes = [Box(KEYS, (0, 0), tensor) for tensor in tensors]
    norms = box_norms(boxes, CPU)
    assert norms.shape == (3,)
    every_element = torch.cat([tensor.flatten() for tensor in tensors]).double()
    norm = total_norm(norms, [1, 1, 1], Mesh(device=CPU).world)
    assert norm.item() == pytest.approx(every_element.norm().item(), rel=1e-6)
    halves = total_norm(norms, [4, 4, 4], Mesh(device=CPU).world)
    assert halves.item() == pytest.approx(every_element.norm().item() / 2, rel=1e-6)
    assert total_norm(box_norms([], CPU), [], Mesh(device=CPU).world) == 0


def test_the_norm_of_a_large_matrix_is_not_added_up_in_fp32():
    values = torch.randn(4097, 4099, generator=torch.Generator().manual_seed(0))
    exact = torch.linalg.vector_norm(values, dtype=torch.float64).item()
    norm = box_norms([Box(KEYS, (0, 0), values)], CPU)
    assert norm.item() == pytest.approx(exact, rel=1e-7)
    assert box_norms([Box(KEYS, (0, 0), values.double())], CPU).item() == pytest.approx(exact, rel=1e-12)


def test_nothing_is_summed_without_tensor_parallelism():
    tensor = torch.ones(1, 3)
    sum_partial([Box(KEYS, (0, 0), tensor)], Mesh(device=CPU).tp)
    assert torch.equal(tensor, torch.ones(1, 3))
