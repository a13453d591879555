"""Compiling at run time with the real NVRTC, which needs no GPU; the cache with many processes at once."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megalite_kernels.native.cuda import binaries, cache, nvrtc, sources
from megalite_kernels.native.cuda.kernel import instance

SCALE = instance("scale.cuh", "scale", threads=128, FACTOR=2)
CUBIN = b"\x7fELF"

needs_nvrtc = pytest.mark.skipif(nvrtc.find() is None, reason="needs NVRTC (pip install nvidia-cuda-nvrtc)")


@needs_nvrtc
@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (10, 0), (12, 0)])
def test_a_cubin_for_the_gpu_that_is_there(folder, capability):
    compiler = nvrtc.find()
    content, cached = nvrtc.compiled(SCALE, capability, compiler)
    assert content.startswith(CUBIN)
    assert not cached
    assert nvrtc.compiled(SCALE, capability, compiler) == (content, True)


@needs_nvrtc
def test_an_error_shows_the_log_and_is_not_kept(folder):
    broken = instance("scale.cuh", "scale", threads=128, FACTOR="no_such_name")
    for _ in range(2):
        with pytest.raises(nvrtc.CompileError) as caught:
            nvrtc.compiled(broken, (9, 0), nvrtc.find())
        assert "scale (FACTOR=no_such_name, THREADS=128)" in str(caught.value)
        assert 'scale.cuh(7): error: identifier "no_such_name" is undefined' in str(caught.value)
        assert "-arch=sm_90a" in str(caught.value)
    assert not list(cache.folder().rglob("*.bin"))


@needs_nvrtc
def test_the_header_is_part_of_the_source(folder):
    (folder / "types.cuh").write_text("#pragma once\nusing real = no_such_type;\n")
    with pytest.raises(nvrtc.CompileError, match=r"types.cuh\(2\): error"):
        nvrtc.compiled(SCALE, (9, 0), nvrtc.find())


def test_what_another_compilation_is(folder):
    """Sources, headers, defines, symbol, options, architecture and version each make another entry."""

    class Version:
        version = (13, 0)

    def key(kernel=SCALE, chosen="sm_90a", version=(13, 0)):
        for function in (sources.closure, sources.identity):
            function.cache_clear()
        compiler = Version()
        compiler.version = version
        return nvrtc.cache_key(kernel, chosen, compiler)

    first = key()
    assert key() == first
    keys = {
        first,
        key(instance("scale.cuh", "scale", threads=128, FACTOR=3)),
        key(instance("scale.cuh", "scale", threads=256, FACTOR=2)),
        key(instance("scale.cuh", "other", threads=128, FACTOR=2)),
        key(chosen="sm_100a"),
        key(version=(13, 1)),
    }
    (folder / "types.cuh").write_text("#pragma once\nusing real = double;\n")
    keys.add(key())
    (folder / "scale.cuh").write_text((folder / "scale.cuh").read_text() + "\n")
    keys.add(key())
    assert len(keys) == 8


def test_what_only_decides_the_launch_compiles_to_the_same(folder):
    wider = instance("scale.cuh", "scale", threads=128, FACTOR=2, shared_bytes=1024)
    assert sources.identity(wider) == sources.identity(SCALE)


@pytest.mark.parametrize(
    ("target", "capability", "chosen"),
    [
        ("sm_80", (8, 9), "sm_89"),
        ("sm_80", (9, 0), "sm_90a"),
        ("sm_80", (12, 0), "compute_100"),
        ("sm_90", (12, 0), "compute_100"),
        ("sm_90a", (9, 0), "sm_90a"),
    ],
)
def test_the_architecture_is_the_gpus_own_or_older_ptx(target, capability, chosen):
    kernel = instance("scale.cuh", "scale", threads=32, target=target)
    assert nvrtc.architecture(kernel, capability, (75, 80, 86, 89, 90, 100)) == chosen


def test_code_for_one_architecture_alone_has_no_ptx():
    kernel = instance("scale.cuh", "scale", threads=32, target="sm_100a")
    with pytest.raises(nvrtc.CompileError, match="needs code for sm_100 itself"):
        nvrtc.architecture(kernel, (10, 0), (75, 80, 90))


# --- the disk cache -------------------------------------------------------------------------------------------------
@pytest.fixture
def kept(tmp_path, monkeypatch):
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    return cache.folder()


def test_an_entry_is_made_once(kept):
    made = []

    def make() -> bytes:
        made.append(1)
        return b"code"

    assert cache.get_or_make("key", make) == (b"code", False)
    assert cache.get_or_make("key", make) == (b"code", True)
    assert len(made) == 1


def test_a_damaged_entry_is_made_again(kept):
    cache.get_or_make("key", lambda: b"code")
    entry = next(kept.rglob("*.bin"))
    for damaged in (b"", entry.read_bytes()[:-1], entry.read_bytes()[:-1] + b"x"):
        entry.write_bytes(damaged)
        assert cache.get_or_make("key", lambda: b"code") == (b"code", False)
    assert cache.get_or_make("key", lambda: b"never") == (b"code", True)


def test_a_failure_leaves_nothing_and_the_next_may_try(kept):
    def fail() -> bytes:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        cache.get_or_make("key", fail)
    assert cache.get_or_make("key", lambda: b"code") == (b"code", False)


@pytest.mark.parametrize("place", ["/dev/null/cache", "/proc/no-such-folder"])
def test_a_folder_that_cannot_be_written_to_is_no_error(monkeypatch, place):
    monkeypatch.setenv(cache.VARIABLE, place)
    assert cache.get_or_make("key", lambda: b"code") == (b"code", False)


def test_without_locks_each_makes_its_own(kept, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError("no locks here")

    monkeypatch.setattr(cache.fcntl, "flock", refuse)
    assert cache.get_or_make("key", lambda: b"code") == (b"code", False)
    assert cache.get_or_make("key", lambda: b"code") == (b"code", True)


RACE = """
import os, sys, time
from pathlib import Path
sys.path[:0] = sys.argv[3:]
import types
for name in ("megalite_kernels", "megalite_kernels.native"):  # the cache needs no torch
    package = types.ModuleType(name)
    package.__path__ = [str(Path(sys.argv[3], *name.split(".")))]
    sys.modules[name] = package
from megalite_kernels.native.cuda import cache

def make():
    with open(sys.argv[2], "a") as made:
        made.write(f"{os.getpid()}\\n")
    time.sleep(0.3)
    return b"x" * 1_000_000

start = Path(sys.argv[1])
print("ready", flush=True)
while not start.exists():
    time.sleep(0.001)
content, _ = cache.get_or_make("key", make)
assert content == b"x" * 1_000_000
"""


def test_of_many_processes_one_compiles(kept, tmp_path):
    kernels = str(Path(cache.__file__).parents[3])
    start, made = tmp_path / "start", tmp_path / "made"
    command = [sys.executable, "-c", RACE, str(start), str(made), kernels]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ.copy()) for _ in range(8)]
    for process in processes:
        assert process.stdout is not None
        process.stdout.readline()
    start.touch()
    for process in processes:
        process.communicate(timeout=60)
    assert [process.returncode for process in processes] == [0] * 8
    assert len(made.read_text().splitlines()) == 1
    assert not list(kept.rglob("*.partial"))


def test_many_threads_read_whole_entries(kept, monkeypatch):
    """Where locks don't work: every reader has one whole content."""
    monkeypatch.setattr(cache, "fcntl", None)
    contents = [bytes([n]) * 200_000 for n in range(8)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda content: cache.get_or_make("key", lambda: content)[0], contents * 4))
    assert set(found) <= set(contents)
    assert cache.get_or_make("key", lambda: b"")[0] in contents


def test_entries_are_for_the_user_alone(kept):
    """Code that this user's processes will run is not for others to write."""
    cache.get_or_make("key", lambda: b"code")
    for path in kept.rglob("*"):
        assert not path.stat().st_mode & (stat.S_IWOTH | stat.S_IWGRP)


# --- where code comes from ------------------------------------------------------------------------------------------
def test_without_compiler_and_archive_it_is_said(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(nvrtc, "find", lambda _=None: None)
    monkeypatch.setattr(binaries, "archive", lambda: binaries.Archive(tmp_path / "none.zip"))
    with pytest.raises(RuntimeError, match=r"scale .* has no code for sm_90: NVRTC was not found"):
        binaries.find(SCALE, (9, 0), 13)
    assert "NVRTC was not found" in (binaries.missing((9, 0), 13) or "")
    assert binaries.missing((7, 5), 13) == "CUDA kernels need sm_80 or later, this is sm_75"


@needs_nvrtc
def test_nvrtc_is_named_as_the_origin(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(binaries, "archive", lambda: binaries.Archive(tmp_path / "none.zip"))
    version = ".".join(map(str, nvrtc.find().version))
    assert binaries.find(SCALE, (9, 0), None).origin == f"NVRTC {version}"
    assert binaries.find(SCALE, (9, 0), None).origin == f"NVRTC {version}, from the disk cache"
    assert binaries.missing((9, 0), None) is None
