"""What people install: checkout → sdist → wheel → a fresh environment, with and without a C++ compiler.

The environments see this one's torch through a .pth file, so nothing is downloaded; the editable install of
this checkout is not visible there, since .pth files in such a folder are not followed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from megalite_kernels.native.cuda import build
from tests.helpers.source import ROOT, modules

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

NOT_SOURCE = shutil.ignore_patterns(
    ".*_cache", "__pycache__", "*.so", "*.egg-info", ".git", ".hypothesis", ".venv"
)
HAS_COMPILER = shutil.which(os.environ.get("CXX", "c++")) is not None

ROUND_TRIP = """
import megalite, megalite_kernels, torch
print(megalite_kernels.__file__)
x = torch.randn(4, 64)
weight = torch.rand(64)
truth = torch.nn.functional.rms_norm(x.double(), (64,), weight.double(), 1e-6)
torch.testing.assert_close(megalite_kernels.rms_norm(x, weight), truth.float(), rtol=1e-5, atol=1e-6)
"""


CUDA = "megalite_kernels/native/cuda"
NO_NVCC = {"MEGALITE_NVCC": "/no/such/nvcc"}
CUDA_STATE = """
import json
from megalite_kernels.native.cuda import binaries, nvrtc, sources
shipped = sources.shipped()
archive = binaries.archive()
print(json.dumps({
    "file": binaries.__file__,
    "folder": str(sources.folder()),
    "shipped": len(shipped),
    "there": sum(sources.identity(kernel) in archive.entries for kernel in shipped),
    "covered": sum(
        archive.covers(key, (9, 0)) and archive.read(key)[:4].hex() == "50ed55ba"  # the magic number of a fatbin
        for key in {sources.identity(kernel) for kernel in shipped}
    ),
}))
"""


class Distributions(NamedTuple):
    sdist: Path
    wheel: Path


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Output of a command that succeeds; without PYTHONPATH, so that only what is installed counts."""
    inherited = {
        key: value
        for key, value in os.environ.items()
        if key not in {"PYTHONPATH", "MEGALITE_NO_NATIVE", "MEGALITE_CUDA_BUILD", "MEGALITE_NVCC"}
    }
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**inherited, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Distributions:
    """An sdist of a copy of the checkout, and a wheel made from that sdist alone."""
    copy = tmp_path_factory.mktemp("checkout") / "megalite"
    outputs = {"build", "data", "dist", "runs"}
    shutil.copytree(
        ROOT,
        copy,
        ignore=lambda folder, names: {*NOT_SOURCE(folder, names), *(outputs if Path(folder) == ROOT else ())},
    )
    out = tmp_path_factory.mktemp("dist")
    command = (sys.executable, "-m", "build", "--no-isolation", "--outdir", out, copy)
    run(*command, cwd=out, MEGALITE_CUDA_BUILD="0")  # compiled CUDA kernels have a test of their own
    return Distributions(*(next(out.glob(pattern)) for pattern in ("*.tar.gz", "*.whl")))


def fresh_environment(folder: Path) -> Path:
    """A virtual environment without megalite that borrows every other package of this one; its Python."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    purelib = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    (Path(purelib) / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def install(python: Path, distribution: Path, **environment: str) -> str:
    command = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--verbose",
        "--no-index",
        "--no-deps",
    ]
    return run(
        *command, "--no-build-isolation", "--ignore-installed", distribution, cwd=python.parent, **environment
    )


def test_the_sdist_holds_all_that_building_and_testing_need(distributions):
    with tarfile.open(distributions.sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    folders = ("benchmarks", "csrc", "examples", "scripts", "tests", ".ci")
    wanted = {
        path.relative_to(ROOT).as_posix()
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix not in {".pyc", ".so", ".o"}
    }
    wanted |= {"CHANGELOG.md", "LICENSE", "Makefile", "README.md", "pyproject.toml", "setup.py"}
    assert not wanted - names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def test_the_wheel_holds_both_packages_and_nothing_else(distributions):
    with zipfile.ZipFile(distributions.wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(next(name for name in names if name.endswith(".dist-info/METADATA"))).decode()
        licenses = [name for name in names if name.endswith("licenses/LICENSE")]
    for package in ("megalite", "megalite_kernels"):
        modules_in_wheel = {name for name in names if name.startswith(f"{package}/") and name.endswith(".py")}
        assert len(modules_in_wheel) == len(modules(package))
        assert f"{package}/py.typed" in names
    assert "megalite/train/report_template.html" in names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"megalite", "megalite_kernels"}
    sources = {f"{CUDA}/csrc/{path.name}" for path in (ROOT / "csrc" / "cuda").glob("*.cuh")}
    assert sources == {name for name in names if name.endswith(".cuh")}
    assert sources
    assert licenses
    assert "Requires-Dist: torch>=2.11\n" in metadata


def test_the_wheel_runs_in_a_fresh_environment(distributions, tmp_path):
    python = fresh_environment(tmp_path / "venv")
    install(python, distributions.wheel)
    where = run(python, "-c", ROUND_TRIP, cwd=tmp_path).strip()
    assert Path(where).is_relative_to(tmp_path), "the checkout was imported, not the wheel"
    assert "commands" in run(python.parent / "megalite", "--help", cwd=tmp_path)
    assert run(python, "-m", "megalite", "--version", cwd=tmp_path).startswith("megalite ")


@pytest.mark.skipif(not HAS_COMPILER, reason="there is no C++ compiler, so the wheel holds no native library")
def test_the_wheel_holds_the_native_library(distributions):
    with zipfile.ZipFile(distributions.wheel) as archive:
        assert [name for name in archive.namelist() if name.startswith("megalite_kernels/_C.")]


def test_without_a_compiler_it_installs_says_so_and_works(distributions, tmp_path):
    python = fresh_environment(tmp_path / "venv")
    said = install(python, distributions.sdist, CC="/bin/false", CXX="/bin/false", **NO_NVCC)
    assert "native CPU kernels are not built: the C++ compiler failed" in said
    assert "CUDA kernels are not compiled now (no nvcc here)" in said
    run(python, "-c", ROUND_TRIP, cwd=tmp_path)
    run(
        python,
        "-c",
        "import importlib.util as u; assert u.find_spec('megalite_kernels._C') is None",
        cwd=tmp_path,
    )


def test_native_kernels_can_be_left_out(distributions, tmp_path):
    python = fresh_environment(tmp_path / "venv")
    said = install(
        python, distributions.sdist, MEGALITE_NO_NATIVE="1", CC="/bin/false", CXX="/bin/false", **NO_NVCC
    )
    assert "native CPU kernels are not built" not in said
    run(python, "-c", ROUND_TRIP, cwd=tmp_path)


def cuda_state(python: Path, cwd: Path) -> dict[str, Any]:
    """What an installation knows of its CUDA kernels."""
    state: dict[str, Any] = json.loads(run(python, "-c", CUDA_STATE, cwd=cwd))
    assert Path(state["file"]).is_relative_to(cwd), "the checkout was imported, not what was installed"
    assert Path(state["folder"]).is_relative_to(cwd), "the sources are not part of the installation"
    return state


def test_without_nvcc_the_sources_are_installed_and_it_is_said(distributions, tmp_path):
    python = fresh_environment(tmp_path / "venv")
    said = install(python, distributions.sdist, MEGALITE_NO_NATIVE="1", **NO_NVCC)
    assert "CUDA kernels are not compiled now (no nvcc here): NVRTC" in said
    state = cuda_state(python, tmp_path)
    assert (state["there"], state["covered"]) == (0, 0)
    assert state["shipped"] > 0


@pytest.mark.skipif(build.find_nvcc() is None or not HAS_COMPILER, reason="needs nvcc and a C++ compiler")
def test_with_nvcc_kernels_are_compiled_for_a_minute_at_most(distributions, tmp_path):
    python = fresh_environment(tmp_path / "venv")
    said = install(python, distributions.sdist, MEGALITE_NO_NATIVE="1")
    found = re.search(r"megalite: (\d+) of (\d+) CUDA kernels compiled in (\d+) s with nvcc", said)
    assert found is not None, said
    state = cuda_state(python, tmp_path)
    assert 0 < int(found[1]) == state["there"] == state["covered"]
    assert int(found[2]) == state["shipped"]
    assert int(found[1]) == int(found[2]) or "left for their first use" in said


@pytest.mark.skipif(build.find_nvcc() is None, reason="needs nvcc")
def test_an_nvcc_that_fails_is_said_and_it_installs(distributions, tmp_path):
    """Without a host compiler, nvcc itself can do nothing."""
    python = fresh_environment(tmp_path / "venv")
    said = install(
        python, distributions.sdist, MEGALITE_NO_NATIVE="1", NVCC_PREPEND_FLAGS="-ccbin /bin/false"
    )
    assert re.search(r"0 of (\d+) CUDA kernels compiled .*, \1 failed: ", said), said
    assert cuda_state(python, tmp_path)["there"] == 0


def test_compiled_kernels_that_are_asked_for_must_be_possible(distributions, tmp_path):
    python = fresh_environment(tmp_path / "venv")
    with pytest.raises(AssertionError, match="MEGALITE_CUDA_BUILD=1, but nvcc was not found"):
        install(python, distributions.sdist, MEGALITE_NO_NATIVE="1", MEGALITE_CUDA_BUILD="1", **NO_NVCC)


def test_the_kernels_lists_need_no_torch(tmp_path):
    """An isolated build has none: setup.py reads the lists without it."""
    code = (
        f"import os, sys; os.chdir({str(ROOT)!r}); sys.path.insert(0, {str(ROOT)!r})\n"
        "sys.argv = ['setup.py', '--version']\n"
        "for name in ('torch', 'numpy', 'triton'): sys.modules[name] = None\n"
        "import setup; print(len(setup.torch_free('sources').shipped()))"
    )
    assert int(run(sys.executable, "-c", code, cwd=tmp_path).splitlines()[-1]) > 0
