"""A script that fails in a process of its own fails its test, with its own words."""

from __future__ import annotations

import pytest

from tests.helpers.processes import run_script


def test_a_script_that_ends_well_says_nothing() -> None:
    run_script("import sys\nassert __name__ == '__main__' and 'torch' in sys.modules")


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("assert 1 + 1 == 3, 'a sum'", "exit code 1: (?s:.*)AssertionError: a sum"),
        ("import os\nos.write(2, b'below Python')\nos._exit(3)", "exit code 3: below Python"),
        ("import os\nos.kill(os.getpid(), 11)", "exit code -11"),
        ("import time\ntime.sleep(60)", "still running after 1.5 s"),
    ],
)
def test_a_script_that_does_not(script: str, words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        run_script(script, timeout=1.5 if "sleep" in script else 60)
