"""What scripts/bootstrap.sh says when it cannot go on. (That it works is what ran these tests.)"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.helpers.source import ROOT


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("pyproject.toml", "setup.py", "scripts/bootstrap.sh"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def fake(folder: Path, name: str, script: str) -> Path:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def bootstrap(checkout: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", str(checkout / "scripts/bootstrap.sh"), *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_an_unknown_extra_is_refused(checkout):
    done = bootstrap(checkout, "everything")
    assert done.returncode == 1
    assert (
        done.stderr
        == "set-up: error: unknown extra 'everything'; there are: corpus, test, triton, cuda, dev\n"
    )


def test_a_python_that_was_named_must_be_new_enough(checkout):
    old = fake(checkout, "old_python", "exit 1")
    done = bootstrap(checkout, PYTHON=str(old))
    assert done.returncode == 1
    assert f"error: PYTHON={old} is not a working Python 3.10 or newer" in done.stderr


def test_without_any_python_it_says_how_to_name_one(checkout):
    tools = checkout / "tools"
    tools.mkdir()
    for name in ("cat", "cksum", "cut", "date", "dirname", "tr"):
        (tools / name).symlink_to(shutil.which(name))
    fake(tools, "python3", 'if [ "$1" = --version ]; then echo Python 3.8.1; else exit 1; fi')
    shell = shutil.which("sh")
    done = subprocess.run(
        [shell, str(checkout / "scripts/bootstrap.sh")],
        env={"PATH": str(tools)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "no Python 3.10 or newer was found (python3 is Python 3.8.1)" in done.stderr
    assert "make PYTHON=/path/to/python3" in done.stderr


def test_a_python_without_venv_says_what_to_install(checkout):
    """Debian's python3 without python3-venv: `-m venv` fails, and nothing else can make an environment."""
    python = fake(checkout, "bare_python", 'if [ "$1" = -m ]; then exit 1; else exit 0; fi')
    no_uv = checkout / "tools"
    no_uv.mkdir()
    fake(no_uv, "uv", "exit 1")
    done = bootstrap(checkout, PYTHON=str(python), PATH=f"{no_uv}{os.pathsep}{os.environ['PATH']}")
    assert done.returncode == 1
    assert (
        "cannot make a virtual environment; install it (Debian, Ubuntu: apt install python3-venv)"
        in done.stderr
    )
