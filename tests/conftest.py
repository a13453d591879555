"""What every test shares: the rank pools, and one thread per process."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from tests.helpers.rank_pool import WORLD_SIZES, RankPool


def pytest_configure() -> None:
    torch.set_num_threads(1)  # reproducible to the last bit, and test processes share the cores


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Under xdist, keep all users of the rank pools in one process: one set of ranks, not one per process."""
    for item in items:
        if "rank_pool" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("rank_pool"))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def rank_pool() -> Iterator[Callable[[int], RankPool]]:
    """``rank_pool(world_size).run(fn, *args)`` calls ``fn`` on 2, 4 or 8 gloo ranks kept for the session."""
    pools = {size: RankPool(size) for size in WORLD_SIZES}

    def pool_of(world_size: int) -> RankPool:
        if world_size not in pools:
            raise ValueError(f"world_size={world_size} has no pool; there are 2, 4 and 8")
        return pools[world_size]

    yield pool_of
    for pool in pools.values():
        pool.close()
