"""Errors planted in the CUDA kernels: for each there is a test that fails, so the tests prove something.

Every `mutations_<op>.py` beside this file has a list `MUTATIONS` of (file of csrc/cuda, text that is there once, what
takes its place, what must fail: the id of a test, or a function that raises). A mutant that does not compile, or hangs,
counts as not caught; and a test that fails without the error planted proves nothing. `make test-cuda` takes the first
`QUICK` of each file, `make test-cuda-all` all of them.
"""

from __future__ import annotations

import functools
import importlib
import io
import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megalite_kernels.native.cuda import emulated_build

Mutation = tuple[str, str, str, "str | Callable[[], None]"]

ROOT = Path(__file__).parents[2]
TIME_LIMIT_S = 300
QUICK = 6
CAUGHT, SURVIVED, NO_COMPILE, NO_TEST = 0, 10, 11, 12
WHAT = {
    SURVIVED: "survived: what should have failed passed",
    NO_COMPILE: "does not compile: plant an error that does",
    NO_TEST: "was not tested: is there a test of that id?",
    None: f"was not caught within {TIME_LIMIT_S} s",
}


def _mutations() -> list[pytest.param]:  # type: ignore[valid-type]
    found = []
    for path in sorted(Path(__file__).parent.glob("mutations_*.py")):
        module = importlib.import_module(f"tests.cuda.{path.stem}")
        op = path.stem.removeprefix("mutations_")
        for number, one in enumerate(module.MUTATIONS):
            marks = [] if number < QUICK else [pytest.mark.slow]
            found.append(pytest.param(one, id=f"{op}-{number}", marks=marks))
    return found


def plant(mutation: Mutation, folder: Path) -> Path:
    """A copy of csrc with the error in it."""
    file, old, new, _ = mutation
    shutil.copytree(ROOT / "csrc" / "cuda", folder / "cuda")
    shutil.copytree(ROOT / "csrc" / "emulate", folder / "emulate")
    path = folder / "cuda" / file
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{file} has {text.count(old)} times, not once: {old!r}"
    path.write_text(text.replace(old, new), encoding="utf-8")
    return folder


def _judge(must_fail: str | Callable[[], None], sources: Path, log: Path) -> None:
    """In a process of its own: leave with one of the codes above."""
    output = log.open("w", encoding="utf-8", buffering=1)
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    sys.stdout = sys.stderr = io.TextIOWrapper(os.fdopen(1, "wb", 0), write_through=True)
    compile_one = emulated_build._run

    def compile_or_leave(command: list[str], source: str) -> None:
        try:
            compile_one(command, source)
        except emulated_build.BuildError as error:
            print(error)
            os._exit(NO_COMPILE)

    emulated_build._run = compile_or_leave
    with emulated_build.using_sources(sources):
        if callable(must_fail):
            try:
                must_fail()
            except (AssertionError, RuntimeError) as error:
                print(error)
                os._exit(CAUGHT)
            os._exit(SURVIVED)
        code = pytest.main(["-x", "-q", "--no-header", "-p", "no:cacheprovider", str(ROOT / must_fail)])
    codes = {pytest.ExitCode.TESTS_FAILED: CAUGHT, pytest.ExitCode.OK: SURVIVED}
    os._exit(codes.get(pytest.ExitCode(code), NO_TEST))


def outcome(mutation: Mutation, folder: Path) -> tuple[int | None, str]:
    """What became of a mutant, and what the test printed."""
    folder.mkdir(exist_ok=True)
    return _run_judge(mutation[3], plant(mutation, folder / "csrc"), folder / "log.txt")


@functools.cache
def without_mutation(must_fail: str | Callable[[], None], log: Path) -> tuple[int | None, str]:
    """The same test of the sources as they are."""
    return _run_judge(must_fail, ROOT / "csrc", log)


def _run_judge(must_fail: str | Callable[[], None], sources: Path, log: Path) -> tuple[int | None, str]:
    process = multiprocessing.get_context("fork").Process(target=_judge, args=(must_fail, sources, log))
    process.start()
    process.join(TIME_LIMIT_S)
    if process.is_alive():
        process.kill()
        process.join()
        return None, log.read_text(encoding="utf-8")
    return process.exitcode, log.read_text(encoding="utf-8")


@pytest.mark.timeout(2 * TIME_LIMIT_S + 60)
@pytest.mark.parametrize("mutation", _mutations())
def test_mutant_is_caught(
    mutation: Mutation, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file, old, new, must_fail = mutation
    code, printed = without_mutation(must_fail, tmp_path_factory.getbasetemp() / "unplanted.txt")
    assert code == SURVIVED, (
        f"{must_fail} fails, or is not there, without an error planted\n{printed[-3000:]}"
    )
    code, printed = outcome(mutation, tmp_path)
    why = WHAT.get(code, f"ended the process with {code}")
    assert code == CAUGHT, f"{file}: {old!r} -> {new!r} {why}\n{printed[-3000:]}"


@pytest.mark.parametrize(
    ("old", "new", "test", "code"),
    [
        ("if (Threads == 32) return value;", "return value;", "test_sums_of_rows[0-float]", CAUGHT),
        ("if (Threads == 32) return value;", "", "test_sums_of_rows[0-float]", SURVIVED),
        ("if (Threads == 32) return value;", "return valu;", "test_sums_of_rows[0-float]", NO_COMPILE),
        ("if (Threads == 32) return value;", "", "test_that_is_not_there", NO_TEST),
    ],
    ids=["caught", "survived", "no-compile", "no-test"],
)
def test_mutants_are_judged(old: str, new: str, test: str, code: int, tmp_path: Path) -> None:
    assert outcome(("common.cuh", old, new, f"tests/cuda/test_emulator.py::{test}"), tmp_path)[0] == code


def test_mutants_are_judged_by_a_function(tmp_path: Path) -> None:
    def fails() -> None:
        raise AssertionError("an error of 1.0")

    where = ("common.cuh", "if (Threads == 32) return value;", "")
    assert outcome((*where, fails), tmp_path / "fails") == (CAUGHT, "an error of 1.0\n")
    assert outcome((*where, lambda: None), tmp_path / "passes")[0] == SURVIVED
