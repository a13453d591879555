"""Ring attention sends keys and values, and their gradients, while it computes: seen in traces.

The proof is run on early waits too, which it must reject.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megalite.config import ParallelConfig
from megalite.parallel import context
from megalite.parallel.context import ContextSplit, context_attention
from megalite.parallel.mesh import mesh_of_group
from tests.helpers.trace import assert_hidden, impatient, trace

TOKENS, HEADS, KEY_HEADS, DIM = 48, 4, 2, 8


def ring_job(early: bool) -> None:
    ranks = dist.get_world_size()
    axis = mesh_of_group(ParallelConfig(cp=ranks), torch.device("cpu")).cp
    split = ContextSplit(axis, "ring", (0, TOKENS))
    rows = TOKENS // ranks
    q, k, v = (torch.randn(rows, heads, DIM, requires_grad=True) for heads in (HEADS, KEY_HEADS, KEY_HEADS))
    with impatient(context, "start_ring_shift") if early else contextlib.nullcontext():
        with trace() as forward:
            out = context_attention(q, k, v, split, window=None)
        with trace() as backward:
            out.sum().backward()
    kv = 2 * rows * KEY_HEADS * DIM * 4
    for kind in ("send", "recv"):
        assert_hidden(forward, kind, by="attention", count=ranks - 1)
        # Keys and values go round again, and their gradients all the way home: only that last step is exposed.
        assert_hidden(backward, kind, by="attention", count=2 * ranks - 1, exposed=1)
        assert not backward.behind(backward.of(kind)[-1], "attention")
    assert forward.bytes_of("send") == (ranks - 1) * kv
    assert backward.bytes_of("send") == (2 * ranks - 1) * kv
    assert forward.counts().keys() | backward.counts().keys() == {"send", "recv"}
    # The diagonal is two chunks, each with itself, and one with the other; other ranks' keys are two parts.
    parts = 3 + 2 * (ranks - 1)
    assert Counter(c.name for c in forward.computes)["megalite.attention_fwd"] == parts, forward
    assert Counter(c.name for c in backward.computes)["megalite.attention_bwd"] == parts, backward


def rejected_job() -> None:
    with pytest.raises(AssertionError, match=r"exposed, not"):
        ring_job(True)


@pytest.mark.parametrize("cp", [2, 4])
def test_ring(rank_pool: Any, cp: int) -> None:
    """Each exchange is launched before the attention that hides it, forward and backward."""
    rank_pool(cp).run(ring_job, False)
    rank_pool(cp).run(rejected_job)
