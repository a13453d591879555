"""Where the code of a kernel comes from: the archive of the installation, NVRTC, or the archive's PTX.

No torch here, and no driver: a binary is bytes for a compute capability.
"""

from __future__ import annotations

import functools
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

from megalite_kernels.native.cuda import nvrtc, sources
from megalite_kernels.native.cuda.kernel import Kernel

ARCHIVE = Path(__file__).resolve().parent / "kernels.zip"
"""Fatbins that were compiled at installation, if nvcc was there; `build.py` writes it."""


@dataclass(frozen=True, slots=True)
class Binary:
    """Code that the driver loads, and where it is from, in words."""

    content: bytes
    origin: str


class Archive:
    """The fatbins of an installation, read one at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, dict[str, object]] = {}
        self.nvcc = ""
        try:
            with zipfile.ZipFile(path) as zipped:
                index = json.loads(zipped.read("index.json"))
        except (OSError, KeyError, ValueError, zipfile.BadZipFile):
            return
        self.nvcc = ".".join(map(str, index["nvcc"]))
        self.entries = {entry["key"]: entry for entry in index["kernels"]}

    def covers(self, key: str, capability: tuple[int, int]) -> bool:
        """Whether an instance was compiled for this GPU, or for the sm_80 whose code the later 8.x run."""
        entry = self.entries.get(key)
        return entry is not None and covering(capability) in entry["cubins"]  # type: ignore[operator]

    def has_ptx(self, key: str, capability: tuple[int, int]) -> bool:
        """Whether an instance has PTX that the driver compiles for this GPU."""
        ptx = self.entries.get(key, {}).get("ptx")
        return isinstance(ptx, str) and int(ptx) <= 10 * capability[0] + capability[1]

    def read(self, key: str) -> bytes:
        """A fatbin: the driver takes from it what suits its GPU."""
        with zipfile.ZipFile(self.path) as zipped:
            return zipped.read(f"{key}.fatbin")


def covering(capability: tuple[int, int]) -> str | None:
    """The ahead-of-time architecture whose cubins run on a GPU, None for the ones that have none."""
    if capability[0] == 8:
        return "80"
    return {(9, 0): "90a", (10, 0): "100a"}.get(capability)


@functools.cache
def archive(path: Path = ARCHIVE) -> Archive:
    """The installation's archive, empty if there is none."""
    return Archive(path)


def find(kernel: Kernel, capability: tuple[int, int], cuda_major: int | None) -> Binary:
    """The code of a kernel for a GPU: compiled at installation, else by NVRTC, else from PTX by the driver.

    Raises:
        RuntimeError: there is neither, or the kernel can't be compiled.
    """
    shipped, key = archive(), sources.identity(kernel)
    if shipped.covers(key, capability):
        return Binary(shipped.read(key), f"a cubin of this installation (nvcc {shipped.nvcc})")
    compiler = nvrtc.find(cuda_major)
    if compiler is not None:
        content, cached = nvrtc.compiled(kernel, capability, compiler)
        version = ".".join(map(str, compiler.version))
        return Binary(content, f"NVRTC {version}{', from the disk cache' if cached else ''}")
    if shipped.has_ptx(key, capability):
        return Binary(shipped.read(key), f"PTX of this installation (nvcc {shipped.nvcc})")
    raise RuntimeError(f"{kernel} has no code for sm_{capability[0]}{capability[1]}: {nothing(capability)}")


def nothing(capability: tuple[int, int]) -> str:
    """Why no kernel could be had, and what to do."""
    return (
        f"NVRTC was not found, and this installation holds no code for sm_{capability[0]}{capability[1]}: install "
        "torch's CUDA wheels or nvidia-cuda-nvrtc, or install megalite with nvcc and MEGALITE_CUDA_BUILD=1"
    )


def missing(capability: tuple[int, int], cuda_major: int | None) -> str | None:
    """Why kernels can't be had for a GPU; None if they can."""
    if capability < (8, 0):
        return f"CUDA kernels need sm_80 or later, this is sm_{capability[0]}{capability[1]}"
    if nvrtc.find(cuda_major) is not None:
        return None
    shipped = archive()
    if any(shipped.covers(key, capability) or shipped.has_ptx(key, capability) for key in shipped.entries):
        return None
    return nothing(capability)
