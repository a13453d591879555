"""How pytest-xdist's processes share the tests: whole files, and all users of the rank pools in one process.

A file's tests stay together, so that its module-scoped fixtures are made once, but for a few files that would keep one
process busy while the others have nothing left. Files that use the rank pools
stay together as well: one set of ranks, rather than one per process. (xdist's own ``loadgroup`` would say the
second by a marker, but has no effect with pytest 9.2, where node ids cannot be renamed.)
"""

from __future__ import annotations

from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

from tests.helpers.order import APART, names_rank_pool


class FilesAndRankPool(LoadScopeScheduling):
    """Scopes are files, one of all files that name ``rank_pool``, and single tests of `APART`; in collected order."""

    def __init__(self, config: pytest.Config, log: Any = None) -> None:
        super().__init__(config, log)
        config.option.loadscopereorder = (
            False  # xdist's order, by number of tests, leaves the long ones to the end
        )

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.split("::", 1)[0]
        if path in APART:
            return nodeid
        return "rank_pool" if names_rank_pool(path) else path
