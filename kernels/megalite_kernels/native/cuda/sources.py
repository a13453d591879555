"""The CUDA sources, what identifies a compiled instance of them, and for what each is compiled.

Standard library only: `setup.py` reads this without torch.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import pkgutil
import re
from pathlib import Path

from megalite_kernels.native.cuda.kernel import Kernel

OPTIONS = ("-std=c++17",)
"""Of nvcc and of NVRTC alike; what else changes the code goes into a kernel's defines."""
_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)

CUBINS = {
    "sm_80": ("80", "90a", "100a"),
    "sm_90": ("90a", "100a"),
    "sm_90a": ("90a",),
    "sm_100a": ("100a",),
}
"""By a kernel's target: the architectures it is compiled for ahead of time."""
PTX = {"sm_80": "80", "sm_90": "90"}
"""By a kernel's target: the virtual architecture of the PTX for GPUs that come later, where that can be."""


def folder() -> Path:
    """Where the .cuh files are: beside this file in an installation, csrc/cuda in a checkout."""
    here = Path(__file__).resolve()
    installed = here.parent / "csrc"
    return installed if installed.is_dir() else here.parents[4] / "csrc" / "cuda"


@functools.cache
def closure(source: str) -> dict[str, str]:
    """Text by name of a source and of all that it includes with quotes, in the order they are met.

    Includes of files outside the folder (the emulator's) are for other compilers than these, and left out.

    Raises:
        FileNotFoundError: there is no such source.
    """
    found: dict[str, str] = {}
    todo = [source]
    while todo:
        name = todo.pop(0)
        if name in found:
            continue
        path = folder() / name
        if name != source and (name.startswith("..") or not path.is_file()):
            continue
        found[name] = path.read_text(encoding="utf-8")
        todo += _INCLUDE.findall(found[name])
    return found


@functools.cache
def identity(kernel: Kernel) -> str:
    """A hash of everything that decides what an instance compiles to, but for compiler and architecture."""
    content = [
        kernel.source,
        kernel.name,
        kernel.all_defines,
        OPTIONS,
        sorted(closure(kernel.source).items()),
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def define_options(kernel: Kernel) -> list[str]:
    """Defines as both compilers take them."""
    return [f"-D{name}={value}" for name, value in kernel.all_defines]


def shipped() -> list[Kernel]:
    """The instances that are compiled ahead of time: every `SHIPPED` of `kernels/`, each once."""
    package = importlib.import_module("megalite_kernels.native.cuda.kernels")
    found: list[Kernel] = []
    for module in sorted(entry.name for entry in pkgutil.iter_modules(package.__path__)):
        found += getattr(importlib.import_module(f"{package.__name__}.{module}"), "SHIPPED", ())
    return list(dict.fromkeys(found))
