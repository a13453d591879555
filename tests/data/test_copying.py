"""Copies to a GPU: on a stream of their own, waited for on the device, their memory kept until it was read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from megalite.data.copying import CopyStream
from megalite.data.loader import MicroBatch


def batch() -> MicroBatch:
    numbers = torch.arange(4)
    return MicroBatch(numbers, numbers + 1, numbers, torch.tensor([0, 4], dtype=torch.int32), 4, (0, 4))


class FakeStream:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: FakeStream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")


class FakeBatch:
    """Says what is done with it, and where."""

    def __init__(self, number: int, log: list[str], here: list[FakeStream]) -> None:
        self.number, self.log, self.here = number, log, here

    def to(self, device: torch.device, non_blocking: bool) -> FakeBatch:
        how = "" if non_blocking else " and wait"
        self.log.append(f"copy {self.number} to {device} on {self.here[-1].name}{how}")
        return self

    def map(self, change: Callable[[Any], Any]) -> None:
        change(self)

    def record_stream(self, stream: FakeStream) -> None:
        self.log.append(f"keep {self.number} for {stream.name}")


def test_the_order_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    compute, side = FakeStream("compute", log), FakeStream("side", log)
    here = [compute]

    @contextmanager
    def on(stream: FakeStream) -> Iterator[None]:
        here.append(stream)
        yield
        here.pop()

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: here[-1])
    monkeypatch.setattr(torch.cuda, "stream", on)
    batches: Any = [FakeBatch(number, log, here) for number in range(2)]
    assert CopyStream(torch.device("cuda")).bring(batches) == batches
    assert log == [
        "copy 0 to cuda on side",
        "copy 1 to cuda on side",
        "compute waits for side",
        "keep 0 for compute",
        "keep 1 for compute",
    ]


def test_on_a_cpu_it_is_the_batch_itself() -> None:
    before = batch()
    (after,) = CopyStream(torch.device("cpu")).bring([before])
    assert after.tokens is before.tokens
    assert after.labels is before.labels


@pytest.mark.gpu
def test_values_arrive_while_the_gpu_computes() -> None:
    device = torch.device("cuda")
    copies, x = CopyStream(device), torch.randn(4096, 4096, device=device)
    for _ in range(20):
        x = x @ x.t() / 4096
        (there,) = copies.bring([batch().pin_memory()])
        total = there.tokens.sum() + there.labels.sum()
        assert total == 16
