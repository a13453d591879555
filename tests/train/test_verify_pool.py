"""The processes of `megalite verify`: worlds of every size one after the other, and every way of failing."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from megalite.train.verify_pool import LayoutError, Pool


def add_ranks(job: int, device: torch.device) -> tuple[int, int, float]:
    total = torch.tensor([float(dist.get_rank() + job)])
    dist.all_reduce(total)
    assert device.type == "cpu"
    return dist.get_rank(), dist.get_world_size(), float(total)


def raise_on_last(job: str, device: torch.device) -> None:
    if dist.get_rank() == dist.get_world_size() - 1:
        raise ValueError(f"no {job}\nand a second line")
    dist.barrier()


def die_on_first(job: None, device: torch.device) -> None:
    if dist.get_rank() == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def hang_on_first(job: None, device: torch.device) -> None:
    if dist.get_rank() == 0:
        sleep_for_ever()
    dist.all_reduce(torch.ones(1))


def sleep_for_ever() -> None:
    time.sleep(1000)


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool(4, timeout_s=20.0, preload=("tests.train.test_verify_pool",)) as made:
        yield made


def test_worlds_of_every_size(pool: Pool) -> None:
    for world in (2, 4, 3, 1, 4):
        answers = pool.run(world, add_ranks, 10)
        expected = sum(range(world)) + 10 * world
        assert answers == [(rank, world, expected) for rank in range(world)]


def test_the_parent_works_meanwhile(pool: Pool) -> None:
    seen: list[int] = []
    pool.run(2, add_ranks, 0, meanwhile=lambda: seen.append(1))
    assert seen == [1]


def test_an_exception_has_its_rank_and_its_words(pool: Pool) -> None:
    with pytest.raises(LayoutError) as caught:
        pool.run(2, raise_on_last, "cake")
    (error,) = caught.value.errors
    assert (error.rank, error.kind, error.summary) == (1, "raised", "ValueError: no cake")
    assert "in raise_on_last" in error.details
    assert pool.run(2, add_ranks, 0) == [(0, 2, 1.0), (1, 2, 1.0)]  # with new processes


def test_a_death_has_its_signal(pool: Pool) -> None:
    with pytest.raises(LayoutError) as caught:
        pool.run(2, die_on_first, None)
    first = caught.value.errors[0]
    assert (first.rank, first.kind) == (0, "died")
    assert "SIGKILL" in first.summary
    assert len(pool.run(4, add_ranks, 0)) == 4


def test_a_hang_has_the_place_of_every_rank() -> None:
    with Pool(2, timeout_s=2.0, preload=("tests.train.test_verify_pool",)) as short:
        began = time.monotonic()
        with pytest.raises(LayoutError) as caught:
            short.run(2, hang_on_first, None)
        assert time.monotonic() - began < 30
        errors = caught.value.errors
        assert [(error.rank, error.kind) for error in errors] == [(0, "hung"), (1, "hung")]
        assert "no answer within 2 s" in errors[0].summary
        assert "in sleep_for_ever" in errors[0].details
        assert "all_reduce" in errors[1].details
        assert len(short.run(2, add_ranks, 0)) == 2


def test_closing_ends_the_processes() -> None:
    pool = Pool(2)
    pool.start()
    processes = [rank.process for rank in pool._ranks]
    assert all(process.is_alive() for process in processes)
    pool.close()
    assert not any(process.is_alive() for process in processes)
    pool.close()  # twice is fine
