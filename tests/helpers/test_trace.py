"""The trace itself: order, bytes and groups of what a rank does, and that an early wait fails."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import megalite_kernels as kernels
from megalite.config import ParallelConfig
from megalite.parallel import collectives
from megalite.parallel.collectives import reduce_scatter, start_all_gather, start_ring_shift, wait
from megalite.parallel.mesh import mesh_of_group
from tests.helpers.trace import Events, assert_hidden, impatient, trace


class _Gathered(torch.autograd.Function):
    """x @ x.t() whose backward gathers behind a product, or early."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, early: bool) -> Tensor:
        ctx.save_for_backward(x)
        ctx.early = early
        return x @ x.t()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        _, work = start_all_gather(x, mesh_of_world().tp)
        if ctx.early:
            wait(work)
        dx = dy @ x
        wait(work)
        return dx + dx, None


def mesh_of_world() -> Any:
    layout = ParallelConfig(tp=dist.get_world_size(), sequence_parallel=False)
    return mesh_of_group(layout, torch.device("cpu"))


def backward_job(early: bool) -> None:
    x = torch.randn(3, 4, requires_grad=True)
    y = _Gathered.apply(kernels.rms_norm(x, torch.ones(4)), early).sum()
    with trace() as events:
        y.backward()
    assert_hidden(events, "all_gather", by="mm", count=1)
    assert [c.name for c in events.computes] == ["aten.mm", "megalite.rms_norm_bwd"], events


def rejected_job() -> None:
    with pytest.raises(AssertionError, match=r"1 exposed, not 0 \(all_gather at 0\)"):
        backward_job(True)


def test_launch_product_wait_in_the_backward_pass(rank_pool: Any) -> None:
    rank_pool(2).run(backward_job, False)


def test_an_early_wait_fails(rank_pool: Any) -> None:
    rank_pool(2).run(rejected_job)


def impatient_job() -> None:
    axis, x = mesh_of_world().tp, torch.randn(4, 4)
    with trace() as events:
        for planted in (
            contextlib.nullcontext(),
            impatient(collectives, "start_all_gather", "start_ring_shift"),
        ):
            with planted:
                _, work = collectives.start_all_gather(x, axis)
                _, works = collectives.start_ring_shift(x, axis)
                x @ x
                for one in (work, *works):
                    collectives.wait(one)
    assert [bool(events.behind(launch)) for launch in events.launches] == [True] * 3 + [False] * 3, events
    assert all(launch.waited is not None for launch in events.launches)


def test_impatience_waits_at_once(rank_pool: Any) -> None:
    rank_pool(2).run(impatient_job)


def accounts_job() -> dict[str, Any]:
    axis = mesh_of_world().tp
    x = torch.randn(4, 8)
    with trace() as events:
        reduce_scatter(x, axis)
        _, works = start_ring_shift(x, axis)
        for work in works:
            work.wait()
        _, never = start_all_gather(x.bfloat16(), axis)
        x @ x.t()
    wait(never)
    assert events.launches[-1].waited is None
    with pytest.raises(AssertionError, match="nobody waited for the all_gather"):
        assert_hidden(events, "all_gather")
    with pytest.raises(AssertionError, match="no all_reduce was launched"):
        assert_hidden(events, "all_reduce")
    assert_hidden(events, "reduce_scatter", exposed=1)
    return {
        "order": [(one.kind, one.bytes, one.sent_bytes) for one in events.launches],
        "groups": events.bytes_by_group(),
        "text": str(events),
    }


def test_order_bytes_and_groups(rank_pool: Any) -> None:
    size = 4 * 8 * 4
    for rank, answer in enumerate(rank_pool(4).run(accounts_job)):
        assert answer["order"] == [
            ("reduce_scatter", size, size * 3 / 4),
            ("send", size, size),
            ("recv", size, 0),
            ("all_gather", 4 * size // 2, 4 * size // 2 * 3 / 4),
        ], rank
        kinds = {"reduce_scatter": size, "send": size, "recv": size, "all_gather": 2 * size}
        assert answer["groups"] == {(0, 1, 2, 3): kinds}
        assert "launch reduce_scatter of 128 B over [0, 1, 2, 3]" in answer["text"]


def test_recording_ends_with_the_block() -> None:
    original = dist.Work.wait
    with trace() as events:
        assert dist.Work.wait is not original
        torch.ones(2, 2) @ torch.ones(2, 2)
    torch.ones(2, 2) @ torch.ones(2, 2)
    assert dist.Work.wait is original
    assert [c.name for c in events.computes] == ["aten.mm"]
    assert isinstance(events, Events)
    assert events.computes[0].is_a("mm")
    assert not events.computes[0].is_a("rms_norm")
