"""Ring and Ulysses attention against one process: outputs and gradients, with documents cut anywhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import megalite_kernels as kernels
from megalite.config import ParallelConfig
from megalite.parallel.context import ContextSplit, Method, context_attention, ring_parts
from megalite.parallel.mesh import Axis, mesh_of_group

TOKENS, HEADS, KEY_HEADS, DIM = 48, 8, 4, 8
BOUNDS = {
    "one document": (0, TOKENS),
    "across every chunk": (0, 3, 4, 29, 46, TOKENS),
    "at chunk edges": (0, 6, 12, 24, TOKENS),
}


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and the gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(TOKENS, heads, DIM) for heads in (HEADS, KEY_HEADS, KEY_HEADS, HEADS)]
    q, k, v, dout = (torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes)
    return q, k, v, dout


def job(method: Method, bounds: tuple[int, ...], window: int | None, dtype: torch.dtype) -> list[Tensor]:
    """This rank's tokens of the output and of the three gradients."""
    mesh = mesh_of_group(ParallelConfig(cp=dist.get_world_size()), torch.device("cpu"))
    split = ContextSplit(mesh.cp, method, bounds)
    q, k, v, dout = (split.own_tokens(x) for x in inputs(dtype))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = context_attention(*leaves, split, window=window)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def whole(bounds: tuple[int, ...], window: int | None, dtype: torch.dtype) -> list[Tensor]:
    q, k, v, dout = inputs(dtype)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    out = kernels.attention(*leaves, window=window, cu_seqlens=cu_seqlens, max_seqlen=TOKENS)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("method", ["ring", "ulysses"])
@pytest.mark.parametrize("cp", [2, 4])
def test_equals_one_process(rank_pool: Any, cp: int, method: Method, bounds: str) -> None:
    for window in (None, 7):
        for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
            answers = rank_pool(cp).run(job, method, BOUNDS[bounds], window, dtype)
            for i, expected in enumerate(whole(BOUNDS[bounds], window, dtype)):
                for rank, parts in enumerate(answers):
                    mine = ContextSplit(Axis(cp, rank), method, BOUNDS[bounds]).own_tokens(expected)
                    error = (parts[i] - mine).abs().max() / expected.abs().max()
                    assert error <= tolerance, (window, dtype, i, rank)


def test_the_ring_is_balanced() -> None:
    """Scores computed per rank and step of one long document: all ranks equal but for the diagonal."""
    split = [ContextSplit(Axis(4, rank), "ring", (0, 64)) for rank in range(4)]

    def pairs(rank: int, source: int) -> int:
        parts = ring_parts(split[rank], source, None)
        sizes = [(p.queries.stop - p.queries.start) * (p.keys.stop - p.keys.start) for p in parts]
        return sum(sizes)

    for step in range(4):
        assert len({pairs(rank, (rank - step) % 4) for rank in range(4)}) == 1


def test_a_window_or_a_document_end_skips_what_nobody_sees() -> None:
    split = ContextSplit(
        Axis(2, 1), "ring", (0, 16, 32)
    )  # chunks of 8: this rank holds tokens 8..16 and 16..24
    assert [p.queries for p in ring_parts(split, 0, None)] == [slice(0, 8)]  # 16..24 begins a document
    assert not list(ring_parts(ContextSplit(Axis(2, 1), "ring", (0, 32)), 0, 1))


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"50 tokens does not divide over parallel.cp=4: .* multiple of 8"):
        ContextSplit(Axis(4, 0), "ring", (0, 50))
    q, k = torch.zeros(4, 6, 8), torch.zeros(4, 3, 8)
    with pytest.raises(ValueError, match=r"parallel.cp=2 .* must divide the 3 key/value heads"):
        context_attention(q, k, k, ContextSplit(Axis(2, 0), "ulysses", (0, 8)), window=None)
