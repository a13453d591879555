"""Pipelines hide their transfers, seen in a trace: what is sent and received behind which computation."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import pytest
import torch
from torch.distributed.pipelining import schedules

from megalite.config import ParallelConfig
from tests.helpers.trace import Events, trace
from tests.parallel.layouts import MODELS, packed_batch
from tests.parallel.replicas import make_replica

CONFIG = dataclasses.replace(MODELS["llama"], num_layers=8)
BATCHES = [packed_batch(seed=seed) for seed in range(8)]


@contextlib.contextmanager
def impatient_sends() -> Any:
    """A planted error: whoever sends waits until the other side has received."""
    start = schedules._batch_p2p

    def started(operations: Any, *args: Any, **kwargs: Any) -> Any:
        works = start(operations, *args, **kwargs)
        if operations and all(op.op is torch.distributed.isend for op in operations):
            for work in works:
                work.wait()
            return []
        return works

    schedules._batch_p2p = started
    try:
        yield
    finally:
        schedules._batch_p2p = start


def traced_step(schedule: Any, early: bool) -> Events:
    replica = make_replica(ParallelConfig(pp=2, pp_schedule=schedule), CONFIG, torch.float32, 32)
    replica.gradients(BATCHES, torch.ones(()))  # connects the ranks and makes the engine's buffers
    with impatient_sends() if early else contextlib.nullcontext(), trace() as events:
        replica.gradients(BATCHES, torch.ones(()))
    return events


def exposed_sends(schedule: Any, early: bool) -> tuple[int, int, int]:
    """Sends of this rank: all of them, those with no product before somebody waits, and bytes in all."""
    events = traced_step(schedule, early)
    sends = events.of("send")
    assert all(send.waited is not None for send in sends), str(events)
    return len(sends), sum(not events.behind(send, "mm") for send in sends), sum(s.bytes for s in sends)


@pytest.mark.parametrize("schedule", ["interleaved", "interleaved_zero_bubble", "zbv", "dualpipev"])
def test_sends_run_behind_computation(rank_pool: Any, schedule: str) -> None:
    stream = 32 * CONFIG.hidden_size * 4  # bytes of one micro-batch between two stages
    for sends, exposed, total in rank_pool(2).run(exposed_sends, schedule, False):
        # Three borders between four stages, forth and back; of a V the middle one lies within a rank.
        v_shaped = schedule in ("zbv", "dualpipev")
        assert sends == len(BATCHES) * (2 if v_shaped else 3)
        assert total == sends * stream
        assert exposed <= 1  # the very last has nothing left to hide behind
    for sends, exposed, _ in rank_pool(2).run(exposed_sends, schedule, True):
        assert exposed == sends
