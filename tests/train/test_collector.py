"""When the garbage collector runs, and that nothing of it is left behind."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from megalite.train.collector import Collector


@pytest.fixture
def collections() -> Iterator[list[int]]:
    """Generations that are collected from now on."""
    seen: list[int] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            seen.append(info["generation"])

    gc.callbacks.append(note)
    yield seen
    gc.callbacks.remove(note)


def litter() -> None:
    """More containers than the collector lets pass."""
    for _ in range(3 * gc.get_threshold()[0]):
        loop: list[object] = []
        loop.append(loop)


def test_it_runs_at_its_steps_only_and_everything_is_as_before(collections: list[int]) -> None:
    frozen = gc.get_freeze_count()
    with Collector(3) as collector:
        collections.clear()
        assert not gc.isenabled()
        at = []
        for done in range(1, 8):
            litter()
            collector.after_step(done)
            at.append(len(collections))
        assert at == [0, 0, 1, 1, 1, 2, 2]
    assert gc.isenabled()
    assert gc.get_freeze_count() == frozen == 0
    collections.clear()
    litter()
    assert collections


def test_without_an_interval_it_is_left_alone(collections: list[int]) -> None:
    with Collector(0) as collector:
        collections.clear()
        assert gc.isenabled()
        collector.after_step(1)
        assert not collections
    gc.disable()
    try:
        with Collector(5):
            pass
        assert not gc.isenabled(), "off before, off after"
    finally:
        gc.enable()
