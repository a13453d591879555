"""Compiles the shipped CUDA kernels with nvcc into one archive, which an installation carries.

Standard library only: `setup.py` runs this without torch. The archive is a zip of fatbins (cubins for several
architectures, and PTX) named by `sources.identity`, with index.json beside them, so that a source which was
edited since is simply not found in it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

from megalite_kernels.native.cuda import sources
from megalite_kernels.native.cuda.kernel import Kernel

VARIABLE = "MEGALITE_NVCC"
"""Environment variable: the nvcc to use, and no other."""
INDEX = "index.json"
LEAST_NVCC = (12, 0)
"""Older ones know no grid constants and no tensor maps."""


class CompileError(RuntimeError):
    """nvcc could not compile a kernel; the message holds what it said."""


@dataclass(frozen=True, slots=True)
class Nvcc:
    """A CUDA compiler: its path, version, and the architectures it knows ("80", "90", ...)."""

    path: str
    version: tuple[int, ...]
    known: frozenset[str]

    def knows(self, architecture: str) -> bool:
        """Whether it compiles for one, "90a" counting as "90"."""
        return architecture.rstrip("a") in self.known


@dataclass(slots=True)
class Built:
    """What `build_archive` did."""

    compiled: int = 0
    reused: int = 0
    late: int = 0
    """Left out because time was up."""
    skipped: int = 0
    """Left out because this nvcc knows none of their architectures."""
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)


def find_nvcc(packages_first: bool = False) -> Nvcc | None:
    """The first nvcc that works: MEGALITE_NVCC alone, or of PATH, CUDA_HOME, CUDA_PATH, /usr/local/cuda, packages."""
    chosen = os.environ.get(VARIABLE)
    if chosen:
        candidates = [chosen]
    else:
        candidates = (
            [*_of_packages(), *_of_toolkits()] if packages_first else [*_of_toolkits(), *_of_packages()]
        )
    for path in candidates:
        found = _ask(path)
        if found is not None and found.version >= LEAST_NVCC:
            return found
    return None


def _of_toolkits() -> Iterator[str]:
    on_path = shutil.which("nvcc")
    if on_path is not None:
        yield on_path
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            yield str(Path(os.environ[variable]) / "bin" / "nvcc")
    yield "/usr/local/cuda/bin/nvcc"


def _of_packages() -> Iterator[str]:
    for entry in sys.path:
        for pattern in ("cu[0-9]*/bin/nvcc", "cuda_nvcc/bin/nvcc"):
            yield from map(str, sorted((Path(entry or ".") / "nvidia").glob(pattern), reverse=True))


def _ask(path: str) -> Nvcc | None:
    """What an nvcc says about itself, or None if it doesn't run."""
    try:
        version = _output([path, "--version"])
        known = _output([path, "--list-gpu-code"])
    except (OSError, subprocess.SubprocessError):
        return None
    number = re.search(r"release \d+\.\d+, V(\d+)\.(\d+)\.(\d+)", version)
    if number is None:
        return None
    architectures = frozenset(re.findall(r"sm_(\d+)\b", known))
    return Nvcc(path, tuple(map(int, number.groups())), architectures)


def _output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def architectures(kernel: Kernel, nvcc: Nvcc) -> list[str]:
    """Those this kernel is compiled for ahead of time, as far as this nvcc knows them."""
    return [one for one in sources.CUBINS[kernel.target] if nvcc.knows(one)]


def compile_instance(
    kernel: Kernel, nvcc: Nvcc, output: Path, options: Sequence[str], timeout_s: float | None = None
) -> str:
    """Run nvcc on one instance; returns what it printed.

    Raises:
        CompileError: it failed, or took longer than `timeout_s`.
    """
    source = sources.folder() / kernel.source
    command = [nvcc.path, "-x", "cu", *sources.OPTIONS, *sources.define_options(kernel)]
    command += [f"-I{sources.folder()}", *options, "-o", str(output), str(source)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise CompileError(f"{kernel}: nvcc took longer than {timeout_s:.0f} s") from error
    if done.returncode:
        raise CompileError(f"{kernel}: nvcc failed\n{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def _fatbin(kernel: Kernel, nvcc: Nvcc, folder: Path, deadline: float) -> bytes | None:
    """One instance for all its architectures; None if time was up before it began."""
    left = deadline - time.monotonic()
    if left <= 0:
        return None
    options = ["-fatbin"]
    for one in architectures(kernel, nvcc):
        options += ["-gencode", f"arch=compute_{one},code=sm_{one}"]
    if kernel.target in sources.PTX:
        ptx = sources.PTX[kernel.target]
        options += ["-gencode", f"arch=compute_{ptx},code=compute_{ptx}"]
    output = folder / f"{sources.identity(kernel)}.fatbin"
    compile_instance(kernel, nvcc, output, options, None if left == float("inf") else left + 60)
    return output.read_bytes()


def build_archive(
    kernels: Sequence[Kernel], nvcc: Nvcc, archive: Path, *, jobs: int, budget_s: float = float("inf")
) -> Built:
    """Compile `kernels` into `archive`, side by side; entries it has already are kept.

    Args:
        kernels: the instances, the most wanted first.
        nvcc: the compiler.
        archive: the zip to write; it is replaced when all is done.
        jobs: how many compilations at a time.
        budget_s: none begins after this many seconds.
    """
    began = time.monotonic()
    before = read_archive(archive, nvcc)
    built, entries, blobs = Built(), [], {}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(max(jobs, 1)) as pool:
        running = {}
        for kernel in kernels:
            key = sources.identity(kernel)
            if not architectures(kernel, nvcc):
                built.skipped += 1
            elif key in before:
                blobs[key] = before[key]
                built.reused += 1
            else:
                running[pool.submit(_fatbin, kernel, nvcc, Path(folder), began + budget_s)] = key
        for future in as_completed(running):
            try:
                blob = future.result()
            except CompileError as error:
                built.failures.append(str(error))
                continue
            if blob is None:
                built.late += 1
            else:
                blobs[running[future]] = blob
                built.compiled += 1
    for kernel in kernels:
        key = sources.identity(kernel)
        if key in blobs:
            entries.append(_entry(kernel, key, nvcc))
    _write(archive, {"nvcc": list(nvcc.version), "kernels": entries}, blobs)
    built.seconds = time.monotonic() - began
    return built


def _entry(kernel: Kernel, key: str, nvcc: Nvcc) -> dict[str, object]:
    return {
        "key": key,
        "kernel": str(kernel),
        "cubins": architectures(kernel, nvcc),
        "ptx": sources.PTX.get(kernel.target),
    }


def _write(archive: Path, index: dict[str, object], blobs: dict[str, bytes]) -> None:
    """A zip with fixed times, so that equal contents are equal bytes."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    partial = archive.with_suffix(f".{os.getpid()}.partial")
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as zipped:
        contents = {INDEX: json.dumps(index, indent=1).encode()}
        contents |= {f"{key}.fatbin": blobs[key] for key in sorted(blobs)}
        for name, content in contents.items():
            zipped.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
    partial.replace(archive)


def read_archive(archive: Path, nvcc: Nvcc) -> dict[str, bytes]:
    """Fatbins by identity of an earlier archive of the same nvcc; empty if there is none."""
    try:
        with zipfile.ZipFile(archive) as zipped:
            index = json.loads(zipped.read(INDEX))
            if index["nvcc"] != list(nvcc.version):
                return {}
            return {entry["key"]: zipped.read(f"{entry['key']}.fatbin") for entry in index["kernels"]}
    except (OSError, KeyError, ValueError, zipfile.BadZipFile):
        return {}
