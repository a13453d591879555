"""The order of the test files: what takes long comes first, so that the test processes end together.

The rank pools are one process's work for half of the time. Files that start processes of their own hold few tests, of
seconds each: at the end one test process would be alone with them. Many quick tests are the best end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import cache

from tests.helpers.source import ROOT

STARTERS = ("rank_pool", "tests.helpers.ranks", "tests.helpers.runs", "subprocess")
"""What a file names that starts processes: the more it starts, the sooner in this list."""

APART = ("tests/triton_gate/test_gate.py", "tests/cuda_gate/test_gate.py")
"""Files of tests that compile for seconds and share nothing; each of these files is most of its suite's time."""


def longest_first(paths: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Sort keys of the files that tests come from; one path for each test."""
    return {path: (_starter(path), -count) for path, count in Counter(paths).items()}


def names_rank_pool(path: str) -> bool:
    """Whether a file's tests may use the rank pools."""
    return _starter(path) == 0


@cache
def _starter(path: str) -> int:
    text = (ROOT / path).read_text(encoding="utf-8")
    return next((i for i, word in enumerate(STARTERS) if word in text), len(STARTERS))
