"""A script in a process of its own that has torch already: importing it takes longer than most scripts."""

from __future__ import annotations

import os
import tempfile

from tests.helpers.rank_pool import waiting_context


def run_script(script: str, *, timeout: float = 120) -> None:
    """Run `script` to its end; it finds nothing of megalite and megalite_kernels imported.

    Raises:
        AssertionError: it raised, died, or took more than `timeout` seconds; with what it wrote to standard error.
    """
    with tempfile.NamedTemporaryFile("r") as errors:
        process = waiting_context().Process(target=_execute, args=(script, errors.name))
        process.start()
        process.join(timeout)
        code = process.exitcode
        process.kill()
        process.join()
        assert code is not None, f"still running after {timeout} s: {errors.read()}"
        assert code == 0, f"exit code {code}: {errors.read()}"


def _execute(script: str, errors: str) -> None:
    os.dup2(os.open(errors, os.O_WRONLY), 2)
    exec(script, {"__name__": "__main__"})
