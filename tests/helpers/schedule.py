"""How pytest-xdist's processes share the tests: whole files, and all users of the rank pools in one process.

A file's tests stay together, so that its module-scoped fixtures are made once. Files that use the rank pools
stay together as well: one set of ranks, rather than one per process. (xdist's own ``loadgroup`` would say the
second by a marker, but has no effect with pytest 9.2, where node ids cannot be renamed.)
"""

from __future__ import annotations

from functools import cache

from xdist.scheduler import LoadScopeScheduling

from tests.helpers.source import ROOT


class FilesAndRankPool(LoadScopeScheduling):
    """Scopes are files, but for one scope of all files that name ``rank_pool``."""

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.split("::", 1)[0]
        return "rank_pool" if names_rank_pool(path) else path


@cache
def names_rank_pool(path: str) -> bool:
    return "rank_pool" in (ROOT / path).read_text(encoding="utf-8")
