from __future__ import annotations

from tests.helpers.order import longest_first


def test_long_files_come_before_many_quick_tests() -> None:
    order = [
        "tests/parallel/test_matrix.py",
        "tests/e2e/test_resume.py",
        "tests/ops/test_rope.py",
        "tests/ops/test_head.py",
    ]
    keys = longest_first([order[3], *100 * order[2:3], order[1], order[0]])
    assert sorted(keys, key=keys.__getitem__) == order
