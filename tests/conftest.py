"""What every test shares: the rank pools, and one thread per process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.helpers.order import longest_first
from tests.helpers.rank_pool import WORLD_SIZES, RankPool


def pytest_configure() -> None:
    torch.set_num_threads(1)  # reproducible to the last bit, and test processes share the cores


@pytest.hookimpl(optionalhook=True)  # the tests run without pytest-xdist too
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from tests.helpers.schedule import FilesAndRankPool

    return FilesAndRankPool(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    paths = [item.nodeid.split("::", 1)[0] for item in items]
    keys = longest_first(paths)
    items.sort(key=lambda item: keys[item.nodeid.split("::", 1)[0]])


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
