"""The archive of an installation: made by the real nvcc where it is, read, and found out of date by an edit."""

from __future__ import annotations

import pytest

from megalite_kernels.native.cuda import binaries, build, nvrtc, sources
from megalite_kernels.native.cuda.kernel import instance

SCALE = instance("scale.cuh", "scale", threads=128, FACTOR=2)
HOPPER = instance("scale.cuh", "scale", threads=64, FACTOR=2, target="sm_90a")
BROKEN = instance("scale.cuh", "scale", threads=128, FACTOR="no_such_name")
FATBIN = bytes.fromhex("50ed55ba")
NVCC = build.find_nvcc()

needs_nvcc = pytest.mark.skipif(NVCC is None, reason="needs nvcc (scripts/bootstrap.sh cuda)")


@pytest.fixture
def no_nvrtc(monkeypatch):
    monkeypatch.setattr(nvrtc, "find", lambda _=None: None)


def use(monkeypatch, archive):
    monkeypatch.setattr(binaries, "archive", lambda: binaries.Archive(archive))


@needs_nvcc
def test_an_archive_is_made_once_and_read(folder, tmp_path, monkeypatch, no_nvrtc):
    archive = tmp_path / "kernels.zip"
    built = build.build_archive([SCALE, HOPPER], NVCC, archive, jobs=2)
    assert (built.compiled, built.reused, built.failures) == (2, 0, [])
    content = archive.read_bytes()
    again = build.build_archive([SCALE, HOPPER], NVCC, archive, jobs=2)
    assert (again.compiled, again.reused) == (0, 2)
    assert archive.read_bytes() == content

    use(monkeypatch, archive)
    for kernel, capability, origin in (
        (SCALE, (8, 0), "a cubin of this installation"),
        (SCALE, (8, 9), "a cubin of this installation"),
        (SCALE, (9, 0), "a cubin of this installation"),
        (SCALE, (10, 0), "a cubin of this installation"),
        (SCALE, (10, 3), "PTX of this installation"),
        (SCALE, (12, 0), "PTX of this installation"),
        (HOPPER, (9, 0), "a cubin of this installation"),
    ):
        binary = binaries.find(kernel, capability, 13)
        assert binary.content.startswith(FATBIN)
        assert binary.origin.startswith(origin)
    with pytest.raises(RuntimeError, match="has no code for sm_100"):
        binaries.find(HOPPER, (10, 0), 13)
    assert binaries.missing((9, 0), 13) is binaries.missing((12, 0), 13) is None


@needs_nvcc
def test_an_edited_source_is_not_in_the_archive(folder, tmp_path, monkeypatch, no_nvrtc):
    archive = tmp_path / "kernels.zip"
    build.build_archive([HOPPER], NVCC, archive, jobs=1)
    use(monkeypatch, archive)
    (folder / "types.cuh").write_text("#pragma once\nusing real = double;\n")
    for function in (sources.closure, sources.identity):
        function.cache_clear()
    with pytest.raises(RuntimeError, match="has no code"):
        binaries.find(HOPPER, (9, 0), 13)


@needs_nvcc
def test_a_kernel_that_does_not_compile_is_named_and_the_others_stay(folder, tmp_path):
    built = build.build_archive([BROKEN, HOPPER], NVCC, tmp_path / "kernels.zip", jobs=2)
    assert built.compiled == 1
    assert len(built.failures) == 1
    assert "FACTOR=no_such_name" in built.failures[0]
    assert "no_such_name" in built.failures[0].split("\n", 1)[1]


@needs_nvcc
def test_none_begins_after_time_is_up(folder, tmp_path):
    built = build.build_archive([SCALE, HOPPER], NVCC, tmp_path / "kernels.zip", jobs=1, budget_s=0)
    assert (built.compiled, built.late) == (0, 2)
    assert binaries.Archive(tmp_path / "kernels.zip").entries == {}


@needs_nvcc
def test_an_older_nvcc_compiles_for_what_it_knows(folder, tmp_path):
    old = build.Nvcc(NVCC.path, NVCC.version, frozenset({"80", "90"}))
    built = build.build_archive(
        [SCALE, instance("scale.cuh", "scale", threads=32, FACTOR=1, target="sm_100a")],
        old,
        tmp_path / "kernels.zip",
        jobs=1,
    )
    assert (built.compiled, built.skipped) == (1, 1)
    assert binaries.Archive(tmp_path / "kernels.zip").entries[sources.identity(SCALE)]["cubins"] == [
        "80",
        "90a",
    ]


@needs_nvcc
def test_an_archive_of_another_nvcc_is_made_again(folder, tmp_path):
    archive = tmp_path / "kernels.zip"
    build.build_archive([HOPPER], NVCC, archive, jobs=1)
    newer = build.Nvcc(NVCC.path, (99, 0, 0), NVCC.known)
    assert build.build_archive([HOPPER], newer, archive, jobs=1).reused == 0


@pytest.mark.parametrize("content", [b"", b"no zip"])
def test_a_damaged_archive_is_an_empty_one(tmp_path, content):
    archive = tmp_path / "kernels.zip"
    archive.write_bytes(content)
    assert binaries.Archive(archive).entries == {}
    assert not binaries.Archive(archive).covers("key", (9, 0))


def test_the_nvcc_that_is_named_is_the_only_one(monkeypatch):
    monkeypatch.setenv(build.VARIABLE, "/no/such/nvcc")
    assert build.find_nvcc() is None


def test_a_program_that_is_no_nvcc_is_passed_over(monkeypatch):
    monkeypatch.setenv(build.VARIABLE, "/bin/true")
    assert build.find_nvcc() is None
