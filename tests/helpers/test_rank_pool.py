"""The rank pool itself: what it returns, how failures look, and that it works again after each of them."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from tests.helpers.rank_pool import RankFailure, RankPool


def sum_of_ranks(scale: float) -> torch.Tensor:
    value = torch.full((3,), dist.get_rank() * scale)
    dist.all_reduce(value)
    return value


def seeds_and_threads() -> tuple[float, int]:
    return torch.rand(()).item(), torch.get_num_threads()


def process_id() -> int:
    return os.getpid()


def fail_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ArithmeticError(f"planted in rank {rank}")
    dist.barrier()


def wait_forever_on(rank: int) -> None:
    while dist.get_rank() == rank:
        time.sleep(0.05)


def die_on(rank: int) -> None:
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def return_unpicklable() -> object:
    return lambda: None


def pair_groups() -> tuple[float, int]:
    """Reduce within neighbouring pairs; leave the groups open, as a careless test would."""
    pairs = [dist.new_group([start, start + 1]) for start in range(0, dist.get_world_size(), 2)]
    value = torch.tensor(float(dist.get_rank()))
    dist.all_reduce(value, group=pairs[dist.get_rank() // 2])
    return value.item(), len(dist.distributed_c10d._world.pg_map)


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_each_rank_returns_its_value(rank_pool, world_size):
    results = rank_pool(world_size).run(sum_of_ranks, 0.5)
    expected = torch.full((3,), 0.5 * sum(range(world_size)))
    assert len(results) == world_size
    assert all(torch.equal(result, expected) for result in results)


def test_every_job_starts_from_its_seed_with_one_thread(rank_pool):
    pool = rank_pool(2)
    first, again, other = (pool.run(seeds_and_threads, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert first[0] == first[1]
    assert first[0][1] == 1


def test_processes_persist_between_jobs(rank_pool):
    pool = rank_pool(2)
    assert pool.run(process_id) == pool.run(process_id)


def test_groups_of_a_job_are_gone_in_the_next(rank_pool):
    pool = rank_pool(4)
    first = pool.run(pair_groups)
    assert [value for value, _ in first] == [1.0, 1.0, 5.0, 5.0]
    assert pool.run(pair_groups) == first


def test_a_failure_shows_the_ranks_own_traceback_and_the_pool_recovers():
    pool = RankPool(2)
    try:
        with pytest.raises(
            RankFailure, match=r"(?s)rank 1 of 2.*in fail_on.*ArithmeticError: planted in rank 1"
        ) as caught:
            pool.run(fail_on, 1)
        assert "rank 0" not in str(caught.value), "the rank that only waited is not to blame"
        assert len(pool.run(process_id)) == 2
    finally:
        pool.close()


def test_a_hang_ends_in_time_with_the_stack_and_the_pool_recovers():
    pool = RankPool(2)
    try:
        pool.run(process_id)
        began = time.monotonic()
        with pytest.raises(RankFailure, match=r"(?s)no answer within 0.5 s.*in wait_forever_on"):
            pool.run(wait_forever_on, 0, timeout=0.5)
        assert time.monotonic() - began < 5
        assert len(pool.run(process_id)) == 2
    finally:
        pool.close()


def test_a_dead_rank_is_named_with_its_signal_and_the_pool_recovers():
    pool = RankPool(2)
    try:
        with pytest.raises(RankFailure, match=r"rank 1 of 2: the process died \(signal SIGKILL\)"):
            pool.run(die_on, 1)
        assert len(pool.run(process_id)) == 2
    finally:
        pool.close()


def test_an_unpicklable_result_is_an_error_of_its_rank():
    pool = RankPool(2)
    try:
        with pytest.raises(RankFailure, match=r"(?s)rank 0 of 2.*pickle"):
            pool.run(return_unpicklable)
    finally:
        pool.close()


def test_a_local_function_is_refused_before_it_is_sent(rank_pool):
    with pytest.raises(TypeError, match="must be picklable, fn at module level"):
        rank_pool(2).run(lambda: None)


def test_a_world_without_a_pool_is_refused(rank_pool):
    with pytest.raises(ValueError, match="world_size=3 has no pool; there are 2, 4 and 8"):
        rank_pool(3)
